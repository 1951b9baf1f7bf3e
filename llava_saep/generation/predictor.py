"""Predictor: a loaded model that answers whole batches, and what the engine needs of it for one answer."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, StopStringCriteria

from llava_saep.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava_saep.data.conversation import Segment, Turn, between_start_and_end
from llava_saep.data.images import processed_image_size
from llava_saep.data.spelling import as_typed, spell_out
from llava_saep.data.templates import AnyTemplate, conversation_template, is_same_template
from llava_saep.data.tokenization import encode_segments
from llava_saep.errors import UserError
from llava_saep.generation.messages import Message, parse_messages
from llava_saep.generation.options import GenerationOptions
from llava_saep.generation.seeding import seeded
from llava_saep.model.hub import local_folder
from llava_saep.model.loading import inspect_folder, load_model, load_processor
from llava_saep.model.modeling_llava_saep import LlavaSaepForConditionalGeneration
from llava_saep.model.processing_llava_saep import LlavaSaepProcessor, pad_rows
from llava_saep.model.quantization import QuantizationConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it.

    Attributes:
        input_ids: token ids; an image is a run of placeholders, one per token.
        images: in their order, upright.
        image_spans: [start, end) of each image's run.
    """

    input_ids: list[int]
    images: list[Image.Image]
    image_spans: list[tuple[int, int]]

    @property
    def num_image_tokens(self) -> int:
        """Tokens of all images."""
        return sum(end - start for start, end in self.image_spans)


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


def _can_be_written(stop: str, tokenizer: Any) -> bool:
    try:
        StopStringCriteria(tokenizer, [stop])
    except ValueError:  # no token ends as it does, so no answer ever will
        logger.debug("no token of the vocabulary can end %r; answers will not stop at it", stop)
        return False
    return True


def _chosen_template(processor: LlavaSaepProcessor, name: str | None) -> AnyTemplate:
    """The template that a model is asked in, with a warning where it is not its own."""
    own = processor.conversation_template
    if name is not None and not is_same_template(name, own):
        logger.warning("the model's conversation template is %s; it is asked in %s", own, name)
    return conversation_template(name or own, processor.tokenizer)


def _check_waits_for_answer(turns: Sequence[Turn]) -> None:
    if not turns or turns[-1].role != "user":
        raise UserError("a conversation must end with a user's message, so that there is something to answer")


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

    @property
    def context_length(self) -> int | None:
        """Most tokens of a prompt and its answer together; None: the language model names no limit."""
        return getattr(self.model.config.text_config, "max_position_embeddings", None)

    def fit(self, options: GenerationOptions) -> GenerationOptions:
        """Halve an answer's limit until it leaves room for a prompt, for models with a short context."""
        return options.fitting(self.context_length)

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The text that the model is asked to go on from, with a marker for each image; errors as `generate`."""
        return as_typed("".join(segment.text for segment in self._segments(messages)[0]))

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
        prompts = [self.encode(messages) for messages in conversations]
        self.check_length(max(prompts, key=lambda prompt: len(prompt.input_ids)), options)
        inputs = self.model_inputs(prompts)
        with torch.inference_mode(), seeded(options.seed, self.model.device):
            output = self.model.generate(**inputs, **self.decoding(options))
        answers = output[:, inputs["input_ids"].shape[1] :]
        return [self._decode(row) for row in answers]

    def _turns(self, messages: Sequence[Message]) -> tuple[list[Turn], list[Image.Image | str | Path], str | None]:
        """Read messages as `parse_messages` does, with markers as the template and the model want them."""
        turns, images, system = parse_messages(messages, self._spell_out)
        marker = self.template.image_marker
        if self.model.config.mm_use_im_start_end:
            marker = between_start_and_end(marker)
        turns = [turn._replace(text=turn.text.replace(DEFAULT_IMAGE_TOKEN, marker)) for turn in turns]
        return turns, images, system

    def _segments(self, messages: Sequence[Message]) -> tuple[list[Segment], list[Image.Image | str | Path]]:
        """Render one conversation, and list the images that belong to its markers."""
        turns, images, system = self._turns(messages)
        _check_waits_for_answer(turns)
        return self.template.render(turns, add_generation_prompt=True, system=system), images

    def _spell_out(self, text: str) -> str:
        return spell_out(text, self.processor.tokenizer)

    def encode(self, messages: Sequence[Message]) -> Prompt:
        """Render and tokenise one conversation, and read its images; errors as `generate`, but for the context's."""
        return self._encode(*self._segments(messages))[0]

    def encode_answered(self, messages: Sequence[Message], answer: str) -> tuple[Prompt, list[int]]:
        """Tokenise a conversation with the answer that it got, as training does.

        Returns:
            the prompt, and the tokens of the answer and of what ends it.
        Raises:
            UserError: as `generate`.
        """
        turns, images, system = self._turns([*messages, {"role": "assistant", "content": answer}])
        _check_waits_for_answer(turns[:-1])
        whole, labels = self._encode(self.template.render(turns, system=system), images)
        end = len(labels)
        while end and labels[end - 1] == IGNORE_INDEX:
            end -= 1
        start = end
        while start and labels[start - 1] != IGNORE_INDEX:
            start -= 1
        prompt = dataclasses.replace(whole, input_ids=whole.input_ids[:start])
        return prompt, whole.input_ids[start:end]

    def _encode(
        self, segments: Sequence[Segment], given_images: Sequence[Image.Image | str | Path]
    ) -> tuple[Prompt, list[int]]:
        """Tokenise a rendered conversation -> all of it, and its labels."""
        images = self.processor.load_images(given_images)
        encoded = encode_segments(
            segments,
            self.processor.tokenizer,
            self.processor.count_tokens(images),
            self.model.config.image_token_id,
            adds_bos=self.template.adds_bos,
        )
        return Prompt(encoded.input_ids, images, encoded.image_spans), encoded.labels

    def check_length(self, prompt: Prompt, options: GenerationOptions) -> None:
        """Raise UserError if the prompt and the longest answer do not fit into the model's context."""
        length, context = len(prompt.input_ids), self.context_length
        if context is not None and length + options.max_new_tokens > context:
            raise UserError(
                f"the conversation has {length} tokens (images included) and asks for up to {options.max_new_tokens} "
                f"more, but the language model's context is {context}; shorten it or lower max_new_tokens"
            )

    def model_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What the model takes of the prompts, padded on the left, on its device."""
        pad_token_id = self.processor.tokenizer.pad_token_id or 0
        inputs = dict(pad_rows([prompt.input_ids for prompt in prompts], pad_token_id, "left"))
        images = [image for prompt in prompts for image in prompt.images]
        if images:
            inputs |= self.processor.image_inputs(images)
        # Floating-point values take the model's dtype too, those in lists included.
        return dict(BatchFeature(inputs).to(self.model.device, self.model.dtype))

    def decoding(self, options: GenerationOptions) -> dict[str, Any]:
        """Return the keyword arguments of the model's `generate` that decode as asked and end where an answer ends."""
        kwargs = options.to_generate_kwargs()
        tokenizer = self.processor.tokenizer
        kwargs["pad_token_id"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        kwargs["eos_token_id"] = tokenizer.eos_token_id
        if self._extra_stops:
            kwargs |= {"stop_strings": self._extra_stops, "tokenizer": tokenizer}
        return kwargs

    @functools.cached_property
    def _extra_stops(self) -> list[str]:
        """The template's stop strings beside the end token, as far as tokens of this vocabulary can write them."""
        tokenizer = self.processor.tokenizer
        return [
            stop
            for stop in self.template.stop_strings
            if stop != tokenizer.eos_token and _can_be_written(stop, tokenizer)
        ]

    def _decode(self, token_ids: torch.Tensor) -> str:
        text = self.processor.tokenizer.decode(token_ids, skip_special_tokens=True)
        for stop in self.template.stop_strings:
            text = text.split(stop)[0]
        return text.strip()
