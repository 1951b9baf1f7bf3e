"""The one path from messages and images to text: used by the terminal chat, evaluation and every later front end."""

import dataclasses
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from llava_saep.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava_saep.data.conversation import Segment, Turn, between_start_and_end
from llava_saep.data.images import processed_image_size
from llava_saep.data.templates import AnyTemplate, conversation_template, is_same_template
from llava_saep.data.tokenization import encode_prompt
from llava_saep.errors import UserError
from llava_saep.model.hub import local_folder
from llava_saep.model.loading import inspect_folder, load_model, load_processor
from llava_saep.model.modeling_llava_saep import LlavaSaepForConditionalGeneration
from llava_saep.model.processing_llava_saep import LlavaSaepProcessor, pad_rows
from llava_saep.model.quantization import QuantizationConfig

logger = logging.getLogger(__name__)

Message = dict[str, Any]
"""`{"role": "system"|"user"|"assistant", "content": str | [{"type": "text", "text"} | {"type": "image", "image"}]}`."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How an answer is decoded.

    Args:
        max_new_tokens: upper limit of an answer's length, in tokens.
        temperature: 0 decodes greedily; above, tokens are sampled.
        top_p: sample from the smallest set of tokens with this probability mass.
        num_beams: beams of a beam search (1: none).
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise UserError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.num_beams < 1:
            raise UserError(f"num_beams must be at least 1, got {self.num_beams}")

    def to_generate_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of transformers' `generate`."""
        kwargs: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        if self.temperature > 0:
            return {**kwargs, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {**kwargs, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}


class _StopWhenSet(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


@dataclass(frozen=True)
class _Prompt:
    input_ids: list[int]
    images: list[Image.Image]


def _usable_device(device: str | torch.device) -> torch.device:
    """Return the device, after it has held a tensor.

    Raises:
        UserError: no such kind of device, or this machine or this PyTorch has none of it.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: PyTorch without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(f"device {str(device)!r} cannot be used here: {reason}; 'cpu' always can") from error


def _chosen_template(processor: LlavaSaepProcessor, name: str | None) -> AnyTemplate:
    """The template that a model is asked in, with a warning where it is not its own."""
    own = processor.conversation_template
    if name is not None and not is_same_template(name, own):
        logger.warning("the model's conversation template is %s; it is asked in %s", own, name)
    return conversation_template(name or own, processor.tokenizer)


class Predictor:
    """A loaded model with its processor, ready to answer.

    Args:
        model: in evaluation mode, on the device where it shall run.
        processor: the one saved with it.
        template: name of the conversation template that renders the messages; None: the processor's, with which the
            model was trained.
    """

    def __init__(
        self, model: LlavaSaepForConditionalGeneration, processor: LlavaSaepProcessor, *, template: str | None = None
    ):
        self.model = model.eval()
        self.processor = processor
        self.template: AnyTemplate = _chosen_template(processor, template)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        trust_projector_code: bool | None = None,
        quantization: QuantizationConfig | None = None,
        model_base: str | None = None,
        template: str | None = None,
    ) -> "Predictor":
        """Load any folder that training wrote, the original LLaVA's or llava-hf's too, or a model of the hub.

        Args:
            device: None: the first GPU where there is one, else the CPU.
            dtype: None: bfloat16 on a GPU, float32 on the CPU.
            trust_projector_code, quantization: as in `load_model`.
            model_base: as in `load_model`.
            template: as for the class.
        Raises:
            UserError, ProjectorError: the device does not exist here; else see `load_model`.
        """
        device = _usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        folder = local_folder(folder)
        inspect_folder(folder, model_base=model_base)  # its message says more than that of a missing processor
        parts = {"model_base": model_base, "trust_projector_code": trust_projector_code}
        processor = load_processor(folder, **parts)
        conversation_template(template or processor.conversation_template, processor.tokenizer)  # before the weights
        model = load_model(folder, device=device, dtype=dtype, quantization=quantization, **parts)
        return cls(model, processor, template=template)

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one image, as the processor prepares it; of one crop, where images are cut."""
        return self.processor.num_image_tokens(*processed_image_size(self.processor.image_processor))

    def fit(self, options: GenerationOptions) -> GenerationOptions:
        """Halve an answer's limit until it leaves room for a prompt, for models with a short context."""
        context = getattr(self.model.config.text_config, "max_position_embeddings", None)
        limit = options.max_new_tokens
        while context is not None and limit > context // 2:
            limit //= 2
        return dataclasses.replace(options, max_new_tokens=max(limit, 1))

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The text that the model is asked to go on from, with a marker for each image; errors as `generate`."""
        return "".join(segment.text for segment in self._segments(messages)[0])

    def generate(
        self, conversations: Sequence[Sequence[Message]], options: GenerationOptions | None = None
    ) -> list[str]:
        """Answer several conversations in one batch; each answer equals the one given alone.

        Args:
            conversations: lists of messages, each ending with a user's message.
        Returns:
            one answer per conversation, without the prompt and surrounding white space.
        Raises:
            UserError: a message is malformed, an image unreadable, or the prompt exceeds the model's context.
        """
        if not conversations:
            return []
        options = options or GenerationOptions()
        inputs = self._inputs([self._prompt(messages) for messages in conversations], options)
        with torch.inference_mode():
            output = self.model.generate(**inputs, **self._decoding(options))
        answers = output[:, inputs["input_ids"].shape[1] :]
        return [self._decode(row) for row in answers]

    def stream(self, messages: Sequence[Message], options: GenerationOptions | None = None) -> Iterator[str]:
        """Yield one answer piece by piece. Closing the iterator stops the model.

        Raises:
            UserError: as `generate`, before the first piece.
        """
        options = options or GenerationOptions()
        inputs = self._inputs([self._prompt(messages)], options)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, errors = threading.Event(), []

        def run() -> None:
            criteria = StoppingCriteriaList([_StopWhenSet(stop)])
            try:
                with torch.inference_mode():
                    self.model.generate(
                        **inputs, **self._decoding(options), streamer=streamer, stopping_criteria=criteria
                    )
            except Exception as error:  # handed to the reading thread, which raises it
                errors.append(error)
                streamer.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from _without_stop_strings(streamer, self.template.stop_strings)
        finally:
            stop.set()
            thread.join()
        if errors:
            raise errors[0]

    def _segments(self, messages: Sequence[Message]) -> tuple[list[Segment], list[Image.Image | str | Path]]:
        """Render one conversation, and list the images that belong to its markers."""
        turns, images, system = parse_messages(messages)
        if not turns or turns[-1].role != "user":
            raise UserError("a conversation must end with a user's message, so that there is something to answer")
        marker = self.template.image_marker
        if self.model.config.mm_use_im_start_end:
            marker = between_start_and_end(marker)
        turns = [turn._replace(text=turn.text.replace(DEFAULT_IMAGE_TOKEN, marker)) for turn in turns]
        return self.template.render(turns, add_generation_prompt=True, system=system), images

    def _prompt(self, messages: Sequence[Message]) -> _Prompt:
        """Render and tokenise one conversation."""
        segments, given_images = self._segments(messages)
        images = self.processor.load_images(given_images)
        input_ids = encode_prompt(
            segments,
            self.processor.tokenizer,
            self.processor.count_tokens(images),
            self.model.config.image_token_id,
            adds_bos=self.template.adds_bos,
        )
        return _Prompt(input_ids, images)

    def _inputs(self, prompts: Sequence[_Prompt], options: GenerationOptions) -> dict[str, torch.Tensor]:
        longest = max(len(prompt.input_ids) for prompt in prompts)
        context = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if context is not None and longest + options.max_new_tokens > context:
            raise UserError(
                f"the conversation has {longest} tokens (images included) and asks for up to {options.max_new_tokens} "
                f"more, but the language model's context is {context}; shorten it or lower max_new_tokens"
            )
        pad_token_id = self.processor.tokenizer.pad_token_id or 0
        inputs = dict(pad_rows([prompt.input_ids for prompt in prompts], pad_token_id, "left"))
        images = [image for prompt in prompts for image in prompt.images]
        if images:
            inputs |= self.processor.image_inputs(images)
        # Floating-point values take the model's dtype too, those in lists included.
        return dict(BatchFeature(inputs).to(self.model.device, self.model.dtype))

    def _decoding(self, options: GenerationOptions) -> dict[str, Any]:
        kwargs = options.to_generate_kwargs()
        tokenizer = self.processor.tokenizer
        kwargs["pad_token_id"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        kwargs["eos_token_id"] = tokenizer.eos_token_id
        extra_stops = [stop for stop in self.template.stop_strings if stop != tokenizer.eos_token]
        if extra_stops:
            kwargs |= {"stop_strings": extra_stops, "tokenizer": tokenizer}
        return kwargs

    def _decode(self, token_ids: torch.Tensor) -> str:
        text = self.processor.tokenizer.decode(token_ids, skip_special_tokens=True)
        for stop in self.template.stop_strings:
            text = text.split(stop)[0]
        return text.strip()


def _without_stop_strings(pieces: Iterator[str], stop_strings: Sequence[str]) -> Iterator[str]:
    """Pass text on as far as it cannot be the beginning of a stop string, and end before one."""
    pending, at_start = "", True
    for piece in pieces:
        pending += piece.lstrip() if at_start else piece
        at_start = at_start and not pending
        cut = min((pending.index(stop) for stop in stop_strings if stop in pending), default=None)
        if cut is not None:
            yield pending[:cut].rstrip()
            return
        keep = max((_overlap(pending, stop) for stop in stop_strings), default=0)
        ready, pending = pending[: len(pending) - keep], pending[len(pending) - keep :]
        if ready:
            yield ready
    if pending:
        yield pending


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def parse_messages(messages: Sequence[Message]) -> tuple[list[Turn], list[Image.Image | str | Path], str | None]:
    """Split messages into turns with `<image>` markers, the images in their order, and the system prompt if any.

    Images of a message are put in front of its text, each as `<image>` and a line break, as LLaVA's prompts have them;
    or where its text holds LLaVA's `<image-placeholder>`, one for each image.

    Raises:
        UserError: unknown role or part, missing text or image, placeholders that do not match the images, or a marker
            written into the text by hand.
    """
    turns: list[Turn] = []
    images: list[Image.Image | str | Path] = []
    system = None
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise UserError(f"message {index} has role {role!r}, expected system, user or assistant")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text, own_images = _parse_parts(parts, index)
        if role == "system":
            if index != 0:
                raise UserError(f"message {index} is a system message; only the first may be one")
            system = text
            continue
        turns.append(Turn(role, _with_markers(text, len(own_images), index)))
        images.extend(own_images)
    return turns, images, system


def _with_markers(text: str, num_images: int, index: int) -> str:
    """Mark where a message's images stand."""
    num_places = text.count(IMAGE_PLACEHOLDER)
    if num_places == 0:
        return f"{DEFAULT_IMAGE_TOKEN}\n" * num_images + text
    if num_places != num_images:
        raise UserError(f"message {index} has {num_places} {IMAGE_PLACEHOLDER} and {num_images} images")
    return text.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)


def _parse_parts(parts: Any, index: int) -> tuple[str, list]:
    if not isinstance(parts, (list, tuple)):
        raise UserError(f"message {index} has content of type {type(parts).__name__}, expected text or a list of parts")
    texts, images = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image" and isinstance(part.get("image"), (Image.Image, str, Path)):
            images.append(part["image"])
        else:
            raise UserError(
                f"message {index} has a part {str(part)[:80]!r}; expected {{'type': 'text', 'text': ...}} or "
                "{'type': 'image', 'image': a PIL image or a path}"
            )
    text = "".join(texts)
    if DEFAULT_IMAGE_TOKEN in text:
        raise UserError(f"message {index} contains {DEFAULT_IMAGE_TOKEN!r} in its text; pass images as parts")
    return text, images
