"""Samples of different lengths to one batch: padded rows, or a single row without any padding.

What is padding is known from lengths, never from token ids: LLaVA compares ids with the pad id, which hides real
"<unk>" tokens from models whose pad token is "<unk>".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_saep.constants import IGNORE_INDEX

Sample = dict[str, Any]
"""input_ids (T,), labels (T,) and, unless it is text only, pixel_values: see `ConversationDataset`."""
SAMPLE_INDEX = "sample_index"
SAMPLE_INDICES = "sample_indices"
"""Keys under which a sample and a batch tell where in the data set they come from."""


@dataclass(frozen=True)
class ConversationCollator:
    """Makes batches of conversations, or of packed rows (lists of conversations).

    Attributes:
        pad_token_id: id at padded positions.
        image_size: (height, width) in pixels of the zero image that a batch without any image gets, so that every
            rank runs the tower in every step (ZeRO needs equal calls on all ranks).
        max_length: longest row that the data set makes, in tokens.
        cuts_images: each image is a stack of crops, and stays one, since they differ in number.
        padding_free: all conversations stand one behind another in a single row, for attention that runs each by
            itself.
        caches_features: samples come from a data set with a feature store, whose lists are joined as they are.
    """

    pad_token_id: int
    image_size: tuple[int, int]
    max_length: int
    cuts_images: bool = False
    padding_free: bool = False
    caches_features: bool = False

    def __call__(self, samples: Sequence[Sample | list[Sample]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            samples: each a conversation, or a packed row of some. pixel_values are (images, 3, H, W); where images are
                cut, a list of (crops, 3, H, W) tensors instead, with image_sizes (images, 2).
        Returns:
            input_ids and labels, each (B, longest T), and attention_mask; for packed rows position_ids instead, which
            start anew in each conversation and are 0 at padding. With `padding_free`, input_ids, labels and
            position_ids, each (1, total T), and where the conversations begin and end in the names of flash attention:
            cu_seq_lens_q and _k, (conversations + 1,) of int32, and max_length_q and _k. And pixel_values (all images,
            3, H, W) in the order of the placeholders; where images are cut, the list of all stacks, and image_sizes
            (all images, 2). Of samples of a data set also sample_indices (conversations,), which is not for the model.
        Raises:
            ValueError: a row is longer than max_length.
        """
        rows = [sample if isinstance(sample, list) else [sample] for sample in samples]
        self._check_lengths(rows)
        conversations = [conversation for row in rows for conversation in row]
        if self.padding_free:
            text = _join_row(conversations)
        elif any(isinstance(sample, list) for sample in samples):
            text = self._pad_packed_rows(rows)
        else:
            text = self._pad_conversations(conversations)
        images = self._join_images([sample for sample in conversations if "pixel_values" in sample])
        return {**text, **images, **_join_indices(conversations)}

    def _check_lengths(self, rows: list[list[Sample]]) -> None:
        longest = max(sum(len(conversation["input_ids"]) for conversation in row) for row in rows)
        if longest > self.max_length:
            raise ValueError(f"a sample has {longest} tokens, more than max_length={self.max_length}")

    def _pad_conversations(self, samples: list[Sample]) -> dict[str, Tensor]:
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        return {
            "input_ids": _pad([sample["input_ids"] for sample in samples], self.pad_token_id),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": _pad([sample["labels"] for sample in samples], IGNORE_INDEX),
        }

    def _pad_packed_rows(self, rows: list[list[Sample]]) -> dict[str, Tensor]:
        # With an attention mask, transformers would not look for conversations in the positions.
        return {
            "input_ids": _pad([_join_ids(row) for row in rows], self.pad_token_id),
            "labels": _pad([_join_labels(row) for row in rows], IGNORE_INDEX),
            "position_ids": _pad([_join_positions(row) for row in rows], 0),
        }

    def _join_images(self, samples: list[Sample]) -> dict[str, Any]:
        """Put the images of all samples that have some together, or make one of zeros."""
        zeros = torch.zeros(1, 3, *self.image_size)
        if self.caches_features:
            return self._join_lookups(samples) if samples else self._lookup_of(zeros)
        if not self.cuts_images:
            images = [sample["pixel_values"] for sample in samples]
            return {"pixel_values": torch.cat(images) if images else zeros}
        stacks = [stack for sample in samples for stack in sample["pixel_values"]]
        sizes = [sample["image_sizes"] for sample in samples]
        return {
            "pixel_values": stacks or [zeros],
            "image_sizes": torch.cat(sizes) if sizes else torch.tensor([self.image_size]),
        }

    def _lookup_of(self, zeros: Tensor) -> dict[str, Any]:
        """Make the image inputs of a batch without images; "" is the key of what is not stored."""
        sizes = torch.tensor([self.image_size])
        return {"pixel_values": [zeros], "vision_features": [()], "image_lookups": [("", False)], "image_sizes": sizes}

    def _join_lookups(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        lists = ("pixel_values", "vision_features", "image_lookups")
        joined = {name: [entry for sample in samples for entry in sample[name]] for name in lists}
        return joined | {"image_sizes": torch.cat([sample["image_sizes"] for sample in samples])}


def _join_row(samples: list[Sample]) -> dict[str, Any]:
    """Put conversations one behind another into a batch of one row."""
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples], dtype=torch.int32)
    boundaries = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max())
    return {
        "input_ids": _join_ids(samples)[None],
        "labels": _join_labels(samples)[None],
        "position_ids": _join_positions(samples)[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _join_ids(samples: list[Sample]) -> Tensor:
    return torch.cat([sample["input_ids"] for sample in samples])


def _join_labels(samples: list[Sample]) -> Tensor:
    """Join labels; a first token would otherwise be learnt from the end of the conversation before it."""
    ignored = torch.tensor([IGNORE_INDEX])
    return torch.cat([part for sample in samples for part in (ignored, sample["labels"][1:])])


def _join_positions(samples: list[Sample]) -> Tensor:
    return torch.cat([torch.arange(len(sample["input_ids"])) for sample in samples])


def _join_indices(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    if not all(SAMPLE_INDEX in sample for sample in samples):
        return {}
    return {SAMPLE_INDICES: torch.stack([sample[SAMPLE_INDEX] for sample in samples])}


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)


def conversation_starts(position_ids: Tensor) -> Tensor:
    """Return where conversations begin in rows of `position_ids` (B, T) -> (B, T), True at first tokens.

    A conversation has at least two tokens, so its 0 is followed by 1; at padding, 0 follows 0.
    """
    following = torch.nn.functional.pad(position_ids[:, 1:], (0, 1))
    return (position_ids == 0) & (following == 1)


def count_padding(batch: Mapping[str, Any]) -> Tensor:
    """Count the positions of a batch that hold no token -> a number on the batch's device."""
    if "attention_mask" in batch:
        return (batch["attention_mask"] == 0).sum()
    if "cu_seq_lens_q" in batch:
        return batch["input_ids"].new_zeros(())
    position_ids = batch["position_ids"]
    return (position_ids == 0).sum() - conversation_starts(position_ids).sum()


def count_conversations(batch: Mapping[str, Any]) -> Tensor:
    """Count the conversations of a batch -> a number on the batch's device."""
    if "attention_mask" in batch:
        return batch["input_ids"].new_full((), len(batch["attention_mask"]))
    if "cu_seq_lens_q" in batch:
        return batch["input_ids"].new_full((), len(batch["cu_seq_lens_q"]) - 1)
    return conversation_starts(batch["position_ids"]).sum()
