"""Processor: text and images to model inputs, tokenised and preprocessed as the training data are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from llava_saep.constants import DEFAULT_IMAGE_TOKEN
from llava_saep.data.chat_template import CHAT_TEMPLATE, check_has_template
from llava_saep.data.images import (
    ImageSize,
    load_image,
    parse_grid_pinpoints,
    preprocess_image,
    processed_image_size,
    turn_upright,
)
from llava_saep.data.jinja_form import jinja_form
from llava_saep.data.tokenization import encode_prompt
from llava_saep.errors import UserError
from llava_saep.model.anyres import ImageTokens
from llava_saep.model.configuration_llava_saep import LlavaSaepConfig
from llava_saep.model.parts import copy_sentencepiece
from llava_saep.model.projector_selection import selection_from_config
from projectors import ProjectorConfig


class LlavaSaepProcessor(ProcessorMixin):
    """Image processor and tokenizer of one model, and how many tokens its projector makes of an image.

    Args:
        image_processor: the tower's, PIL back end.
        tokenizer: the language model's, with `<image>` as an added special token.
        projector: `{"name", "provider", "options"}`; with the next four, all that the token count needs.
        vision_hidden_size, text_hidden_size: channels of the tower and of the language model.
        num_vision_layers: transformer blocks of the tower.
        patch_size: side of a patch, in pixels.
        image_aspect_ratio: "square" (resize the short side, crop the centre), "pad" (pad to a square first) or "anyres"
            (cut into crops).
        mm_patch_merge_type, image_grid_pinpoints: how images are cut and put together, as in `LlavaSaepConfig`.
        apply_exif_orientation: turn images as their EXIF tags say, as the training data were. LLaVA does not.
        use_im_start_end: images stand between <im_start> and <im_end> in the chat template.
        conversation_template: name in llava_saep.data.templates with which the model was trained; with
            "chat_template" the tokenizer's own serves the processor as well.
    """

    attributes = ["image_processor", "tokenizer"]

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        projector: dict[str, Any] | None = None,
        vision_hidden_size: int | None = None,
        text_hidden_size: int | None = None,
        num_vision_layers: int | None = None,
        patch_size: int | None = None,
        image_aspect_ratio: str = "square",
        conversation_template: str = "v1",
        mm_patch_merge_type: str = "flat",
        image_grid_pinpoints: Sequence[Sequence[int]] | None = None,
        apply_exif_orientation: bool = False,
        use_im_start_end: bool = False,
        chat_template: str | None = None,
        **kwargs,
    ):
        self.projector = projector
        self.vision_hidden_size = vision_hidden_size
        self.text_hidden_size = text_hidden_size
        self.num_vision_layers = num_vision_layers
        self.patch_size = patch_size
        self.image_aspect_ratio = image_aspect_ratio
        self.conversation_template = conversation_template
        self.mm_patch_merge_type = mm_patch_merge_type
        self.image_grid_pinpoints = image_grid_pinpoints
        self.apply_exif_orientation = apply_exif_orientation
        self.use_im_start_end = use_im_start_end
        self.image_token = DEFAULT_IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
        if conversation_template == CHAT_TEMPLATE:
            check_has_template(tokenizer)
        chat_template = chat_template or jinja_form(
            conversation_template, tokenizer.chat_template, use_im_start_end=use_im_start_end
        )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_model_config(
        cls,
        config: LlavaSaepConfig,
        *,
        image_processor,
        tokenizer,
        image_aspect_ratio: str = "square",
        conversation_template: str = "v1",
    ) -> "LlavaSaepProcessor":
        """Make the processor that belongs to a model's config."""
        return cls(
            image_processor,
            tokenizer,
            projector=dict(config.projector),
            vision_hidden_size=config.vision_config.hidden_size,
            text_hidden_size=config.text_config.hidden_size,
            num_vision_layers=config.vision_config.num_hidden_layers,
            patch_size=config.vision_config.patch_size,
            image_aspect_ratio=image_aspect_ratio,
            conversation_template=conversation_template,
            mm_patch_merge_type=config.mm_patch_merge_type,
            image_grid_pinpoints=config.image_grid_pinpoints,
            use_im_start_end=config.mm_use_im_start_end,
        )

    @classmethod
    def _load_tokenizer_from_pretrained(cls, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        # The library hands the image processor's backend to the tokenizer too, which would save it as its own.
        return super()._load_tokenizer_from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """Write the processor as transformers does, and beside it the tokenizer.model that LLaVA needs, if any."""
        written = super().save_pretrained(save_directory, **kwargs)
        copy_sentencepiece(self.tokenizer, Path(save_directory))
        return written

    @property
    def projector_config(self) -> ProjectorConfig:
        """The typed config of the projector; raises as `LlavaSaepConfig.projector_config` does."""
        return selection_from_config(self.projector).build_config(
            vision_hidden_size=self.vision_hidden_size,
            text_hidden_size=self.text_hidden_size,
            num_vision_layers=self.num_vision_layers,
        )

    @property
    def model_input_names(self) -> list[str]:
        """input_ids first: the Trainer measures lengths by the first name."""
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]

    @property
    def image_tokens(self) -> ImageTokens:
        """The arithmetic of an image's tokens; raises as `projector_config`, and for an unknown way of merging."""
        pinpoints = parse_grid_pinpoints(self.image_grid_pinpoints)
        return ImageTokens(self.projector_config, self.patch_size, self.mm_patch_merge_type, pinpoints)

    def num_image_tokens(self, height: int, width: int) -> int:
        """Count the tokens of a preprocessed image, or of one crop, of `height` x `width` pixels."""
        return self.image_tokens.num_tokens_of_view(ImageSize(height, width))

    def load_images(self, images: Sequence[Image.Image | str]) -> list[Image.Image]:
        """Read what is given by its path, and turn all upright where the training data were.

        Raises:
            UserError: a file is missing or is not a readable image.
        """

        def load(image: Image.Image | str) -> Image.Image:
            if not isinstance(image, Image.Image):
                return load_image(image, apply_exif_orientation=self.apply_exif_orientation)
            return turn_upright(image) if self.apply_exif_orientation else image

        return [load(image) for image in images]

    def count_tokens(self, images: Sequence[Image.Image]) -> list[int]:
        """Count the tokens of each image as it is, before preprocessing."""
        view = processed_image_size(self.image_processor)
        if self.image_aspect_ratio != "anyres":
            return [self.image_tokens.num_tokens_of_view(view)] * len(images)
        return [self.image_tokens.num_tokens(ImageSize(image.height, image.width), view) for image in images]

    def preprocess_images(self, images: Sequence[Image.Image | str]) -> torch.Tensor | list[torch.Tensor]:
        """Turn images or paths into pixel values, as the training data has them.

        Returns:
            (images, 3, height, width); with "anyres", one (crops, 3, height, width) tensor per image.
        Raises:
            UserError: a file is missing or is not a readable image.
        """
        pinpoints = parse_grid_pinpoints(self.image_grid_pinpoints)
        pixels = [
            preprocess_image(image, self.image_processor, self.image_aspect_ratio, pinpoints)
            for image in self.load_images(images)
        ]
        return pixels if self.image_aspect_ratio == "anyres" else torch.stack(pixels)

    def image_inputs(self, images: Sequence[Image.Image | str]) -> dict[str, Any]:
        """Turn images or paths into what the model takes of them: pixel_values, and image_sizes with "anyres".

        Raises:
            UserError: a file is missing or is not a readable image.
        """
        images = self.load_images(images)
        inputs: dict[str, Any] = {"pixel_values": self.preprocess_images(images)}
        if self.image_aspect_ratio == "anyres":
            inputs["image_sizes"] = torch.tensor([(image.height, image.width) for image in images])
        return inputs

    def __call__(
        self,
        images: Image.Image | Sequence | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Encode prompts with their images; rows are padded on the tokenizer's padding side.

        Args:
            images: one image, a flat list in the order of the `<image>` markers, or one list per prompt.
            text: prompts with one `<image>` marker per image.
            kwargs: options of transformers' processors that have no meaning here are accepted and ignored.
        Returns:
            input_ids and attention_mask (batch, length), and `image_inputs` if there are any images.
        Raises:
            UserError: no text, markers and images differ in number, or an image cannot be read.
        """
        if text is None:
            raise UserError("the processor needs `text`; put one <image> marker into it for each image")
        texts = [text] if isinstance(text, str) else list(text)
        flat_images = _flatten(images)
        markers = sum(prompt.count(DEFAULT_IMAGE_TOKEN) for prompt in texts)
        if markers != len(flat_images):
            raise UserError(f"the text has {markers} {DEFAULT_IMAGE_TOKEN} markers, but {len(flat_images)} images came")
        data: dict[str, Any] = {}
        counts: list[int] = []
        if flat_images:
            flat_images = self.load_images(flat_images)
            data |= self.image_inputs(flat_images)
            counts = self.count_tokens(flat_images)
        rows = []
        for prompt in texts:
            own, counts = counts[: prompt.count(DEFAULT_IMAGE_TOKEN)], counts[prompt.count(DEFAULT_IMAGE_TOKEN) :]
            adds_bos = self.conversation_template != CHAT_TEMPLATE  # which writes it where it wants one
            rows.append(encode_prompt(prompt, self.tokenizer, own, self.image_token_id, adds_bos=adds_bos))
        data = {**pad_rows(rows, self.tokenizer.pad_token_id or 0, self.tokenizer.padding_side), **data}
        # Stacks of crops differ in number and stay a list.
        as_they_are = ["pixel_values"] if isinstance(data.get("pixel_values"), list) else None
        return BatchFeature(data=data, tensor_type=return_tensors, skip_tensor_conversion=as_they_are)


def _flatten(images: Any) -> list:
    if images is None:
        return []
    if isinstance(images, (Image.Image, str)):
        return [images]
    return [image for entry in images for image in _flatten(entry)]


def pad_rows(rows: Sequence[Sequence[int]], pad_token_id: int, padding_side: str) -> dict[str, torch.Tensor]:
    """Pad token rows to one length: input_ids and attention_mask, both (rows, longest row)."""
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if padding_side == "left" else slice(0, len(row))
        input_ids[index, place] = torch.tensor(row, dtype=torch.long)
        attention_mask[index, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
