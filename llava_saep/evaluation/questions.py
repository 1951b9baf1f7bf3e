"""The question file: one JSON object per line, LLaVA's fields plus the words that a right answer ends with."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError
from llava_saep.evaluation.tasks import TaskQuestion
from llava_saep.evaluation.words import normalized_words

NOT_JSON = (ValueError, RecursionError)
"""What json raises on a text that is none; numbers of thousands of digits and deep nesting have their own errors."""
DEFAULT_CATEGORY = "default"
"""What LLaVA's own question files call their one category."""
DEFAULT_MAX_NEW_TOKENS = 64
"""For answers to question files of one's own; benchmarks have limits of their own."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One line of a question file.

    `image` is a path relative to the image folder, or None for a question about text alone.
    `answer` holds the final words of a right answer, or None when the question is not to be scored.
    """

    question_id: str | int
    text: str
    image: str | None = None
    category: str = DEFAULT_CATEGORY
    answer: str | None = None
    reference: str | None = None


def as_task_question(question: Question, image_folder: Path) -> TaskQuestion:
    """A line of a question file as a benchmark would put it."""
    return TaskQuestion(
        question_id=question.question_id,
        text=question.text,
        prompt=question.text,
        images=() if question.image is None else (image_folder / question.image,),
        category=question.category,
    )


def read_questions(path: Path, *, ids_are_unique: bool = True) -> list[Question]:
    """Read a question file, in the order of its lines.

    Args:
        ids_are_unique: False for files such as LLaVA's of TextVQA and MME, where several questions about one image
            have the image's name for a question_id.
    Raises:
        UserError: the file is absent or empty; a line is not a JSON object, lacks a field, or repeats a question_id.
    """
    try:
        # Not splitlines: it also cuts at characters such as U+2028, which JSON leaves inside of texts.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. --question-file names a file with one JSON object per line.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    questions = [_parse_question(line, f"{path}, line {number}") for number, line in numbered]
    if not questions:
        raise UserError(f"{path}: holds no questions; expected one JSON object per line.")
    if ids_are_unique:
        _refuse_repeated_ids(questions, path)
    return questions


def _refuse_repeated_ids(questions: Iterable[Question], path: Path) -> None:
    seen: set[str] = set()
    for question in questions:
        if str(question.question_id) in seen:
            raise UserError(f"{path}: question_id {question.question_id!r} occurs twice; answers are matched by it.")
        seen.add(str(question.question_id))


def _parse_question(line: str, place: str) -> Question:
    try:
        record = json.loads(line)
    except NOT_JSON as error:
        raise UserError(f"{place}: is not JSON ({error}). A question file holds one JSON object per line.") from error
    if not isinstance(record, Mapping):
        raise UserError(f"{place}: expected a JSON object with question_id and text, found {type(record).__name__}.")
    question_id = record.get("question_id")
    if isinstance(question_id, bool) or not isinstance(question_id, str | int):
        raise UserError(f"{place}: question_id must be a string or an integer, found {question_id!r}.")
    answer = _text_field(record, "answer", place)
    if answer is not None and not normalized_words(answer):
        raise UserError(f"{place}: answer {answer!r} holds no word to compare with. Leave it out to score nothing.")
    return Question(
        question_id=question_id,
        text=_text_field(record, "text", place, required=True),
        image=_text_field(record, "image", place),
        category=_category(record, place),
        answer=answer,
        reference=_text_field(record, "reference", place),
    )


def _category(record: Mapping[str, Any], place: str) -> str:
    value = record.get("category")
    # LLaVA reads no category, so that files made for it may number theirs.
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text_field(record, "category", place) or DEFAULT_CATEGORY


def _text_field(record: Mapping[str, Any], name: str, place: str, required: bool = False) -> Any:
    value = record.get(name)
    if value is None and not required:
        return None
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: {name} must be a text that is not empty, found {value!r}.")
    return value
