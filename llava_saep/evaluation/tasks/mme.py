"""MME (Fu et al., 2023, arXiv:2306.13394): two yes-or-no questions per image, in ten kinds of perception and four of
cognition.

The reading of answers and the score are those of the official calculation.py: `yes` or `no` within the first four
characters (`know` is a no); per kind 100 times accuracy plus 100 times the share of images with both answers right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from llava_saep.errors import UserError

from ._base import Answer, CategoryRow, Metric, Requirement, Task, TaskQuestion, TaskResult
from ._files import read_task_questions, read_text, write_text
from ._matching import match_answers, match_labels, unasked
from ._scoring import share_metric
from ._sources import EVAL_ZIP

QUESTION_FILE = "llava_mme.jsonl"
IMAGE_FOLDER = "MME_Benchmark_release_version"
PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
QUESTIONS_PER_IMAGE = 2

_SEPARATORS = re.compile(r"[\t\r\n]")
_INSTRUCTIONS = ("Answer the question using a single word or phrase.", "Please answer yes or no.")


def parse_mme_answer(text: str) -> Literal["yes", "no", "other"]:
    """The official reading: what the first four characters hold."""
    head = text.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def bare_question(text: str) -> str:
    """A question without the instructions around it and with single spaces: LLaVA's file and MME's differ in these."""
    for instruction in _INSTRUCTIONS:
        text = text.replace(instruction, "")
    return " ".join(text.split())


def score_kind(is_right: Mapping[str, Sequence[bool]]) -> tuple[float, float]:
    """(accuracy, accuracy+) of one kind, in [0, 1], from what is right per image."""
    flat = [each for both in is_right.values() for each in both]
    return sum(flat) / len(flat), sum(all(both) for both in is_right.values()) / len(is_right)


def read_labels(folder: Path) -> dict[tuple[str, str, str], str]:
    """(kind, stem of the image, bare question) -> "yes" or "no", from MME's text files beside the images.

    Raises:
        UserError: the folder is absent, or a line is not a question and its answer with a tab between.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. `llava-saep eval doctor` says where to get it.")
    labels = {}
    for kind in (*PERCEPTION, *COGNITION):
        own_folder = folder / kind / "questions_answers_YN"
        for path in sorted((own_folder if own_folder.is_dir() else folder / kind).glob("*.txt")):
            for number, line in enumerate(read_text(path).split("\n"), 1):
                if line.strip():
                    question, label = _parse_label(line, f"{path}, line {number}")
                    labels[kind, path.stem, question] = label
    return labels


def _parse_label(line: str, place: str) -> tuple[str, str]:
    question, tab, label = line.strip().partition("\t")
    if not tab or label.strip().lower() not in ("yes", "no"):
        raise UserError(f"{place}: expected a question, a tab, and Yes or No, found {line[:80]!r}")
    return bare_question(question), label.strip().lower()


class MME(Task):
    """Points for perception (of 2000) and cognition (of 800)."""

    name = "mme"
    title = "MME"
    folder_name = "MME"
    splits = default_splits = ("test",)

    def requirements(self, folder: Path, split: str) -> list[Requirement]:
        """LLaVA's question file, and MME's folder with images and labels."""
        page = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation (on request)"
        return [
            Requirement(path=folder / QUESTION_FILE, source=EVAL_ZIP),
            Requirement(path=folder / IMAGE_FOLDER, source=page, purpose="images"),
            *(
                Requirement(path=folder / IMAGE_FOLDER / kind, source=page, purpose="score")
                for kind in (*PERCEPTION, *COGNITION)
            ),
        ]

    def questions(self, folder: Path, split: str) -> list[TaskQuestion]:
        """LLaVA's question file; the kind is the category."""
        return read_task_questions(folder / QUESTION_FILE, folder / IMAGE_FOLDER)

    def score(self, folder: Path, split: str, answers: Sequence[Answer]) -> TaskResult:
        """Perception and cognition points, and accuracy and accuracy+ per kind."""
        labels, place = read_labels(folder / IMAGE_FOLDER), str(folder / IMAGE_FOLDER)
        questions = self.questions(folder, split)
        matched = match_labels(questions, answers, lambda question: labels.get(_label_key(question)), place)
        readings = [None if text is None else parse_mme_answer(text) for text in matched.texts]
        is_right = [reading == label for reading, label in zip(readings, matched.labels, strict=True)]
        images = _by_image(matched.questions, is_right)
        return TaskResult(
            task=self.name,
            split=split,
            metrics=_totals(images),
            rows=tuple(_kind_row(kind, images[kind]) for kind in (*PERCEPTION, *COGNITION) if kind in images),
            exclusions=matched.exclusions + unasked(labels, map(_label_key, questions), place),
            notes=_notes(images, readings.count("other")),
        )

    def export(self, folder: Path, split: str, answers: Sequence[Answer], output: Path) -> list[Path]:
        """The files that MME's calculation.py reads: per kind, lines of image, question, label and answer."""
        labels = read_labels(folder / IMAGE_FOLDER)
        questions = self.questions(folder, split)
        texts = match_answers(questions, answers).texts
        lines: dict[str, list[str]] = {}
        for question, text in zip(questions, texts, strict=True):
            kind, stem, bare = key = _label_key(question)
            if key in labels:
                # One line per answer: a line break in an answer would shift all that follow. No character is taken out,
                # for the first four are what is read.
                fields = (f"{stem}.txt", bare, labels[key].capitalize(), _SEPARATORS.sub(" ", text or ""))
                lines.setdefault(kind, []).append("\t".join(fields) + "\n")
        target = output / "mme_results"
        return [write_text(target / f"{kind}.txt", "".join(own)) for kind, own in lines.items()]


def _label_key(question: TaskQuestion) -> tuple[str, str, str]:
    parts = str(question.question_id).split("/")
    return parts[0], parts[-1].split(".")[0], bare_question(question.prompt)


def _by_image(questions: Sequence[TaskQuestion], is_right: Sequence[bool]) -> dict[str, dict[str, list[bool]]]:
    """Kind -> image -> whether each of its questions was answered rightly."""
    images: dict[str, dict[str, list[bool]]] = {}
    for question, right in zip(questions, is_right, strict=True):
        kind, stem, _ = _label_key(question)
        images.setdefault(kind, {}).setdefault(stem, []).append(right)
    return images


def _totals(images: Mapping[str, Mapping[str, Sequence[bool]]]) -> tuple[Metric, ...]:
    metrics = []
    for name, kinds in (("perception", PERCEPTION), ("cognition", COGNITION)):
        scored = [kind for kind in kinds if kind in images]
        points = sum(100 * share for kind in scored for share in score_kind(images[kind]))
        n = sum(len(both) for kind in scored for both in images[kind].values())
        metrics.append(Metric(name=name, value=points if scored else None, n=n, unit="points"))
    return tuple(metrics)


def _kind_row(kind: str, images: Mapping[str, Sequence[bool]]) -> CategoryRow:
    accuracy, accuracy_plus = score_kind(images)
    num_questions = sum(len(both) for both in images.values())
    return CategoryRow(
        category=kind,
        metrics=(
            Metric(name="score", value=100 * (accuracy + accuracy_plus), n=num_questions, unit="points"),
            share_metric("accuracy", sum(map(sum, images.values())), num_questions),
            share_metric("accuracy+", sum(map(all, images.values())), len(images)),
        ),
    )


def _notes(images: Mapping[str, Mapping[str, Sequence[bool]]], num_other: int) -> tuple[str, ...]:
    missing = [kind for kind in (*PERCEPTION, *COGNITION) if kind not in images]
    uneven = [
        f"{kind}/{stem}"
        for kind, each in images.items()
        for stem, both in each.items()
        if len(both) != QUESTIONS_PER_IMAGE
    ]
    notes = [f"answers that are neither yes nor no: {num_other}"]
    if missing:
        notes.append(f"kinds without a question, which lowers the sums: {', '.join(missing)}")
    if uneven:
        notes.append(f"images that have not {QUESTIONS_PER_IMAGE} labelled questions: {len(uneven)}, as {uneven[0]}")
    return tuple(notes)


TASK = MME()
