"""Answers to questions: in batches, on one rank or several, written as they come so that a killed run can go on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from tqdm import tqdm

from llava_saep.errors import UserError
from llava_saep.evaluation import ranks
from llava_saep.evaluation.answer_files import (
    Record,
    answer_record,
    claimed,
    json_line,
    part_of_rank,
    refuse_other_files,
    set_aside_others,
    stored_answers,
    write_together,
)
from llava_saep.evaluation.batches import Batch, BatchQueue, batches_of_rank, plan_batches
from llava_saep.evaluation.image_loading import ImageLoader, OpenImage, UnreadableImage, open_image
from llava_saep.evaluation.tasks import TaskQuestion

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
GenerateBatch = Callable[[list[Messages]], list[str]]
"""Conversations -> one generated text each, in their order; `Predictor.generate` with its options bound."""
PromptLengths = Callable[[Sequence[TaskQuestion]], list[int]]
BadImagePolicy = Literal["exclude", "error"]

_NO_MEMORY = ("can't allocate memory", "out of memory")
"""What PyTorch says of it in a RuntimeError: the CPU's allocator, and libraries of a GPU."""
_SECONDS_BETWEEN_LINES = 30
_WHERE_IMAGES_ARE = (
    "--image-folder names the folder that the paths in a question file are relative to, --data-dir the one with the "
    "folders of the benchmarks; llava-saep eval --on-bad-image exclude leaves such questions out."
)
"""Where no terminal redraws the progress bar."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How questions are put to a model.

    Args:
        generate_batch: answers conversations that hold PIL images.
        batch_size: how many at once; fewer from the moment when they do not fit into memory.
        blind: leave the images out and change nothing else.
        open_image: makes a PIL image of a path, or of one that stands in the question file.
        prompt_lengths: tokens of questions' prompts, images included; None: questions keep their order.
        on_bad_image: what becomes of a question that cannot be put, since its image will not open or its prompt is
            longer than the model's context. "exclude": it gets no answer, and is reported.
    """

    generate_batch: GenerateBatch
    batch_size: int
    blind: bool = False
    open_image: OpenImage = open_image
    prompt_lengths: PromptLengths | None = None
    on_bad_image: BadImagePolicy = "exclude"


@dataclass(frozen=True, kw_only=True)
class ExcludedQuestion:
    """A question that could not be put, and why."""

    position: int
    question_id: str | int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One record per question, None for those that were excluded."""

    records: tuple[Record | None, ...]
    excluded: tuple[ExcludedQuestion, ...] = ()

    @property
    def texts(self) -> list[str | None]:
        """The generated texts."""
        return [None if record is None else record["text"] for record in self.records]


def question_messages(question: TaskQuestion, images: Sequence[Any]) -> Messages:
    """The one-turn conversation that puts a question: images first, as LLaVA has them."""
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question.text}]
    return [{"role": "user", "content": content}]


def absent_images(questions: Iterable[TaskQuestion]) -> list[Path]:
    """Image files of questions that are not there."""
    files = {image for question in questions for image in question.images if isinstance(image, Path)}
    return sorted(file for file in files if not file.is_file())


def check_images(questions: Iterable[TaskQuestion], *, advice: str = _WHERE_IMAGES_ARE) -> None:
    """Raise UserError, with their number, the first one and advice, when images of questions are missing."""
    missing = absent_images(questions)
    if missing:
        raise UserError(f"{len(missing)} images of the questions are missing, the first one {missing[0]}. {advice}")


def answer_questions(
    questions: Sequence[TaskQuestion],
    asking: Asking,
    *,
    answers_path: Path,
    model_id: str,
    fingerprint: str,
    description: str = "answers",
) -> Answers | None:
    """Generate an answer to every question and write them in LLaVA's answer format, in the order of the questions.

    Answers that the file already holds, or that ranks of an interrupted run left beside it, are kept when they were
    made in the same way (`fingerprint`, `asking.blind`) and to the same wording; all others are made anew. Those made
    in another way, or to other questions, are moved to a file beside it.

    Args:
        fingerprint: changes with whatever changes answers: weights, template, decoding.
    Returns:
        the answers on rank 0, None on others.
    Raises:
        UserError: a question cannot be put and `asking.on_bad_image` is "error", not even one question fits into
            memory, another rank has ended early, or another evaluation is writing the file.
    """
    from llava_saep.train import distributed

    rank, num_ranks = distributed.rank(), distributed.world_size()
    metadata = {"blind": asking.blind, "fingerprint": fingerprint}

    def make_record(position: int, text: str) -> Record:
        return answer_record(questions[position], text, model_id, metadata)

    with ExitStack() as held:

        def plan() -> list[Batch]:
            held.enter_context(claimed(answers_path))  # by rank 0 for all of them
            return _plan(questions, asking, answers_path, metadata, num_ranks)

        batches = ranks.from_rank_zero(plan)
        own = batches_of_rank(batches, rank, num_ranks)
        num_kept = len(questions) - sum(map(len, batches))
        path = answers_path if num_ranks == 1 else part_of_rank(answers_path, rank)
        with path.open("a", encoding="utf-8") as file, _progress(description, own, rank, num_ranks, num_kept) as bar:
            run = _Run(questions, asking, own, make_record, file, bar)
            run.answer_all()
        excluded = [each for some in ranks.gather(run.excluded) for each in some]
        if not distributed.is_rank_zero():
            return None
        return _put_together(questions, answers_path, metadata, excluded)


def _plan(
    questions: Sequence[TaskQuestion], asking: Asking, path: Path, metadata: dict[str, Any], num_ranks: int
) -> list[Batch]:
    """Put what interrupted runs have left into one file, and the open questions into batches."""
    refuse_other_files(path)
    num_others = set_aside_others(path, metadata)
    if num_others:
        logger.warning("%s: %d answers were made in another way; they are kept in files beside it", path, num_others)
    stored = stored_answers(path, questions, metadata)
    if stored.num_to_set_aside:
        logger.warning(
            "%s: %d answers are to other questions; they are kept in a file beside it", path, stored.num_to_set_aside
        )
    write_together(path, stored, metadata)
    open_positions = [position for position, record in enumerate(stored.kept) if record is None]
    if len(open_positions) < len(questions):
        logger.info(
            "%s: %d of %d answers are there already", path, len(questions) - len(open_positions), len(questions)
        )
    open_questions = [questions[position] for position in open_positions]
    lengths = asking.prompt_lengths(open_questions) if asking.prompt_lengths else [0] * len(open_questions)
    batches = plan_batches(lengths, asking.batch_size, num_ranks=num_ranks)
    return [tuple(open_positions[index] for index in batch) for batch in batches]


def _put_together(
    questions: Sequence[TaskQuestion], path: Path, metadata: dict[str, Any], excluded: Sequence[ExcludedQuestion]
) -> Answers:
    stored = stored_answers(path, questions, metadata)
    write_together(path, stored, metadata)  # scorers of LLaVA's go by the order
    records = stored.kept
    left_out = {each.position for each in excluded}
    lost = [position for position, record in enumerate(records) if record is None and position not in left_out]
    if lost:
        raise UserError(
            f"{path}: {len(lost)} of {len(questions)} answers are missing, the first one to question "
            f"{questions[lost[0]].question_id!r}. All ranks must write to one folder; is it on a disk that all share? "
            "Give the same command again to answer what is missing."
        )
    if excluded and len(excluded) == len(questions):
        raise UserError(
            f"none of the {len(questions)} questions could be put, the first one {excluded[0].question_id!r}: "
            f"{excluded[0].reason}"
        )
    if excluded:
        first = min(excluded, key=lambda each: each.position)
        logger.warning(
            "%d of %d questions got no answer, the first one %r: %s",
            len(excluded),
            len(questions),
            first.question_id,
            first.reason,
        )
    return Answers(records=tuple(records), excluded=tuple(sorted(excluded, key=lambda each: each.position)))


@contextmanager
def _progress(description: str, own: Sequence[Batch], rank: int, num_ranks: int, num_kept: int) -> Iterator[tqdm]:
    """A bar with the time that is left; with several ranks, that of rank 0's share, which is as long as the others'."""
    mine = sum(map(len, own))
    initial = num_kept if num_ranks == 1 else 0
    with tqdm(
        total=mine + initial,
        initial=initial,
        desc=description if num_ranks == 1 else f"{description}, rank 0 of {num_ranks}",
        unit=" questions",
        disable=rank != 0,
        mininterval=0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES,
    ) as progress:
        yield progress


@dataclass(frozen=True)
class _OutOfMemory:
    """A batch did not fit."""


@dataclass(frozen=True)
class _Refused:
    """At least one question of a batch cannot be put: its image cannot be prepared, or its prompt is too long."""

    reason: str


@dataclass
class _Run:
    """One rank's batches on their way to the answer file."""

    questions: Sequence[TaskQuestion]
    asking: Asking
    batches: Sequence[Batch]
    make_record: Callable[[int, str], Record]
    file: TextIO
    progress: tqdm
    excluded: list[ExcludedQuestion] = field(default_factory=list)

    def answer_all(self) -> None:
        """Answer batch by batch; each is on the disk before the next one is begun."""
        queue = BatchQueue(self.batches)
        with ImageLoader([] if self.asking.blind else self.questions, self.asking.open_image) as loader:
            while batch := queue.take():
                conversations = self._conversations(batch, loader)
                if not self.asking.blind:
                    loader.start(queue.peek())
                self._answer(conversations, queue)

    def _conversations(self, batch: Batch, loader: ImageLoader) -> dict[int, Messages]:
        """What to ask by position, without the questions whose images will not open."""
        images: list[Any] = [[]] * len(batch) if self.asking.blind else loader.take(batch)
        readable = {}
        for position, opened in zip(batch, images, strict=True):
            if isinstance(opened, UnreadableImage):
                self._exclude(position, opened.reason)
            else:
                readable[position] = question_messages(self.questions[position], opened)
        return readable

    def _answer(self, conversations: dict[int, Messages], queue: BatchQueue) -> None:
        """Answer a batch, or put its questions back in smaller ones."""
        positions = tuple(conversations)
        if not positions:
            return
        outcome = self._generate(list(conversations.values()))
        if isinstance(outcome, list):
            self._write(positions, outcome)
        elif isinstance(outcome, _OutOfMemory):
            self._make_batches_smaller(positions, queue)
        elif len(positions) > 1:
            queue.put_back_singly(positions)
        else:
            self._exclude(positions[0], outcome.reason)

    def _generate(self, conversations: list[Messages]) -> list[str] | _OutOfMemory | _Refused:
        # What went wrong is returned: as long as an exception is handled, it keeps the tensors of its frames.
        try:
            return self.asking.generate_batch(conversations)
        except UserError as error:
            return _Refused(str(error))
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            return _OutOfMemory()

    def _write(self, positions: Batch, texts: Sequence[str]) -> None:
        records = [self.make_record(position, text) for position, text in zip(positions, texts, strict=True)]
        self.file.write("".join(map(json_line, records)))
        self.file.flush()
        self.progress.update(len(positions))

    def _make_batches_smaller(self, positions: Batch, queue: BatchQueue) -> None:
        if len(positions) == 1:
            raise ranks.RankError(
                f"question {self.questions[positions[0]].question_id!r} does not fit into memory even alone; shorten "
                "answers (--max-new-tokens), load the model in 4 or 8 bits, or use a device with more memory"
            )
        queue.put_back_halved(positions)
        _free_cached_memory()
        logger.warning(
            "%d questions at once do not fit into memory; going on with %d", len(positions), queue.largest_size
        )

    def _exclude(self, position: int, reason: str) -> None:
        question_id = self.questions[position].question_id
        if self.asking.on_bad_image == "error":
            raise ranks.RankError(
                f"question {question_id!r}: {reason}. --on_bad_image exclude leaves such questions out"
            )
        self.excluded.append(ExcludedQuestion(position=position, question_id=question_id, reason=reason))
        logger.debug("question %r is left out: %s", question_id, reason)
        self.progress.update(1)


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in _NO_MEMORY)


def _free_cached_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
