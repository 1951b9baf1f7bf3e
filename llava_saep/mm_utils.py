"""LLaVA's helpers around images and prompts, under their names there (`llava.mm_utils`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria

from llava_saep.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_saep.data.images import parse_grid_pinpoints, preprocess_image
from llava_saep.data.tokenization import encode_prompt


def process_images(images: Sequence[Image.Image], image_processor: Any, model_cfg: Any) -> Tensor | list[Tensor]:
    """Turn images into pixel values as a model's config says.

    Args:
        model_cfg: has `image_aspect_ratio` (None, "square", "pad" or "anyres"), and with "anyres"
            `image_grid_pinpoints`.
    Returns:
        (images, 3, height, width), with "anyres" (images, crops, 3, height, width); a list where
            crops differ in number.
    Raises:
        UserError: an unknown aspect ratio, or an image that cannot be processed.
    """
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None) or "square"
    pinpoints = parse_grid_pinpoints(getattr(model_cfg, "image_grid_pinpoints", None))
    pixels = [preprocess_image(image, image_processor, aspect_ratio, pinpoints) for image in images]
    return torch.stack(pixels) if all(each.shape == pixels[0].shape for each in pixels) else pixels


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | Tensor:
    """Tokenise a prompt with `image_token_index` in place of each `<image>`.

    Args:
        return_tensors: None for a list, "pt" for a tensor of shape (length,).
    Raises:
        ValueError: another kind of tensor.
    """
    markers = prompt.count(DEFAULT_IMAGE_TOKEN)
    ids = encode_prompt(prompt, tokenizer, [1] * markers, image_token_index)
    if return_tensors is None:
        return ids
    if return_tensors == "pt":
        return torch.tensor(ids, dtype=torch.long)
    raise ValueError(f"return_tensors {return_tensors!r}: expected None or 'pt'")


def get_model_name_from_path(model_path: str) -> str:
    """The last part of a path, with the one before it for a checkpoint-N."""
    parts = model_path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stops a row when one of several texts has been generated.

    Args:
        keywords: texts at which an answer ends.
        tokenizer: decodes what was generated; special tokens are looked for by id.
        input_ids: (batch, length), the prompt. LLaVA's `generate` returns no prompt, so what is shorter counts as
            generated as a whole.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: Tensor):
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.start_len = input_ids.shape[1]
        self.keyword_ids = [torch.tensor(self._ids_of(keyword)) for keyword in self.keywords]
        self.max_keyword_len = max((len(ids) for ids in self.keyword_ids), default=0)

    def _ids_of(self, keyword: str) -> list[int]:
        ids = list(self.tokenizer(keyword).input_ids)
        return ids[1:] if len(ids) > 1 and ids[0] == self.tokenizer.bos_token_id else ids

    def stops(self, output_ids: Tensor) -> bool:
        """Say whether one row (length,), prompt and answer, ends with a keyword or has one in its last tokens."""
        for keyword in self.keyword_ids:
            if len(keyword) and output_ids[-len(keyword) :].tolist() == keyword.tolist():
                return True
        num_new = len(output_ids) - self.start_len if len(output_ids) >= self.start_len else len(output_ids)
        num_looked_at = min(num_new, self.max_keyword_len)
        if num_looked_at <= 0:
            return False
        text = self.tokenizer.decode(output_ids[-num_looked_at:], skip_special_tokens=True)
        return any(keyword in text for keyword in self.keywords)

    def __call__(self, output_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return (batch,), True for the rows that are to stop."""
        return torch.tensor([self.stops(row) for row in output_ids], device=output_ids.device)
