"""One answer in the making: what its reader and the model's thread share, and what watches the model as it writes."""

import dataclasses
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from transformers import StoppingCriteria, TextStreamer

from llava_saep.generation.options import GenerationOptions
from llava_saep.generation.predictor import Prompt
from llava_saep.generation.streams import (
    NOT_AT_ITS_END,
    AnswerStatistics,
    AnswerStream,
    FinishReason,
    StopStringFilter,
)


class Answer:
    """One answer in the making: what its reader and the model's thread share.

    It knows nothing of its reader, so that a reader who is gone is noticed.

    Args:
        image_keys: one per image of the prompt, equal for equal content.
    """

    def __init__(
        self, prompt: Prompt, image_keys: Sequence[str], options: GenerationOptions, max_seconds: float | None
    ):
        self.prompt = prompt
        self.image_keys = list(image_keys)
        self.options = options
        self.max_seconds = max_seconds
        self.cancelled = threading.Event()
        self.pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.error: Exception | None = None
        self.finish_reason: FinishReason = "cancelled"
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.asked = time.monotonic()
        self.started = self.first_token = self.last_token = 0.0
        self.statistics: AnswerStatistics | None = None

    def finish(self) -> None:
        """Sum up, and tell the reader that there is no more."""
        self.statistics = AnswerStatistics(
            prompt_tokens=len(self.prompt.input_ids),
            image_tokens=self.prompt.num_image_tokens,
            cached_tokens=self.num_cached_tokens,
            completion_tokens=self.num_tokens,
            finish_reason=self.finish_reason,
            waiting_seconds=self.started - self.asked,
            first_token_seconds=self.first_token - self.started if self.num_tokens else 0.0,
            seconds=self.last_token - self.started if self.num_tokens else 0.0,
        )
        self.prompt = dataclasses.replace(self.prompt, images=[])  # a reader may keep the statistics for long
        self.pieces.put(None)


class LocalAnswerStream(AnswerStream):
    """What a local engine hands to the reader of one answer; left alone it is closed."""

    def __init__(self, answer: Answer, work: Future):
        self._answer = answer
        self._work = work
        self._has_ended = False

    def __next__(self) -> str:
        """Wait for the next piece of text; errors as the class says."""
        piece = None if self._has_ended else self._answer.pieces.get()
        if piece is not None:
            return piece
        self._has_ended = True
        error, self._answer.error = self._answer.error, None
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Stop the model and return when it has stopped."""
        self._answer.cancelled.set()
        self._has_ended = True
        if not self._work.cancel():
            self._work.result()  # waits; the answer holds its errors itself
        elif self._answer.statistics is None:  # its turn never came
            self._answer.started = time.monotonic()
            self._answer.finish()

    @property
    def statistics(self) -> AnswerStatistics:
        """What the answer took; see `AnswerStream.statistics`."""
        if self._answer.statistics is None:
            raise RuntimeError(NOT_AT_ITS_END)
        return self._answer.statistics

    def __del__(self) -> None:
        self._answer.cancelled.set()


class PieceStreamer(TextStreamer):
    """Hands on whole words as they are finished, and counts tokens."""

    def __init__(self, tokenizer: Any, answer: Answer, stop_filter: StopStringFilter):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.answer = answer
        self.filter = stop_filter
        self.token_ids: list[int] = []

    @property
    def has_stopped(self) -> bool:
        """Whether the model itself ended its answer; stop strings may be special tokens, which no text shows."""
        if self.filter.has_stopped or self.token_ids[-1:] == [self.tokenizer.eos_token_id]:
            return True
        longest = max(map(len, self.filter.stop_strings), default=0)
        tail = self.tokenizer.decode(self.token_ids[-longest:]) if longest else ""
        return any(stop in tail for stop in self.filter.stop_strings)

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one token at a time."""
        if not self.next_tokens_are_prompt:
            self.answer.last_token = time.monotonic()
            if self.answer.num_tokens == 0:
                self.answer.first_token = self.answer.last_token
            self.answer.num_tokens += 1
            self.token_ids.append(int(value[-1]))
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass text on to the reader, as far as it is no stop string."""
        ready = self.filter.feed(text) + (self.filter.flush() if stream_end else "")
        if ready:
            self.answer.pieces.put(ready)


class Interruption(StoppingCriteria):
    """Ends an answer that its reader closed, whose time is over, or whose text has come to a stop string."""

    def __init__(self, answer: Answer, streamer: PieceStreamer, deadline: float | None):
        self.answer = answer
        self.streamer = streamer
        self.deadline = deadline
        self.reason: FinishReason | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.answer.cancelled.is_set():
            self.reason = "cancelled"
        elif self.deadline is not None and time.monotonic() >= self.deadline:
            self.reason = "time_limit"
        ends = self.reason is not None or self.streamer.filter.has_stopped
        return torch.full((input_ids.shape[0],), ends, device=input_ids.device)
