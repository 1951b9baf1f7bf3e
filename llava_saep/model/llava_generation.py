"""`model.generate(input_ids, images=, image_sizes=)` as LLaVA has it: -200 stands for an image, and only new tokens
come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava_saep.constants import IMAGE_TOKEN_INDEX
from llava_saep.errors import UserError

_NOT_GIVEN: Any = object()

Images = Tensor | Sequence[Tensor]


class LlavaStyleGeneration:
    """Adds LLaVA's way of calling `generate` to a model; transformers' own way stays as it is."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Images | None = _NOT_GIVEN,
        image_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generate, in transformers' way, or in LLaVA's where `images` is given (None for text alone).

        Args:
            inputs: (batch, length) token ids, also as `input_ids`; in LLaVA's way each -200 stands for one image, and
                positions outside `attention_mask` count for nothing, whichever side they are on.
            images: (images, 3, height, width); or one (crops, 3, height, width) tensor per image, as a list or stacked.
                An image is there for each -200, and may be there for each row without one, as in LLaVA.
            image_sizes: in LLaVA's way (width, height) of each image as PIL says it; otherwise the model's own.
            kwargs: as in transformers.
        Returns:
            in LLaVA's way the new tokens alone, (batch, new); otherwise what transformers returns.
        Raises:
            UserError: images and -200 differ in number, or there are -200 and no images.
        """
        if images is _NOT_GIVEN:
            ids = kwargs.get("input_ids") if inputs is None else inputs
            if isinstance(ids, Tensor) and bool((ids == IMAGE_TOKEN_INDEX).any()):
                raise UserError(
                    f"input_ids hold {IMAGE_TOKEN_INDEX}, LLaVA's mark of an image; give the images as `images`"
                )
            if image_sizes is not None:
                kwargs["image_sizes"] = image_sizes
            return super().generate(inputs, **kwargs)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None or "inputs_embeds" in kwargs:
            raise UserError("generate with `images` needs input_ids, and takes no inputs_embeds")
        kwargs.pop("position_ids", None)
        embedded = self._embed_llava_inputs(input_ids, kwargs.pop("attention_mask", None), images, image_sizes)
        return super().generate(**embedded, **kwargs)

    def _embed_llava_inputs(
        self, input_ids: Tensor, attention_mask: Tensor | None, images: Images | None, image_sizes: Any
    ) -> dict[str, Tensor]:
        """Return inputs_embeds (batch, longest, width) and attention_mask (batch, longest), padded on the left."""
        rows = kept_rows(input_ids, attention_mask)
        features = [] if images is None else self._llava_image_features(images, image_sizes)
        features = match_images(features, [row.count(IMAGE_TOKEN_INDEX) for row in rows])
        image_token_id = self.config.image_token_id
        expanded = expand_rows(rows, [len(feature) for feature in features], image_token_id)
        ids, mask = pad_left(expanded, self.device)
        embeds = self.get_input_embeddings()(ids.masked_fill(ids == image_token_id, 0))
        if features:
            # An image token of the text alone is masked too: there are as many placeholders as features.
            embeds = embeds.masked_scatter((ids == image_token_id)[..., None], torch.cat(features).to(embeds))
        return {"inputs_embeds": embeds, "attention_mask": mask}

    def _llava_image_features(self, images: Images, image_sizes: Any) -> list[Tensor]:
        """One (tokens, width) tensor per image."""
        if not isinstance(images, Tensor):
            images = [(image[None] if image.dim() == 3 else image).to(self.device) for image in images]
        else:
            images = images.to(self.device)
        sizes = None
        if image_sizes is not None:
            sizes = torch.tensor([(int(height), int(width)) for width, height in image_sizes])
        return list(self.get_image_features(images, sizes).pooler_output)


def kept_rows(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The ids of each row without the positions that the mask leaves out."""
    if attention_mask is None:
        return input_ids.tolist()
    kept = attention_mask.bool()
    return [row[is_kept].tolist() for row, is_kept in zip(input_ids, kept.to(input_ids.device), strict=True)]


def match_images(features: Sequence[Tensor], marks: Sequence[int]) -> list[Tensor]:
    """Return the images that rows show, in order.

    LLaVA's batches hold an image for each row without a mark too, which nothing shows; ours need not.

    Args:
        marks: number of image marks of each row.
    Raises:
        UserError: neither reading fits the number of images.
    """
    without = sum(count == 0 for count in marks)
    if len(features) == sum(marks):
        return list(features)
    if len(features) != sum(marks) + without:
        raise UserError(
            f"input_ids have {sum(marks)} image marks ({IMAGE_TOKEN_INDEX}) in {len(marks)} rows, but {len(features)} "
            "images came; give one image per mark"
        )
    shown, position = [], 0
    for count in marks:
        shown += features[position : position + count]
        position += max(count, 1)
    return shown


def expand_rows(rows: Sequence[Sequence[int]], counts: Sequence[int], image_token_id: int) -> list[list[int]]:
    """Replace each image mark by as many placeholders as its image has tokens."""
    remaining = iter(counts)
    return [
        [
            token
            for index in row
            for token in ([image_token_id] * next(remaining) if index == IMAGE_TOKEN_INDEX else [index])
        ]
        for row in rows
    ]


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask, both (rows, longest row); padding has id 0."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
