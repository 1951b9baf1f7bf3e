"""GQA (Hudson and Manning, 2019, arXiv:1902.09506): compositional questions about scenes, exact match."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._base import Answer, CategoryRow, Requirement, Task, TaskQuestion, TaskResult
from ._files import read_json, read_task_questions, required, write_json
from ._matching import match_labels, unasked
from ._scoring import grouped, mean_metric, mean_rows
from ._sources import EVAL_ZIP

QUESTION_FILE = "llava_gqa_testdev_balanced.jsonl"
ANNOTATION_FILE = "testdev_balanced_questions.json"
PREDICTION_FILE = "testdev_balanced_predictions.json"


def normalize_gqa_answer(text: str) -> str:
    """What LLaVA hands to GQA's scorer: lower case, periods at the end removed, and nothing else (not even spaces)."""
    return text.rstrip(".").lower()


def prediction_records(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The official prediction file, in the order of the answers."""
    return [{"questionId": each.question_id, "prediction": normalize_gqa_answer(each.text)} for each in answers]


class GQA(Task):
    """Accuracy on the balanced test-dev questions."""

    name = "gqa"
    title = "GQA"
    folder_name = "gqa"
    splits = default_splits = ("testdev_balanced",)

    def requirements(self, folder: Path, split: str) -> list[Requirement]:
        """LLaVA's question file; images and annotations of GQA's own site."""
        page = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
        return [
            Requirement(path=folder / QUESTION_FILE, source=EVAL_ZIP),
            Requirement(path=folder / "data" / "images", source=f"images.zip of {page}", purpose="images"),
            Requirement(
                path=folder / "data" / ANNOTATION_FILE,
                source=f"questions1.2.zip of {page}, extracted to {folder / 'data'}",
                purpose="score",
            ),
        ]

    def questions(self, folder: Path, split: str) -> list[TaskQuestion]:
        """LLaVA's question file."""
        return read_task_questions(folder / QUESTION_FILE, folder / "data" / "images")

    def score(self, folder: Path, split: str, answers: Sequence[Answer]) -> TaskResult:
        """Accuracy as GQA's eval.py counts it: overall, open and binary questions, and by structure."""
        path = folder / "data" / ANNOTATION_FILE
        annotations = read_json(path, dict)
        questions = self.questions(folder, split)
        matched = match_labels(questions, answers, lambda each: annotations.get(str(each.question_id)), str(path))
        is_right = [
            float(text is not None and normalize_gqa_answer(text) == required(annotation, "answer", str(path), str))
            for annotation, text in zip(matched.labels, matched.texts, strict=True)
        ]
        return TaskResult(
            task=self.name,
            split=split,
            metrics=(mean_metric("accuracy", is_right),),
            rows=_rows(matched.labels, is_right),
            exclusions=matched.exclusions + unasked(annotations, (str(q.question_id) for q in questions), path),
        )

    def export(self, folder: Path, split: str, answers: Sequence[Answer], output: Path) -> list[Path]:
        """The prediction file that GQA's own eval.py reads."""
        return [write_json(output / PREDICTION_FILE, prediction_records(answers))]


def _rows(annotations: Sequence[dict[str, Any]], is_right: Sequence[float]) -> tuple[CategoryRow, ...]:
    structures = [
        str(annotation["types"]["structural"]) if _has_structure(annotation) else "unknown"
        for annotation in annotations
    ]
    forms = ["open" if structure == "query" else "binary" for structure in structures]
    return mean_rows(grouped(forms, is_right)) + mean_rows(grouped(structures, is_right))


def _has_structure(annotation: dict[str, Any]) -> bool:
    types = annotation.get("types")
    return isinstance(types, dict) and "structural" in types


TASK = GQA()
