"""Answers to a question file, in batches, written as they come so that an interrupted run goes on where it stopped."""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_saep.errors import UserError
from llava_saep.evaluation.questions import Question

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
GenerateBatch = Callable[[list[Messages]], list[str]]
"""Conversations -> one generated text each, in their order; `Predictor.generate` with its options bound."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin")


def model_fingerprint(folder: Path) -> str:
    """A short text that changes when a checkpoint's weights or config do (by names, sizes and times of writing)."""
    files = sorted(file for file in folder.iterdir() if file.suffix in _WEIGHT_SUFFIXES or file.name == "config.json")
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def question_messages(question: Question, image_folder: Path, blind: bool = False) -> Messages:
    """The one-turn conversation that puts a question; `blind` leaves the image out and changes nothing else."""
    content: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
    if question.image is not None and not blind:
        content.insert(0, {"type": "image", "image": str(image_folder / question.image)})
    return [{"role": "user", "content": content}]


def check_images(questions: Iterable[Question], image_folder: Path) -> None:
    """Raise UserError, with their number and the first one, when images of questions are missing."""
    missing = sorted({q.image for q in questions if q.image is not None and not (image_folder / q.image).is_file()})
    if missing:
        raise UserError(
            f"{len(missing)} images of the question file are missing, the first one {image_folder / missing[0]}. "
            "--image_folder names the folder that the paths in the question file are relative to."
        )


def answer_questions(
    questions: Sequence[Question],
    generate_batch: GenerateBatch,
    *,
    image_folder: Path,
    answers_path: Path,
    model_id: str,
    fingerprint: str,
    batch_size: int,
    blind: bool = False,
    description: str = "answers",
) -> list[str]:
    """Generate an answer to every question and write them in LLaVA's answer format, in the order of the questions.

    Answers that the file already holds are kept when they were made by the same weights (`fingerprint`), in the same
    way (`blind`) and for the same wording; all others are made anew.

    Returns:
        one generated text per question.
    """
    metadata = {"blind": blind, "fingerprint": fingerprint}
    records = _kept_records(answers_path, questions, metadata)
    open_positions = [position for position, record in enumerate(records) if record is None]
    num_kept = len(questions) - len(open_positions)
    if num_kept:
        logger.info("%s: %d of %d answers are there already", answers_path, num_kept, len(questions))
    _rewrite(answers_path, filter(None, records))
    with (
        answers_path.open("a", encoding="utf-8") as file,
        tqdm(total=len(questions), initial=num_kept, desc=description, unit=" questions") as progress,
    ):
        for start in range(0, len(open_positions), batch_size):
            positions = open_positions[start : start + batch_size]
            batch = [questions[position] for position in positions]
            texts = generate_batch([question_messages(question, image_folder, blind) for question in batch])
            for position, question, text in zip(positions, batch, texts, strict=True):
                records[position] = _answer_record(question, text, model_id, metadata)
                file.write(_json_line(records[position]))
            file.flush()
            progress.update(len(batch))
    if open_positions != list(range(num_kept, len(questions))):
        _rewrite(answers_path, records)  # scorers of LLaVA's go by the order
    return [record["text"] for record in records]


def read_answers(path: Path) -> dict[str | int, str]:
    """Generated text by question_id from an answer file, LLaVA's own included.

    Raises:
        UserError: the file is absent, or a line is not a JSON object with question_id and text.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such answer file.")
    answers = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        record = _parse_record(line)
        if record is None:
            raise UserError(
                f"{path}, line {number}: expected a JSON object with question_id and text, found {line[:80]}"
            )
        answers[record["question_id"]] = record["text"]
    return answers


def _answer_record(question: Question, text: str, model_id: str, metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        "question_id": question.question_id,
        "prompt": question.text,
        "text": text,
        "answer_id": uuid.uuid4().hex,
        "model_id": model_id,
        "metadata": metadata,
    }


def _kept_records(path: Path, questions: Sequence[Question], metadata: dict[str, Any]) -> list[dict[str, Any] | None]:
    """What the file holds for each question; None where it has to be answered."""
    if not path.is_file():
        return [None] * len(questions)
    # A line cut short by an interruption parses to None and is made anew.
    found = [_parse_record(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    by_question: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    for record in reversed([record for record in found if record is not None and record.get("metadata") == metadata]):
        by_question.setdefault((record["question_id"], record.get("prompt")), []).append(record)
    waiting = (by_question.get((question.question_id, question.text), []) for question in questions)
    return [records.pop() if records else None for records in waiting]


def _parse_record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        return None
    return record if isinstance(record.get("question_id"), str | int) else None


def _rewrite(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(_json_line(record) for record in records), encoding="utf-8")
    os.replace(temporary, path)


def _json_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
