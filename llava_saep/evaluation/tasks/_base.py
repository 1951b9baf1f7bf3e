"""The contract of a benchmark: its questions as LLaVA words them, its score, and its upload files.

A task reads files and hands plain values to pure scoring functions, so that programs under LLaVA's names can call the
same functions on files of their own. It never opens an image and never sees a model.
"""

from __future__ import annotations

import base64
import binascii
import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from PIL import Image

from llava_saep.errors import UserError

DATA_ROOT = Path("playground/data/eval")
"""The folder of LLaVA's Evaluation guide that holds one folder per benchmark."""
SHORT_ANSWER_TOKENS = 128
"""Limit of LLaVA's model_vqa_loader, which its scripts use where an answer is a word or a phrase."""
LONG_ANSWER_TOKENS = 1024
"""Limit of LLaVA's model_vqa, model_vqa_mmbench and model_vqa_science."""


@dataclass(frozen=True)
class EmbeddedImage:
    """An image that stands in the question file itself, base64 as MMBench's tables have it."""

    base64_text: str = field(repr=False)
    place: str = ""

    def open(self) -> Image.Image:
        """Decode to an RGB image.

        LLaVA leaves the mode as it is, which makes palette images lose their colours when they are padded.

        Raises:
            UserError: the text is not base64, or as `load_image`; says in which line.
        """
        from llava_saep.data.images import load_image  # brings transformers' PIL code, which --help shall not wait for

        try:
            content = base64.b64decode(self.base64_text)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"{self.place}: the embedded image is not base64 ({error})") from error
        return load_image(io.BytesIO(content), name=f"{self.place}, the embedded image")


ImageSource = Path | EmbeddedImage


@dataclass(frozen=True, kw_only=True)
class TaskQuestion:
    """One question to a model, in one turn: the images, then `text`.

    `prompt` is what the answer line stores, word for word: LLaVA's scorers read it. It differs from `text` where LLaVA
    appends an instruction that it does not store. `answer_fields` go into the answer line as they are.
    """

    question_id: str | int
    text: str
    prompt: str
    images: tuple[ImageSource, ...] = ()
    category: str = "default"
    answer_fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        """What an answer is matched by: id, prompt and round. Several questions may share one (TextVQA's ids)."""
        return str(self.question_id), self.prompt, int(self.answer_fields.get("round_id", 0))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One line of an answer file, LLaVA's or ours; `fields` holds the whole line."""

    question_id: str | int
    text: str
    prompt: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def round_id(self) -> int:
        """Which rotation of the options was asked (MMBench); 0 where there is one."""
        return int(self.fields.get("round_id", 0))

    @property
    def key(self) -> tuple[str, str, int]:
        """As `TaskQuestion.key`."""
        return str(self.question_id), self.prompt, self.round_id


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of a result.

    `value` is a proportion in [0, 1] where `unit` is "share", else in points. `n` counts what it was computed from.
    `interval` is the 95 % interval over questions, in the unit of `value`; None where none is sensible. A value of
    None says that the metric is not defined for these answers (the precision of a model that never says yes).
    """

    name: str
    value: float | None
    n: int
    unit: Literal["share", "points"] = "share"
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class CategoryRow:
    """The metrics of one kind of question."""

    category: str
    metrics: tuple[Metric, ...]


ExclusionEffect = Literal["counted as wrong", "left out", "ignored", "scored all the same"]


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """Questions or answers that were not scored as they stand, or that a reader should know of.

    `effect` says what became of them: "counted as wrong" keeps the denominator, "left out" makes it smaller, "ignored"
    concerns answers that belong to no question, "scored all the same" changes nothing.
    """

    reason: str
    count: int
    effect: ExclusionEffect
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a set of answers reached on one split. `metrics[0]` is the number that papers quote."""

    task: str
    split: str
    metrics: tuple[Metric, ...]
    rows: tuple[CategoryRow, ...] = ()
    exclusions: tuple[Exclusion, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """A file or folder that a task reads. `source` says how to get it; `purpose` what cannot be done without it."""

    path: Path
    source: str
    purpose: Literal["questions", "images", "score"] = "questions"


class Task(ABC):
    """A benchmark.

    `splits` are its sets of questions, each with its own answer file; `default_splits` are those that `--task NAME`
    runs, others are named as `NAME:SPLIT`. `folder_name` is its folder in LLaVA's layout (playground/data/eval/...).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    folder_name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    default_splits: ClassVar[tuple[str, ...]]
    max_new_tokens: ClassVar[int] = SHORT_ANSWER_TOKENS
    hidden_label_splits: ClassVar[tuple[str, ...]] = ()

    def has_labels(self, split: str) -> bool:
        """Whether answers can be scored here; if not, `export` writes what is to be uploaded."""
        return split not in self.hidden_label_splits

    @abstractmethod
    def requirements(self, folder: Path, split: str) -> list[Requirement]:
        """What has to be in the task's folder, whether it is there or not."""

    @abstractmethod
    def questions(self, folder: Path, split: str) -> list[TaskQuestion]:
        """All questions of a split, in the order of LLaVA's question file.

        Raises:
            UserError: a file is absent or malformed.
        """

    @abstractmethod
    def score(self, folder: Path, split: str, answers: Sequence[Answer]) -> TaskResult:
        """Score answers; what is missing, doubled or unknown is counted in the result's exclusions.

        Raises:
            UserError: a file is absent or malformed, annotations do not match the questions, or the labels of this
                split are hidden.
        """

    def export(self, folder: Path, split: str, answers: Sequence[Answer], output: Path) -> list[Path]:
        """Write the official answer or upload files below `output`; empty where the benchmark has none.

        Raises:
            UserError: as `score`, or an answer is missing that an upload must have.
        """
        return []


@dataclass(frozen=True, kw_only=True)
class JudgeRequest:
    """One question to the judge; `record` holds what the review line keeps beside the judge's reply.

    `system` is empty where the benchmark sends no system message.
    """

    question_id: str | int
    system: str
    user: str
    record: Mapping[str, Any]
    max_tokens: int
    temperature: float


@dataclass(frozen=True, kw_only=True)
class Review:
    """The judge's reply to one request; `record` is the request's. `reply` None: the judge failed on it."""

    question_id: str | int
    reply: str | None
    record: Mapping[str, Any]


class JudgedTask(Task):
    """A benchmark whose free answers a language model rates. `score` says how to run the judge."""

    @abstractmethod
    def judge_requests(self, folder: Path, split: str, answers: Sequence[Answer]) -> list[JudgeRequest]:
        """What to ask the judge, in the order of the questions; those without an answer are not put to it.

        Raises:
            UserError: a file is absent or malformed, or annotations do not match the questions.
        """

    @abstractmethod
    def review_line(self, review: Review) -> dict[str, Any]:
        """The line of the review file, in the benchmark's published format; unreadable replies get LLaVA's -1."""

    @abstractmethod
    def misfits(self, folder: Path, split: str, answers: Sequence[Answer]) -> tuple[Exclusion, ...]:
        """What of answers and annotations belongs to no question, or is replaced; `score_reviews` counts the missing.

        Raises:
            UserError: as `judge_requests`.
        """

    @abstractmethod
    def score_reviews(self, folder: Path, split: str, lines: Sequence[Mapping[str, Any]]) -> TaskResult:
        """Sum up the lines of a review file; failed, unreadable and missing reviews are counted in the exclusions."""

    def score(self, folder: Path, split: str, answers: Sequence[Answer]) -> TaskResult:
        """Raise UserError: answers of this task are rated by a judge."""
        raise UserError(
            f"{self.name}: answers are rated by a language model; name one with --judge-url and --judge-model"
        )
