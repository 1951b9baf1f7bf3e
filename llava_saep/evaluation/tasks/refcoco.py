"""RefCOCO, RefCOCO+ and RefCOCOg (Kazemzadeh et al., 2014; Mao et al., 2016): where is what an expression refers to?

A box is four numbers of text between 0 and 1, as in LLaVA-1.5's training data, and right when its intersection over
union with the labelled one is at least 0.5. LLaVA-1.5's numbers belong to the image after it was padded to a square
(`--image_aspect_ratio pad`); of a model that sees the image otherwise they may belong to the image itself. Both
readings are reported, the padded one first. The wording is that of LLaVA's training data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_saep.errors import UserError

from ._base import Answer, Requirement, Task, TaskQuestion, TaskResult
from ._files import read_json_lines, required
from ._matching import match_labels
from ._scoring import mean_metric
from ._sources import COCO_IMAGES

PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: "
MIN_IOU = 0.5

_BOX = re.compile(r"[\[(]\s*" + r"\s*,\s*".join([r"(-?\d*\.?\d+)"] * 4) + r"\s*[\])]")


class Box(NamedTuple):
    """Left, top, right, bottom."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        """0 for a box that is turned inside out."""
        return max(0.0, self.right - self.left) * max(0.0, self.bottom - self.top)


def parse_box(text: str) -> Box | None:
    """The first box in an answer, `[0.1, 0.2, 0.5, 0.9]`; None without one whose numbers are between 0 and 1."""
    found = _BOX.search(text)
    if found is None:
        return None
    box = Box(*map(float, found.groups()))
    return box if all(0 <= value <= 1 for value in box) else None


def intersection_over_union(first: Box, second: Box) -> float:
    """Shared area of two boxes as a part of what they cover together, in [0, 1]; 0 for two empty ones."""
    shared = Box(
        max(first.left, second.left),
        max(first.top, second.top),
        min(first.right, second.right),
        min(first.bottom, second.bottom),
    ).area
    union = first.area + second.area - shared
    return shared / union if union > 0 else 0.0


def box_in_pixels(box: Box, width: int, height: int, padded: bool) -> Box:
    """A box of numbers in [0, 1] in pixels of the image.

    Args:
        padded: the numbers belong to the image with margins on its shorter sides that make it a square.
    """
    if not padded:
        return Box(box.left * width, box.top * height, box.right * width, box.bottom * height)
    side = max(width, height)
    # Floors as the padding does: an odd margin is larger at the bottom and at the right.
    x_margin, y_margin = (side - width) // 2, (side - height) // 2
    return Box(
        box.left * side - x_margin, box.top * side - y_margin, box.right * side - x_margin, box.bottom * side - y_margin
    )


class RefCOCO(Task):
    """Accuracy at an intersection over union of 0.5, in eight sets of expressions."""

    name = "refcoco"
    title = "RefCOCO/+/g"
    folder_name = "refcoco"
    splits = default_splits = (
        "refcoco_val",
        "refcoco_testA",
        "refcoco_testB",
        "refcoco+_val",
        "refcoco+_testA",
        "refcoco+_testB",
        "refcocog_val",
        "refcocog_test",
    )

    def requirements(self, folder: Path, split: str) -> list[Requirement]:
        """A file of expressions with boxes in pixels, and COCO's training images of 2014."""
        source = (
            f"{split}.jsonl as Qwen-VL's evaluation guide publishes it "
            "(https://github.com/QwenLM/Qwen-VL/blob/master/eval_mm/EVALUATION.md): lines of image, sent, bbox "
            "[left, top, right, bottom], width, height"
        )
        return [
            Requirement(path=folder / f"{split}.jsonl", source=source),
            Requirement(path=folder / "train2014", source=f"{COCO_IMAGES}/train2014.zip", purpose="images"),
        ]

    def questions(self, folder: Path, split: str) -> list[TaskQuestion]:
        """Each expression with LLaVA's request for a box."""
        return [_question(record, index, folder, place) for index, (record, place) in self._records(folder, split)]

    def score(self, folder: Path, split: str, answers: Sequence[Answer]) -> TaskResult:
        """Accuracy with the numbers read as of the padded image, and as of the image."""
        records = dict(self._records(folder, split))
        matched = match_labels(
            self.questions(folder, split), answers, lambda question: records.get(question.question_id), split
        )
        boxes = [None if text is None else parse_box(text) for text in matched.texts]
        unread = sum(box is None and text is not None for box, text in zip(boxes, matched.texts, strict=True))
        hits = {
            padded: [
                float(box is not None and _hits(box, record, padded, place))
                for box, (record, place) in zip(boxes, matched.labels, strict=True)
            ]
            for padded in (True, False)
        }
        return TaskResult(
            task=self.name,
            split=split,
            metrics=(
                mean_metric("accuracy, boxes of the padded image", hits[True]),
                mean_metric("accuracy, boxes of the image", hits[False]),
            ),
            exclusions=matched.exclusions,
            notes=(f"answers without a box of numbers between 0 and 1, counted as wrong: {unread}",),
        )

    def _records(self, folder: Path, split: str) -> list[tuple[int, tuple[dict[str, Any], str]]]:
        path = folder / f"{split}.jsonl"
        return [(i, (record, f"{path}, record {i}")) for i, record in enumerate(read_json_lines(path))]


def _question(record: Mapping[str, Any], index: int, folder: Path, place: str) -> TaskQuestion:
    text = PROMPT + required(record, "sent", place, str)
    image = folder / "train2014" / Path(required(record, "image", place, str)).name
    return TaskQuestion(question_id=index, text=text, prompt=text, images=(image,))


def _hits(box: Box, record: Mapping[str, Any], padded: bool, place: str) -> bool:
    numbers = required(record, "bbox", place, list)
    if len(numbers) != 4 or not all(isinstance(number, int | float) for number in numbers):
        raise UserError(f"{place}: bbox must be [left, top, right, bottom] in pixels, found {numbers!r}")
    width, height = (required(record, name, place, int) for name in ("width", "height"))
    return intersection_over_union(box_in_pixels(box, width, height, padded), Box(*numbers)) >= MIN_IOU


TASK = RefCOCO()
