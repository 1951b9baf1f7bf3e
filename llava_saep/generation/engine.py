"""Engine: whole conversations in, answers piece by piece out, for any number of threads at once.

A local engine has one thread for its model. Questions wait for it in the order in which they came, so answers of
different chats never mix, and closing an answer ends the model's work on it within one token.
"""

import queue
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from llava_saep.errors import UserError
from llava_saep.generation.messages import Message
from llava_saep.generation.options import GenerationOptions
from llava_saep.generation.predictor import Predictor, Prompt
from llava_saep.generation.streams import AnswerStatistics, AnswerStream, FinishReason, StopStringFilter

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What a front end shows of a model.

    Attributes:
        model_id: the name it is asked for by.
        projector: registered name.
        tokens_per_image: of one image as the processor prepares it; of one crop, where images are cut.
        context_length: most tokens of a conversation with its answer; None: the model names no limit.
        template: name of the conversation template.
        takes_system: whether a system message has a place in it.
        device, dtype: where and in which type the model computes, as PyTorch writes them.
    """

    model_id: str
    projector: str
    tokens_per_image: int
    context_length: int | None
    template: str
    takes_system: bool
    device: str
    dtype: str


class Engine(ABC):
    """Answers conversations. All methods may be called from several threads."""

    @property
    @abstractmethod
    def description(self) -> ModelDescription:
        """What model answers here."""

    @abstractmethod
    def stream(
        self,
        messages: Sequence[Message],
        options: GenerationOptions | None = None,
        *,
        max_seconds: float | None = None,
    ) -> AnswerStream:
        """Ask for the next answer of a conversation, which begins at once or when those asked for before have ended.

        Args:
            messages: the whole conversation, ending with a user's message.
            max_seconds: end the answer after so long, waiting excluded.
        Raises:
            UserError: a message is malformed, an image unreadable, or the prompt exceeds the model's context.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop all answers and give the model back; nothing can be asked any more."""


class LocalEngine(Engine):
    """A model of this process.

    Args:
        predictor: the loaded model.
        model_id: the name to show.
    """

    def __init__(self, predictor: Predictor, *, model_id: str):
        self.predictor = predictor
        self.model_id = model_id
        self._model_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llava-saep-model")
        self._running: weakref.WeakSet[_Answer] = weakref.WeakSet()

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, model_id: str | None = None, **kwargs: Any) -> "LocalEngine":
        """Load a model; arguments and errors as `Predictor.from_pretrained`.

        Args:
            model_id: None: the folder's own name.
        """
        predictor = Predictor.from_pretrained(folder, **kwargs)
        return cls(predictor, model_id=model_id or Path(folder).name or str(folder))

    @property
    def description(self) -> ModelDescription:
        """What model answers here."""
        predictor = self.predictor
        return ModelDescription(
            model_id=self.model_id,
            projector=predictor.model.config.projector["name"],
            tokens_per_image=predictor.num_image_tokens,
            context_length=predictor.context_length,
            template=predictor.template.name,
            takes_system=predictor.template.takes_system,
            device=str(predictor.model.device),
            dtype=str(predictor.model.dtype).removeprefix("torch."),
        )

    def stream(
        self,
        messages: Sequence[Message],
        options: GenerationOptions | None = None,
        *,
        max_seconds: float | None = None,
    ) -> AnswerStream:
        """See `Engine.stream`.

        Raises:
            UserError: also for a beam search, whose text is known only at its end, and for an engine that was closed.
        """
        options = options or GenerationOptions()
        if options.num_beams > 1:
            raise UserError(
                f"an answer that comes piece by piece has no beams: num_beams is {options.num_beams}, not 1"
            )
        if max_seconds is not None and max_seconds <= 0:
            raise UserError(f"max_seconds must be above 0, got {max_seconds}")
        prompt = self.predictor.encode(messages)
        self.predictor.check_length(prompt, options)
        answer = _Answer(prompt, options, max_seconds)
        self._running.add(answer)
        return LocalAnswerStream(answer, self._submit(self._write, answer))

    def use_model(self, work: Callable[[Predictor], T]) -> T:
        """Do something else with the model when its turn has come, and wait for it.

        Raises:
            UserError: the engine was closed. What `work` raises is passed on.
        """
        return self._submit(work, self.predictor).result()

    def close(self) -> None:
        """Stop all answers and give the model's thread back; nothing can be asked any more."""
        for answer in list(self._running):
            answer.cancelled.set()
        self._model_thread.shutdown(wait=True)

    def _submit(self, work: Callable[..., T], *args: Any) -> "Future[T]":
        try:
            return self._model_thread.submit(work, *args)
        except RuntimeError as error:  # the executor takes no work after its shutdown
            raise UserError(f"{self.model_id} was unloaded; load it again to ask it") from error

    def _write(self, answer: "_Answer") -> None:
        """Let the model write one answer; runs in its thread."""
        answer.started = time.monotonic()
        try:
            if not answer.cancelled.is_set():
                self._generate(answer)
        except Exception as error:  # handed to the reading thread, which raises it
            answer.error = error
        finally:
            answer.finish()

    def _generate(self, answer: "_Answer") -> None:
        deadline = None if answer.max_seconds is None else answer.started + answer.max_seconds
        tokenizer = self.predictor.processor.tokenizer
        streamer = _PieceStreamer(tokenizer, answer, StopStringFilter(self.predictor.template.stop_strings))
        interruption = _Interruption(answer, streamer, deadline)
        inputs = self.predictor.model_inputs([answer.prompt])
        with torch.inference_mode(), _seeded(answer.options.seed, self.predictor.model.device):
            self.predictor.model.generate(
                **inputs,
                **self.predictor.decoding(answer.options),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([interruption]),
            )
        answer.finish_reason = "stop" if streamer.has_stopped else interruption.reason or "length"


class _Answer:
    """One answer in the making: what its reader and the model's thread share.

    It knows nothing of its reader, so that a reader who is gone is noticed.
    """

    def __init__(self, prompt: Prompt, options: GenerationOptions, max_seconds: float | None):
        self.prompt = prompt
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
        self.pieces.put(None)


class LocalAnswerStream(AnswerStream):
    """What a local engine hands to the reader of one answer; left alone it is closed."""

    def __init__(self, answer: _Answer, work: Future):
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
        self._work.exception()  # waits; the answer holds its errors itself

    @property
    def statistics(self) -> AnswerStatistics:
        """What the answer took; see `AnswerStream.statistics`."""
        if self._answer.statistics is None:
            raise RuntimeError("the answer has not come to its end; read it to the end or close it first")
        return self._answer.statistics

    def __del__(self) -> None:
        self._answer.cancelled.set()


class _PieceStreamer(TextStreamer):
    """Hands on whole words as they are finished, and counts tokens."""

    def __init__(self, tokenizer: Any, answer: _Answer, stop_filter: StopStringFilter):
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


class _Interruption(StoppingCriteria):
    """Ends an answer that its reader closed, whose time is over, or whose text has come to a stop string."""

    def __init__(self, answer: _Answer, streamer: _PieceStreamer, deadline: float | None):
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


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from a seed of one's own, and leave the program's random numbers as they were."""
    if seed is None:
        yield
        return
    on_device = {} if device.type == "cpu" else {"device_type": device.type}
    with torch.random.fork_rng(devices=[device] if on_device else [], **on_device):
        torch.manual_seed(seed)
        yield
