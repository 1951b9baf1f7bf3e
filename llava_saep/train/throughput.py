"""How many tokens a run learns from, how many positions it wastes on padding, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llava_saep.constants import IGNORE_INDEX
from llava_saep.data.collator import count_conversations, count_padding

_COUNTED = ("tokens", "padding", "supervised", "conversations", "images")


def count_batch(batch: Mapping[str, Any], image_token_id: int) -> Tensor:
    """Count what a batch holds -> (5,) of int64 in the order of `_COUNTED`, on the batch's device.

    Tokens are those of conversations, the images' among them; supervised ones have a loss. The zero image of a batch
    without images does not count.
    """
    input_ids = batch["input_ids"]
    padding = count_padding(batch)
    has_images = (input_ids == image_token_id).any()
    counts = (
        input_ids.numel() - padding,
        padding,
        (batch["labels"][:, 1:] != IGNORE_INDEX).sum(),
        count_conversations(batch),
        has_images * len(batch["pixel_values"]),
    )
    return torch.stack(counts).long()


class Throughput:
    """Sums up batches between two log entries, on this rank; `report` joins the ranks.

    Args:
        image_token_id: the placeholder's id.
        read_clock: seconds; for tests.
    """

    def __init__(self, image_token_id: int, read_clock: Callable[[], float] = time.monotonic) -> None:
        self._image_token_id = image_token_id
        self._read_clock = read_clock
        self._started: float | None = None
        self._counts: Tensor | None = None

    def start(self) -> None:
        """Start the clock, unless it runs already."""
        if self._started is None:
            self._started = self._read_clock()

    def add(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count the batches of an optimizer step; nothing waits for the device."""
        for batch in batches:
            counts = count_batch(batch, self._image_token_id)
            self._counts = counts if self._counts is None else self._counts + counts

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock inside the block: saving and evaluating are no training."""
        before = self._read_clock()
        try:
            yield
        finally:
            if self._started is not None:
                self._started += self._read_clock() - before

    def report(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Say what was done since the last report, and begin anew; every rank must call it.

        Args:
            add_up: sums a tensor over all ranks.
        Returns:
            `tokens`, `supervised`, `conversations` and `images` as numbers, `padding` as share of all positions, and
            `tokens_per_second`; nothing if no batch was added.
        """
        if self._counts is None or self._started is None:
            return {}
        now = self._read_clock()
        sums = dict(zip(_COUNTED, add_up(self._counts).tolist(), strict=True))
        seconds = now - self._started
        self._counts, self._started = None, now
        num_positions = sums["tokens"] + sums["padding"]
        return {
            **sums,
            "padding": sums["padding"] / num_positions,
            "tokens_per_second": sums["tokens"] / seconds if seconds > 0 else 0.0,
        }
