"""Spatial scenes: questions about where things are in generated images, the data set that comes with this project.

Scored are the last words of a freely generated answer, which may state its evidence first.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from llava_saep.errors import UserError
from llava_saep.evaluation.metrics import chance_accuracy, ends_with_answer
from llava_saep.evaluation.questions import Question, read_questions

from ._base import Answer, CategoryRow, Metric, Requirement, Task, TaskQuestion, TaskResult
from ._files import read_task_questions
from ._matching import match_labels
from ._scoring import grouped, mean_metric


class SpatialScenes(Task):
    """Accuracy per kind of question, beside that of giving each kind's most frequent answer always."""

    name = "spatial_scenes"
    title = "Spatial scenes"
    folder_name = "spatial_scenes"
    splits = default_splits = ("held_out",)
    max_new_tokens = 64

    def requirements(self, folder: Path, split: str) -> list[Requirement]:
        """What the generator writes."""
        source = f"python -m playground.spatial_scenes --output {shlex.quote(str(folder))}"
        return [
            Requirement(path=folder / split / "questions.jsonl", source=source),
            Requirement(path=folder / split / "images", source=source, purpose="images"),
        ]

    def questions(self, folder: Path, split: str) -> list[TaskQuestion]:
        """The generator's question file."""
        return read_task_questions(folder / split / "questions.jsonl", folder / split / "images")

    def score(self, folder: Path, split: str, answers: Sequence[Answer]) -> TaskResult:
        """Share of answers that end with the right words, overall and per kind."""
        path = folder / split / "questions.jsonl"
        asked = read_questions(path)
        unlabelled = [question.question_id for question in asked if question.answer is None]
        if unlabelled:
            raise UserError(f"{path}: {len(unlabelled)} questions have no `answer`, the first one {unlabelled[0]!r}")
        by_id = {question.question_id: question for question in asked}
        matched = match_labels(
            self.questions(folder, split), answers, lambda question: by_id.get(question.question_id), str(path)
        )
        is_right = [
            float(text is not None and ends_with_answer(text, question.answer or ""))
            for question, text in zip(matched.labels, matched.texts, strict=True)
        ]
        pairs = list(zip(matched.labels, is_right, strict=True))
        kinds = grouped((question.category for question, _ in pairs), pairs)
        return TaskResult(
            task=self.name,
            split=split,
            metrics=(mean_metric("accuracy", is_right), _chance(matched.labels)),
            rows=tuple(
                CategoryRow(
                    category=kind,
                    metrics=(mean_metric("accuracy", [right for _, right in each]), _chance([q for q, _ in each])),
                )
                for kind, each in kinds.items()
            ),
            exclusions=matched.exclusions,
        )


def _chance(questions: Sequence[Question]) -> Metric:
    return Metric(name="constant answer", value=chance_accuracy(questions), n=len(questions))


TASK = SpatialScenes()
