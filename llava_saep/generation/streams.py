"""Answers that come piece by piece: what a reader sees of one, and how text is cut before a stop string."""

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

FinishReason = Literal["stop", "length", "cancelled", "time_limit"]

NOT_AT_ITS_END = "the answer has not come to its end; read it to the end or close it first"
"""What `AnswerStream.statistics` says too early."""


@dataclass(frozen=True, kw_only=True)
class AnswerStatistics:
    """What one answer took.

    Attributes:
        prompt_tokens: of the whole conversation, images included.
        image_tokens: of all images of the prompt.
        cached_tokens: of the prompt, taken from the key-value cache of earlier turns.
        completion_tokens: written by the model, the one that ended the answer included.
        finish_reason: "stop": the model ended its answer; "length": `max_new_tokens` were reached; "cancelled": the
            reader closed the stream, or an error ended it; "time_limit": `max_seconds` were over.
        waiting_seconds: for the model, while others were answered.
        first_token_seconds: from the start of work, after waiting, to the first token; 0 without any.
        seconds: from the start of work to the last token.
    """

    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: FinishReason
    waiting_seconds: float
    first_token_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """The rate of decoding: tokens after the first by the time after the first; 0 where there is one at most."""
        decoding_seconds = self.seconds - self.first_token_seconds
        if self.completion_tokens < 2 or decoding_seconds <= 0:
            return 0.0
        return (self.completion_tokens - 1) / decoding_seconds


class AnswerStream(Iterator[str]):
    """One answer's text in pieces, as the model writes it; a context manager that closes it.

    An error of the model's is raised to the reader after the pieces that came before it.
    """

    @abstractmethod
    def __next__(self) -> str:
        """Wait for the next piece of text; pieces are never empty."""

    @abstractmethod
    def close(self) -> None:
        """Stop the model and return when it has stopped; pieces not yet read are lost. Calling it twice is harmless."""

    @property
    @abstractmethod
    def statistics(self) -> AnswerStatistics:
        """What the answer took.

        Raises:
            RuntimeError: it has not come to its end yet, nor was it closed.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PieceTimes:
    """When the pieces of an answer came, for the streams of models that run elsewhere, whose tokens nobody counts here.

    Args:
        asked: monotonic time of the question.
    Attributes:
        num_pieces: that have come.
    """

    def __init__(self, asked: float):
        self.num_pieces = 0
        self._asked = self._first = self._last = asked

    def note_piece(self) -> None:
        """Note that a piece has come."""
        self._last = time.monotonic()
        if self.num_pieces == 0:
            self._first = self._last
        self.num_pieces += 1

    @property
    def first_piece_seconds(self) -> float:
        """From the question to the first piece; 0 without any."""
        return self._first - self._asked

    @property
    def seconds(self) -> float:
        """From the question to the last piece; 0 without any."""
        return self._last - self._asked


class StopStringFilter:
    """Passes text on as far as it cannot be the beginning of a stop string, and ends before one.

    Attributes:
        has_stopped: a stop string came; nothing is passed on any more.
    """

    def __init__(self, stop_strings: Sequence[str]):
        self.stop_strings = tuple(stop_strings)
        self.has_stopped = False
        self._pending = ""
        self._at_start = True

    def feed(self, piece: str) -> str:
        """Take a piece of text and return what can be shown; white space at the start of the answer is dropped."""
        if self.has_stopped:
            return ""
        self._pending += piece.lstrip() if self._at_start else piece
        self._at_start = self._at_start and not self._pending
        cut = min((self._pending.index(stop) for stop in self.stop_strings if stop in self._pending), default=None)
        if cut is not None:
            self.has_stopped = True
            return self._pending[:cut].rstrip()
        keep = max((_overlap(self._pending, stop) for stop in self.stop_strings), default=0)
        ready = self._pending[: len(self._pending) - keep]
        self._pending = self._pending[len(self._pending) - keep :]
        return ready

    def flush(self) -> str:
        """Return what was held back, when no more text comes."""
        rest, self._pending = "" if self.has_stopped else self._pending, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
