"""TextVQA (Singh et al., 2019, arXiv:1904.08920): questions about what is written in an image.

LLaVA's published numbers come from prompts that hold the words that an OCR system found. The same questions without
them say what the model reads by itself; both are run by default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError

from ._base import Answer, Requirement, Task, TaskQuestion, TaskResult
from ._files import read_json, read_task_questions, required
from ._matching import match_labels, unasked
from ._scoring import mean_metric
from ._sources import EVAL_ZIP
from ._vqa_answers import human_answers, vqa_score

QUESTION_FILE = "llava_textvqa_val_v051_ocr.jsonl"
ANNOTATION_FILE = "TextVQA_0.5.1_val.json"
OCR_LINE = "Reference OCR token:"

_OCR_FIRST = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)

Annotations = Mapping[tuple[str, str], Mapping[str, Any]]
"""Annotations by image and lower-cased question; trailing spaces count."""


def question_of_prompt(prompt: str, place: str = "prompt") -> str:
    """The lower-cased question that a prompt asks: LLaVA's scorer knows a question by its words.

    Three shapes are known: `OCR tokens: ... Question: Q Short answer:`, three lines of which one is a `Reference OCR
    token:` line, and two lines with the question in the first.

    Raises:
        UserError: another shape.
    """
    lines = prompt.split("\n")
    stated = _OCR_FIRST.search(prompt) if prompt.startswith("OCR tokens: ") else None
    if stated is not None:
        question = stated.group(1)
    elif not prompt.startswith("OCR tokens: ") and f"{OCR_LINE} " in prompt and len(lines) == 3:
        question = lines[1] if prompt.startswith(OCR_LINE) else lines[0]
    elif not prompt.startswith("OCR tokens: ") and len(lines) == 2:
        question = lines[0]
    else:
        raise UserError(
            f"{place}: cannot tell the question in {prompt[:80]!r}; expected 'question\\ninstruction', with or without "
            f"a line '{OCR_LINE} ...', or 'OCR tokens: ... Question: ... Short answer:'"
        )
    return question.lower()


def read_annotations(path: Path) -> dict[tuple[str, str], Mapping[str, Any]]:
    """TextVQA's annotations by image and question.

    Raises:
        UserError: the file is absent or malformed.
    """
    records = required(read_json(path, dict), "data", str(path), list)
    return {
        (required(record, "image_id", f"{path}, entry {i}", str), _question_of(record, f"{path}, entry {i}")): record
        for i, record in enumerate(records)
    }


def _question_of(record: Mapping[str, Any], place: str) -> str:
    return required(record, "question", place, str).lower()


def annotation_key(answer: Answer, place: str) -> tuple[str, str]:
    """Image and question of an answer, whose question_id is the image's; errors as `question_of_prompt`."""
    return str(answer.question_id), question_of_prompt(answer.prompt, place)


def score_answer(answer: Answer, annotations: Annotations, place: str) -> float:
    """Soft accuracy, in [0, 1], of one answer; its question_id is the image's.

    Raises:
        UserError: no annotation is about this image and question, or it has not ten answers.
    """
    key = annotation_key(answer, place)
    if key not in annotations:
        raise UserError(f"{place}: image {key[0]!r} has no annotated question {key[1]!r}")
    return _annotation_score(answer.text, annotations[key], place)


def _annotation_score(text: str, annotation: Mapping[str, Any], place: str) -> float:
    place = f"{place}: image {annotation['image_id']!r}, question {annotation['question']!r}"
    return vqa_score(text, human_answers(annotation, place), place)


def without_ocr_tokens(question: TaskQuestion) -> TaskQuestion:
    """The same question without the line of OCR tokens."""
    text = "\n".join(line for line in question.text.split("\n") if not line.startswith(OCR_LINE))
    return replace(question, text=text, prompt=text)


class TextVQA(Task):
    """Soft accuracy on the validation questions, with the OCR system's words in the prompt and without."""

    name = "textvqa"
    title = "TextVQA"
    folder_name = "textvqa"
    splits = default_splits = ("val_ocr", "val_no_ocr")

    def requirements(self, folder: Path, split: str) -> list[Requirement]:
        """LLaVA's question file; images and annotations of TextVQA's site."""
        site = "https://dl.fbaipublicfiles.com/textvqa"
        return [
            Requirement(path=folder / QUESTION_FILE, source=EVAL_ZIP),
            Requirement(path=folder / "train_images", source=f"{site}/images/train_val_images.zip", purpose="images"),
            Requirement(path=folder / ANNOTATION_FILE, source=f"{site}/data/{ANNOTATION_FILE}", purpose="score"),
        ]

    def questions(self, folder: Path, split: str) -> list[TaskQuestion]:
        """LLaVA's question file, the OCR lines left out for val_no_ocr."""
        questions = read_task_questions(folder / QUESTION_FILE, folder / "train_images")
        return questions if split == "val_ocr" else [without_ocr_tokens(question) for question in questions]

    def score(self, folder: Path, split: str, answers: Sequence[Answer]) -> TaskResult:
        """Soft accuracy over all questions that are annotated."""
        path = folder / ANNOTATION_FILE
        annotations = read_annotations(path)
        questions = self.questions(folder, split)

        def key_of(question: TaskQuestion) -> tuple[str, str]:
            return str(question.question_id), question_of_prompt(question.prompt, str(folder / QUESTION_FILE))

        matched = match_labels(questions, answers, lambda each: annotations.get(key_of(each)), str(path))
        scores = [
            0.0 if text is None else _annotation_score(text, annotation, str(path))
            for annotation, text in zip(matched.labels, matched.texts, strict=True)
        ]
        return TaskResult(
            task=self.name,
            split=split,
            metrics=(mean_metric("accuracy", scores),),
            exclusions=matched.exclusions + unasked(annotations, map(key_of, questions), path),
        )


TASK = TextVQA()
