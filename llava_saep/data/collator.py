"""Samples of different lengths to one batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_saep.constants import IGNORE_INDEX


@dataclass(frozen=True)
class ConversationCollator:
    """Pads samples on the right; what is padding is known from lengths, never from token ids.

    LLaVA compares ids with the pad id, which hides real "<unk>" tokens from models whose pad token is "<unk>".

    Attributes:
        pad_token_id: id at padded positions.
        image_size: (height, width) in pixels of the zero image that a batch without any image gets, so that every
            rank runs the tower in every step (ZeRO needs equal calls on all ranks).
        max_length: longest sample that the data set makes, in tokens.
        cuts_images: each image is a stack of crops, and stays one, since they differ in number.
    """

    pad_token_id: int
    image_size: tuple[int, int]
    max_length: int
    cuts_images: bool = False

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            samples: each with input_ids (T,), labels (T,) and, unless it is text only, pixel_values (images, 3, H, W);
                where images are cut, a list of (crops, 3, H, W) tensors instead, and image_sizes (images, 2).
        Returns:
            input_ids, attention_mask and labels, each (B, longest T), and pixel_values (all images, 3, H, W) in the
            order of the placeholders; where images are cut, the list of all stacks, and image_sizes (all images, 2).
        Raises:
            ValueError: a sample is longer than max_length.
        """
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        if lengths.max() > self.max_length:
            raise ValueError(f"a sample has {lengths.max()} tokens, more than max_length={self.max_length}")
        return {
            "input_ids": _pad([sample["input_ids"] for sample in samples], self.pad_token_id),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": _pad([sample["labels"] for sample in samples], IGNORE_INDEX),
            **self._join_images([sample for sample in samples if "pixel_values" in sample]),
        }

    def _join_images(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Put the images of all samples that have some together, or make one of zeros."""
        zeros = torch.zeros(1, 3, *self.image_size)
        if not self.cuts_images:
            images = [sample["pixel_values"] for sample in samples]
            return {"pixel_values": torch.cat(images) if images else zeros}
        stacks = [stack for sample in samples for stack in sample["pixel_values"]]
        sizes = [sample["image_sizes"] for sample in samples]
        return {
            "pixel_values": stacks or [zeros],
            "image_sizes": torch.cat(sizes) if sizes else torch.tensor([self.image_size]),
        }


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
