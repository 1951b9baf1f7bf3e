"""Which questions are answered together, and by which rank: arithmetic on prompt lengths, which opens nothing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

Batch = tuple[int, ...]
"""Positions of questions in their file."""


def plan_batches(lengths: Sequence[int], batch_size: int, *, num_ranks: int = 1) -> list[Batch]:
    """Put prompts of similar length together, the longest first, so that what does not fit into memory shows early.

    Prompts of one length keep their order. Batches are smaller than `batch_size` where ranks would have none otherwise.

    Args:
        lengths: of each prompt, in tokens, or in anything that grows with them.
    Returns:
        positions in `lengths`, each once.
    """
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    size = min(batch_size, max(1, math.ceil(len(order) / num_ranks)))
    return [tuple(order[start : start + size]) for start in range(0, len(order), size)]


def batches_of_rank(batches: Sequence[Batch], rank: int, num_ranks: int) -> list[Batch]:
    """Every `num_ranks`-th batch: all ranks get long prompts and short ones, each batch is one rank's."""
    return list(batches[rank::num_ranks])


class BatchQueue:
    """Batches that are still to be answered, in halves from the moment when one did not fit into memory."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = deque(batches)
        self.largest_size = max((len(batch) for batch in self._batches), default=1)

    def take(self) -> Batch | None:
        """Remove and return the next batch; None at the end."""
        if not self._batches:
            return None
        batch = self._batches.popleft()
        if len(batch) > self.largest_size:
            self._batches.appendleft(batch[self.largest_size :])
        return batch[: self.largest_size]

    def peek(self) -> Batch:
        """The batch that `take` would return; empty at the end."""
        return self._batches[0][: self.largest_size] if self._batches else ()

    def put_back_halved(self, batch: Batch) -> None:
        """Have a batch of at least two answered in halves, and no larger ones from now on."""
        self.largest_size = max(1, len(batch) // 2)
        self._batches.appendleft(batch)

    def put_back_singly(self, batch: Batch) -> None:
        """Have the questions of one batch answered one by one; others stay as they are."""
        self._batches.extendleft((position,) for position in reversed(batch))
