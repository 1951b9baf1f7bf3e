"""What'sUp (Kamath et al., 2023, arXiv:2310.19785): which of two or four sentences says where things are?

The sentences differ in the preposition alone. Controlled A and B are photographs of the same two objects in each of
four arrangements; COCO and GQA are pairs of sentences about one object or two. The data set was made for models that
compare images with texts. Here the sentences become options, in an order that a hash of the question decides, since the
data always has the right one first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError

from ._base import Answer, Metric, Requirement, Task, TaskQuestion, TaskResult
from ._files import read_json, required
from ._matching import match_labels
from ._options import LETTERS, list_options, read_letter
from ._scoring import grouped, mean_metric, mean_rows
from ._sources import COCO_IMAGES, OPTION_LETTER

QUESTION = "Which sentence describes the image?"
REPOSITORY = "https://github.com/amitakamath/whatsup_vlms (links to its data are in README.md)"


@dataclass(frozen=True)
class _Source:
    """Annotations and images of one split; `id_digits` is how COCO and Visual Genome write an image's number."""

    annotations: str
    images: str
    id_digits: int | None = None
    image_source: str = REPOSITORY


_COCO = f"{COCO_IMAGES}/val2017.zip"
_GENOME = "https://homes.cs.washington.edu/~ranjay/visualgenome, all images in one folder"
SOURCES = {
    "controlled_a": _Source("controlled_images_dataset.json", "controlled_images"),
    "controlled_b": _Source("controlled_clevr_dataset.json", "controlled_clevr"),
    "coco_one": _Source("coco_qa_one_obj.json", "val2017", 12, _COCO),
    "coco_two": _Source("coco_qa_two_obj.json", "val2017", 12, _COCO),
    "gqa_one": _Source("vg_qa_one_obj.json", "vg_images", 0, _GENOME),
    "gqa_two": _Source("vg_qa_two_obj.json", "vg_images", 0, _GENOME),
}
RELATION_WORDS = {"left": "horizontal", "right": "horizontal", "on": "vertical", "under": "vertical"} | {
    "front": "depth",
    "behind": "depth",
}


@dataclass(frozen=True)
class Example:
    """An image with sentences, the right one first."""

    image: str
    sentences: tuple[str, ...]

    @property
    def arrangement(self) -> tuple[str, str, str]:
        """(first object, relation, second object) from a controlled image's name: `mug_left_of_plate.jpeg`."""
        parts = self.image.rpartition(".")[0].split("_")
        return parts[0], "_".join(parts[1:-1]), parts[-1]


def shuffled_options(example: Example, index: int) -> tuple[list[str], str]:
    """The sentences in an order that does not tell the answer and never changes, and the right one's letter."""
    ordered = sorted(
        example.sentences, key=lambda each: hashlib.sha256(f"{index}/{example.image}/{each}".encode()).digest()
    )
    return ordered, LETTERS[ordered.index(example.sentences[0])]


def group_metrics(examples: Sequence[Example], is_right: Sequence[float]) -> tuple[Metric, ...]:
    """Pairs (left and right, or another opposition) and sets of the same objects that are right as a whole."""
    arrangements = [example.arrangement for example in examples]
    pairs = grouped(((a, b, _opposition(relation)) for a, relation, b in arrangements), is_right)
    sets = grouped(((a, b) for a, _, b in arrangements), is_right)
    return (
        mean_metric("pair accuracy", [float(all(each)) for each in pairs.values()]),
        mean_metric("set accuracy", [float(all(each)) for each in sets.values()]),
    )


def _opposition(relation: str) -> str:
    words = relation.replace("-", "_").split("_")
    return next((RELATION_WORDS[word] for word in words if word in RELATION_WORDS), relation)


class WhatsUp(Task):
    """Accuracy on six sets; on the controlled ones also of pairs and sets of images."""

    name = "whatsup"
    title = "What'sUp"
    folder_name = "whatsup"
    splits = default_splits = tuple(SOURCES)

    def requirements(self, folder: Path, split: str) -> list[Requirement]:
        """The set's annotations and images."""
        source = SOURCES[split]
        return [
            Requirement(path=folder / source.annotations, source=REPOSITORY),
            Requirement(path=folder / source.images, source=source.image_source, purpose="images"),
        ]

    def questions(self, folder: Path, split: str) -> list[TaskQuestion]:
        """Each image with its sentences as options; the relation is the category of a controlled one."""
        questions = []
        for index, example in enumerate(self._examples(folder, split)):
            options, _ = shuffled_options(example, index)
            text = f"{list_options(QUESTION, options)}\n{OPTION_LETTER}"
            questions.append(
                TaskQuestion(
                    question_id=index,
                    text=text,
                    prompt=text,
                    images=(folder / SOURCES[split].images / example.image,),
                    category=example.arrangement[1] if split.startswith("controlled") else "default",
                )
            )
        return questions

    def score(self, folder: Path, split: str, answers: Sequence[Answer]) -> TaskResult:
        """Share of images whose right sentence was chosen."""
        examples = dict(enumerate(self._examples(folder, split)))
        questions = self.questions(folder, split)
        matched = match_labels(questions, answers, lambda each: examples.get(each.question_id), split)
        is_right, unread = [], 0
        for question, example, text in zip(matched.questions, matched.labels, matched.texts, strict=True):
            options, right_letter = shuffled_options(example, question.question_id)
            letter = None if text is None else read_letter(text, options)
            unread += letter is None and text is not None
            is_right.append(float(letter == right_letter))
        is_controlled = split.startswith("controlled")
        return TaskResult(
            task=self.name,
            split=split,
            metrics=(
                mean_metric("accuracy", is_right),
                *(group_metrics(matched.labels, is_right) if is_controlled else ()),
            ),
            rows=mean_rows(grouped((q.category for q in matched.questions), is_right)) if is_controlled else (),
            exclusions=matched.exclusions,
            notes=(f"answers that name none of the options, counted as wrong: {unread}",),
        )

    def _examples(self, folder: Path, split: str) -> list[Example]:
        source = SOURCES[split]
        path = folder / source.annotations
        return [
            _example(record, source.id_digits, f"{path}, entry {number}")
            for number, record in enumerate(read_json(path, list))
        ]


def _example(record: Any, id_digits: int | None, place: str) -> Example:
    """Read a controlled image's object, or [image number, right sentence, wrong sentence] of COCO and GQA."""
    if id_digits is None:
        image = required(record, "image_path", place, str)
        return _checked(image.rpartition("/")[2], required(record, "caption_options", place, list), place)
    if not isinstance(record, list) or len(record) != 3:
        raise UserError(f"{place}: expected [image number, right sentence, wrong sentence], found {record!r}")
    number, right, wrong = record
    return _checked(f"{str(number).zfill(id_digits)}.jpg", [right, wrong], place)


def _checked(image: str, sentences: Sequence[Any], place: str) -> Example:
    if not 2 <= len(sentences) <= len(LETTERS) or not all(isinstance(sentence, str) for sentence in sentences):
        raise UserError(f"{place}: expected two to {len(LETTERS)} sentences, found {sentences!r}")
    return Example(image, tuple(sentences))


TASK = WhatsUp()
