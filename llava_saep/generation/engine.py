"""Engine: whole conversations in, answers piece by piece out, for any number of threads at once.

A local engine has one thread for its model. Questions wait for it in the order in which they came, so answers of
different chats never mix, and closing an answer ends the model's work on it within one token.
"""

import gc
import logging
import time
import traceback
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import CompileConfig, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_saep.errors import UserError
from llava_saep.generation.answers import Answer, Interruption, LocalAnswerStream, PieceStreamer
from llava_saep.generation.conversation_cache import (
    ConversationCaches,
    DynamicCaches,
    StaticCaches,
    prompt_symbols,
)
from llava_saep.generation.image_features import ImageFeatures, content_key
from llava_saep.generation.messages import Message
from llava_saep.generation.options import EngineSettings, GenerationOptions
from llava_saep.generation.predictor import Predictor, Prompt
from llava_saep.generation.seeding import seeded
from llava_saep.generation.streams import AnswerStream, StopStringFilter

logger = logging.getLogger(__name__)

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
        settings: None: the defaults.
    Raises:
        UserError: the model does not do what the settings ask for.
    """

    def __init__(self, predictor: Predictor, *, model_id: str, settings: EngineSettings | None = None):
        self.predictor = predictor
        self.model_id = model_id
        self.settings = settings or EngineSettings()
        self._caches = _make_caches(predictor, self.settings)
        self._image_features = ImageFeatures(predictor, max_bytes=self.settings.max_image_bytes)
        self._model_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llava-saep-model")
        self._running: weakref.WeakSet[Answer] = weakref.WeakSet()
        if self.settings.compile:
            self._compile()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, model_id: str | None = None, settings: EngineSettings | None = None, **kwargs: Any
    ) -> "LocalEngine":
        """Load a model; arguments and errors as `Predictor.from_pretrained` and for the class.

        Args:
            model_id: None: the folder's own name.
        """
        predictor = Predictor.from_pretrained(folder, **kwargs)
        return cls(predictor, model_id=model_id or Path(folder).name or str(folder), settings=settings)

    @property
    def description(self) -> ModelDescription:
        """What model answers here."""
        predictor = self.predictor
        return ModelDescription(
            model_id=self.model_id,
            projector=predictor.model.config.projector["name"],
            tokens_per_image=predictor.num_image_tokens,
            context_length=self.settings.max_length or predictor.context_length,
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
        self._check_length(prompt, options)
        answer = Answer(prompt, [content_key(image) for image in prompt.images], options, max_seconds)
        self._running.add(answer)
        return LocalAnswerStream(answer, self._submit(self._write, answer))

    def use_model(self, work: Callable[[Predictor], T]) -> T:
        """Do something else with the model when its turn has come, and wait for it.

        Raises:
            UserError: the engine was closed. What `work` raises is passed on.
        """
        return self._submit(work, self.predictor).result()

    def close(self) -> None:
        """Stop all answers and give the model's thread and memory back; nothing can be asked any more."""
        for answer in list(self._running):
            answer.cancelled.set()
        self._model_thread.shutdown(wait=True)
        self._caches.clear()
        self._image_features.clear()

    def _submit(self, work: Callable[..., T], *args: Any) -> "Future[T]":
        try:
            return self._model_thread.submit(work, *args)
        except RuntimeError as error:  # the executor takes no work after its shutdown
            raise UserError(f"{self.model_id} was unloaded; load it again to ask it") from error

    def _check_length(self, prompt: Prompt, options: GenerationOptions) -> None:
        self.predictor.check_length(prompt, options)
        limit, length = self.settings.max_length, len(prompt.input_ids)
        if limit is not None and length + options.max_new_tokens > limit:
            raise UserError(
                f"the conversation has {length} tokens (images included) and asks for up to {options.max_new_tokens} "
                f"more, but the static cache has {limit} (--kv-cache-tokens); shorten it or lower max_new_tokens"
            )

    def _compile(self) -> None:
        """Let the first question, which compiles, be our own: it takes so long that nobody should wait for it."""
        answer = self.stream([{"role": "user", "content": "Hello"}], GenerationOptions(max_new_tokens=4))
        try:
            for _ in answer:
                pass
        except RuntimeError as error:  # such as a machine without a C++ compiler
            self.close()
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"the model's decoding cannot be compiled here: {reason}; leave out --compile") from error

    def _write(self, answer: Answer) -> None:
        """Let the model write one answer; runs in its thread."""
        answer.started = time.monotonic()
        try:
            if not answer.cancelled.is_set():
                self._generate_with_memory(answer)
        except Exception as error:  # handed to the reading thread, which raises it
            answer.error = error
        finally:
            answer.finish()

    def _generate_with_memory(self, answer: Answer) -> None:
        """Generate, the second time without the memory that earlier conversations take."""
        is_again = False
        while not self._fits_into_memory(answer):
            had_any = self._forget_all()
            if is_again or not had_any or answer.num_tokens > 0:
                length, device = len(answer.prompt.input_ids), self.predictor.model.device
                raise UserError(
                    f"the conversation of {length} tokens ({answer.prompt.num_image_tokens} of images) does not fit "
                    f"into the memory of {device}; shorten it or show fewer images"
                )
            is_again = True

    def _fits_into_memory(self, answer: Answer) -> bool:
        try:
            self._generate(answer)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            logger.warning("out of memory: %s", error)
            traceback.clear_frames(error.__traceback__)  # they hold what was computed so far
            return False
        return True

    def _generate(self, answer: Answer) -> None:
        deadline = None if answer.max_seconds is None else answer.started + answer.max_seconds
        model, tokenizer = self.predictor.model, self.predictor.processor.tokenizer
        streamer = PieceStreamer(tokenizer, answer, StopStringFilter(self.predictor.template.stop_strings))
        interruption = Interruption(answer, streamer, deadline)
        with torch.inference_mode(), seeded(answer.options.seed, model.device):
            symbols = prompt_symbols(answer.prompt, answer.image_keys)
            cache, answer.num_cached_tokens = self._caches.start(symbols)
            output = model.generate(
                **self._model_inputs(answer),
                **self.predictor.decoding(answer.options),
                **_compilation(self.settings, model.device),
                past_key_values=cache,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([interruption]),
            )
            self._caches.keep(symbols + output[0, len(symbols) :].tolist(), cache)
        answer.finish_reason = "stop" if streamer.has_stopped else interruption.reason or "length"

    def _model_inputs(self, answer: Answer) -> dict[str, Any]:
        """The whole prompt, and the tokens of those images that the key-value cache does not hold."""
        device = self.predictor.model.device
        input_ids = torch.tensor([answer.prompt.input_ids], device=device)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        first = sum(end <= answer.num_cached_tokens for _, end in answer.prompt.image_spans)
        features = self._image_features.of(answer.prompt.images[first:], answer.image_keys[first:])
        if features:
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        return inputs

    def _forget_all(self) -> bool:
        """Give back the memory of earlier conversations; returns whether there were any."""
        had_any = self._caches.clear() | self._image_features.clear()
        gc.collect()
        if self.predictor.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return had_any


def _make_caches(predictor: Predictor, settings: EngineSettings) -> ConversationCaches:
    """Make what keeps key-value caches; errors as `LocalEngine`."""
    model = predictor.model
    config = model.config.get_text_config(decoder=True)
    if settings.cache == "dynamic":
        return DynamicCaches(config, max_conversations=settings.max_conversations, max_bytes=settings.max_cache_bytes)
    if settings.compile and model.quantization is not None:
        raise UserError(f"a language model in {model.quantization} cannot be compiled; load it without rounding")
    max_length = settings.max_length or predictor.context_length
    if max_length is None:
        raise UserError("a static cache needs its length, and the language model names none: give max_length")
    return StaticCaches(config, max_length=max_length, keeps_last=settings.max_conversations > 0)


def _compilation(settings: EngineSettings, device: torch.device) -> dict[str, Any]:
    """What `generate` is told about compiling; by itself it compiles on GPUs wherever a cache is static."""
    if not settings.compile:
        return {"disable_compile": True}
    config = CompileConfig(mode="default" if device.type == "cpu" else "reduce-overhead")
    config._compile_all_devices = True
    return {"compile_config": config}


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has an exception of its own for GPUs, and a message for the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
