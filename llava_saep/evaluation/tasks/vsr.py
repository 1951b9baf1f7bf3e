"""VSR (Liu et al., 2022, arXiv:2205.00363): is what a sentence says about where things are true of the image?

The data set has no official wording for models that answer in text; this is ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError

from ._base import Answer, Requirement, Task, TaskQuestion, TaskResult
from ._files import read_json_lines, required
from ._matching import match_labels
from ._scoring import grouped, mean_metric, mean_rows, share_metric
from ._sources import SHORT_ANSWER

_VERDICT = re.compile(r"\b(true|yes|correct|false|no|not|incorrect|wrong)\b", re.IGNORECASE)
_AGREEING = ("true", "yes", "correct")


def parse_verdict(text: str) -> bool | None:
    """What the first word of agreement or denial says; None where there is none."""
    verdict = _VERDICT.search(text)
    return None if verdict is None else verdict.group(1).lower() in _AGREEING


class VSR(Task):
    """True or false, on the split whose concepts are unseen in its training part and on the random one."""

    name = "vsr"
    title = "VSR"
    folder_name = "vsr"
    splits = ("zeroshot_test", "zeroshot_dev", "random_test", "random_dev")
    default_splits = ("zeroshot_test",)

    def _file(self, folder: Path, split: str) -> Path:
        family, _, part = split.partition("_")
        return folder / family / f"{part}.jsonl"

    def requirements(self, folder: Path, split: str) -> list[Requirement]:
        """The split's file, and COCO's images by their numbers."""
        repository = "https://github.com/cambridgeltl/visual-spatial-reasoning"
        family = split.partition("_")[0]
        return [
            Requirement(path=self._file(folder, split), source=f"{repository}, data/splits/{family}"),
            Requirement(path=folder / "images", source=f"{repository}, data/README.md", purpose="images"),
        ]

    def questions(self, folder: Path, split: str) -> list[TaskQuestion]:
        """Each sentence with the question whether it is true; the relation is the category."""
        path = self._file(folder, split)
        return [
            _question(record, folder, index, f"{path}, record {index}")
            for index, record in enumerate(read_json_lines(path))
        ]

    def score(self, folder: Path, split: str, answers: Sequence[Answer]) -> TaskResult:
        """Accuracy, the share of answers "true", and accuracy by relation."""
        path = self._file(folder, split)
        labels = {i: _label(record, f"{path}, record {i}") for i, record in enumerate(read_json_lines(path))}
        matched = match_labels(
            self.questions(folder, split), answers, lambda question: labels.get(question.question_id), str(path)
        )
        verdicts = [None if text is None else parse_verdict(text) for text in matched.texts]
        is_right = [float(verdict == label) for verdict, label in zip(verdicts, matched.labels, strict=True)]
        read = [verdict for verdict in verdicts if verdict is not None]
        unread = len([text for text in matched.texts if text is not None]) - len(read)
        return TaskResult(
            task=self.name,
            split=split,
            metrics=(mean_metric("accuracy", is_right), share_metric("true ratio", sum(read), len(read))),
            rows=mean_rows(grouped((question.category for question in matched.questions), is_right)),
            exclusions=matched.exclusions,
            notes=(f"answers that neither agree nor deny, counted as wrong: {unread}",),
        )


def _question(record: Mapping[str, Any], folder: Path, index: int, place: str) -> TaskQuestion:
    caption, image = required(record, "caption", place, str), required(record, "image", place, str)
    text = f'Is this statement about the image true or false? "{caption}"{SHORT_ANSWER}'
    return TaskQuestion(
        question_id=index,
        text=text,
        prompt=text,
        images=(folder / "images" / image,),
        category=str(record.get("relation", "default")),
    )


def _label(record: Mapping[str, Any], place: str) -> bool:
    label = required(record, "label", place)
    if label not in (0, 1):
        raise UserError(f"{place}: label must be 0 or 1, found {label!r}")
    return bool(label)


TASK = VSR()
