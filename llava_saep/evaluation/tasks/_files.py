"""Reading what benchmarks publish and what models answered, with errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError
from llava_saep.evaluation.questions import NOT_JSON, as_task_question, read_questions
from llava_saep.evaluation.words import encodable

from ._base import Answer, TaskQuestion


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, with or without a byte order mark.

    Raises:
        UserError: the file is absent or no UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. `llava-saep eval doctor` says where to get it.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def read_json(path: Path, kind: type) -> Any:
    """Content of a JSON file, which must be a `kind` (list or dict).

    Raises:
        UserError: the file is absent, no JSON, or holds something else.
    """
    try:
        content = json.loads(read_text(path))
    except NOT_JSON as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, kind):
        raise UserError(f"{path}: expected a JSON {kind.__name__}, found {type(content).__name__}")
    return content


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file with one JSON object per line.

    Raises:
        UserError: the file is absent, or a line is no JSON object.
    """
    records = []
    for place, record in _parsed_lines(path):
        if record is None:
            raise UserError(f"{place}: expected a JSON object")
        records.append(record)
    return records


def _parsed_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """(place, object) per line that is not blank; None for what is no JSON object."""
    # Not splitlines: it also cuts at characters such as U+2028, which JSON leaves inside of texts.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except NOT_JSON:
            record = None
        yield f"{path}, line {number}", record if isinstance(record, dict) else None


_KIND_WORDS = {str: "a text", list: "a list", dict: "an object", int: "a whole number"}
ID = (str, int)
"""Kinds of value that number questions and images."""


def required(record: Any, name: str, place: str, kind: type | tuple[type, ...] = object) -> Any:
    """A field of a JSON object.

    Raises:
        UserError: the record is no object, lacks the field, or the value is not a `kind`; begins with `place`.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{place}: expected an object with {name!r}, found {type(record).__name__}")
    if name not in record:
        raise UserError(f"{place}: lacks {name!r}; it has {', '.join(map(repr, list(record)[:10])) or 'nothing'}")
    value = record[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not object):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        words = " or ".join(_KIND_WORDS.get(each, each.__name__) for each in kinds)
        raise UserError(f"{place}: {name} must be {words}, found {value!r}")
    return value


@dataclass(frozen=True)
class AnswerFile:
    """Answers in the order of their lines, and how many lines could not be read."""

    answers: tuple[Answer, ...]
    num_broken_lines: int


def read_answer_file(path: Path) -> AnswerFile:
    """Read an answer file and count the lines that are no JSON, as LLaVA's converters do.

    Raises:
        UserError: the file is absent, a JSON line lacks question_id or text, or all lines are those of a question file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of answers")
    parsed = list(_parsed_lines(path))
    answers = tuple(_answer(record, place) for place, record in parsed if record is not None)
    if answers and all(_is_question(answer.fields) for answer in answers):
        raise UserError(
            f"{path}: holds questions, with {', '.join(map(repr, answers[0].fields))}; expected answers to them, with "
            "question_id and text, and what programs that answer add, such as prompt or answer_id"
        )
    return AnswerFile(answers, len(parsed) - len(answers))


def _is_question(record: Mapping[str, Any]) -> bool:
    """Whether a line names its picture, and nothing that programs which answer write beside the text of an answer."""
    return "image" in record and not record.keys() & {"prompt", "answer_id", "model_id", "metadata"}


def read_answers(path: Path) -> list[Answer]:
    """Answers of a file, LLaVA's or ours, in the order of its lines.

    Raises:
        UserError: the file is absent, a line is no JSON object with question_id and text, or all are questions.
    """
    file = read_answer_file(path)
    if file.num_broken_lines:
        read_json_lines(path)  # names the first line that is broken
    return list(file.answers)


def _answer(record: dict[str, Any], place: str) -> Answer:
    question_id, text = required(record, "question_id", place, ID), required(record, "text", place, str)
    if "round_id" in record:
        required(record, "round_id", place, int)
    prompt = record.get("prompt", "")
    return Answer(
        question_id=encodable(question_id) if isinstance(question_id, str) else question_id,
        text=encodable(text),
        prompt=encodable(prompt) if isinstance(prompt, str) else "",
        fields=record,
    )


def read_task_questions(path: Path, image_folder: Path) -> list[TaskQuestion]:
    """Questions of one of LLaVA's question files, images below `image_folder`; errors as `read_questions`."""
    return [as_task_question(question, image_folder) for question in read_questions(path, ids_are_unique=False)]


def write_json(path: Path, content: Any, indent: int | None = None) -> Path:
    """Write a JSON file, folders included, and return its path; errors as `write_text`."""
    return write_text(path, json.dumps(content, indent=indent))


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object per line, folders included, and return the path; errors as `write_text`."""
    return write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def write_text(path: Path, text: str) -> Path:
    """Write a file, folders included, and return its path; errors as `writing`."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise UserError where the file cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); name another place") from error
