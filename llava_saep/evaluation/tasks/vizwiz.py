"""VizWiz-VQA (Gurari et al., 2018, arXiv:1802.08218): questions that blind people asked about their photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError

from ._base import Answer, Requirement, Task, TaskQuestion, TaskResult
from ._files import ID, read_json, read_json_lines, read_task_questions, required, write_json
from ._matching import match_labels, texts_by_id
from ._scoring import grouped, mean_metric, mean_rows
from ._sources import EVAL_ZIP, SHORT_ANSWER
from ._vqa_answers import human_answers, normalize_vqa_answer, vqa_score

QUESTION_FILE = "llava_test.jsonl"
VAL_FILE = "val.json"
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
"""LLaVA's instruction in front of the one for short answers."""


def upload_records(
    questions: Sequence[Mapping[str, Any]], texts: Mapping[str, str], place: str
) -> list[dict[str, str]]:
    """The challenge's upload: a normalised answer per image, in the order of the question file.

    Args:
        texts: answer by question_id as a text.
    Raises:
        UserError: a question has no answer; an incomplete upload is refused by the challenge.
    """
    ids = [required(question, "question_id", place, ID) for question in questions]
    missing = [each for each in ids if str(each) not in texts]
    if missing:
        raise UserError(
            f"{place}: {len(missing)} of {len(questions)} questions have no answer, the first one {missing[0]!r}; "
            "an upload must answer all"
        )
    return [
        {"image": required(each, "image", place, str), "answer": normalize_vqa_answer(texts[str(each["question_id"])])}
        for each in questions
    ]


class VizWiz(Task):
    """Short answers, uploaded for test, scored here for val."""

    name = "vizwiz"
    title = "VizWiz"
    folder_name = "vizwiz"
    splits = ("test", "val")
    default_splits = ("test",)
    hidden_label_splits = ("test",)

    def requirements(self, folder: Path, split: str) -> list[Requirement]:
        """LLaVA's question file and the images; for val, the official annotations."""
        site = "https://vizwiz.cs.colorado.edu/VizWiz_final"
        questions = (
            Requirement(path=folder / QUESTION_FILE, source=EVAL_ZIP)
            if split == "test"
            else Requirement(path=folder / VAL_FILE, source=f"{site}/vqa_data/Annotations.zip")
        )
        return [questions, Requirement(path=folder / split, source=f"{site}/images/{split}.zip", purpose="images")]

    def questions(self, folder: Path, split: str) -> list[TaskQuestion]:
        """LLaVA's question file; for val, the official questions with LLaVA's instructions."""
        if split == "test":
            return read_task_questions(folder / QUESTION_FILE, folder / "test")
        return [
            _val_question(record, folder, f"{folder / VAL_FILE}, entry {number}")
            for number, record in enumerate(read_json(folder / VAL_FILE, list))
        ]

    def score(self, folder: Path, split: str, answers: Sequence[Answer]) -> TaskResult:
        """Soft accuracy on val, overall and by type of answer."""
        if split == "test":
            raise UserError("vizwiz:test: the labels are hidden; EvalAI scores the upload file (challenge 1911)")
        path = folder / VAL_FILE
        questions = self.questions(folder, split)  # refuses entries without an image
        by_image = {record["image"]: record for record in read_json(path, list)}
        matched = match_labels(questions, answers, lambda each: by_image.get(each.question_id), str(path))
        scores = [
            0.0 if text is None else _score(text, record, f"{path}: {record['image']}")
            for record, text in zip(matched.labels, matched.texts, strict=True)
        ]
        return TaskResult(
            task=self.name,
            split=split,
            metrics=(mean_metric("accuracy", scores),),
            rows=mean_rows(grouped((str(record.get("answer_type", "unknown")) for record in matched.labels), scores)),
            exclusions=matched.exclusions,
        )

    def export(self, folder: Path, split: str, answers: Sequence[Answer], output: Path) -> list[Path]:
        """The challenge's upload file for test."""
        if split != "test":
            return []
        path = folder / QUESTION_FILE
        records = upload_records(read_json_lines(path), texts_by_id(answers), str(path))
        return [write_json(output / "vizwiz_test_upload.json", records)]


def _val_question(record: Mapping[str, Any], folder: Path, place: str) -> TaskQuestion:
    image, text = required(record, "image", place, str), required(record, "question", place, str)
    prompt = text + UNANSWERABLE + SHORT_ANSWER
    return TaskQuestion(question_id=image, text=prompt, prompt=prompt, images=(folder / "val" / image,))


def _score(text: str, record: Mapping[str, Any], place: str) -> float:
    return vqa_score(text, human_answers(record, place), place)


TASK = VizWiz()
