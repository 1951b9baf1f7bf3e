"""What becomes of the samples of a data set while it is read: which were replaced, and which were cut.

One flag per sample in memory that worker processes share, so that a sample is counted once however often and wherever
it is met, and a damaged image is not opened again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava_saep.data.records import CAUSES

NUM_EXAMPLES = 3
"""Samples that a report names of each kind."""


class SampleLedger:
    """Flags of one data set's samples.

    Args:
        num_samples: length of the data set.
    """

    def __init__(self, num_samples: int) -> None:
        # Row 0: 1 + number of the cause, or 0; row 1: 1 where the sample was cut.
        self._flags = torch.zeros(2, num_samples, dtype=torch.uint8).share_memory_()

    def note_bad(self, index: int, cause: str) -> bool:
        """Remember that a sample cannot be used; return whether it is the first of its cause."""
        number = 1 + CAUSES.index(cause)
        is_first = not (self._flags[0] == number).any()
        self._flags[0, index] = number
        return is_first

    def note_cut(self, index: int) -> None:
        """Remember that a sample was cut to the longest that is allowed."""
        self._flags[1, index] = 1

    def is_bad(self, index: int) -> bool:
        """Whether a sample was found to be unusable before."""
        return bool(self._flags[0, index])

    def bad_indices(self) -> dict[str, list[int]]:
        """Samples that were found to be unusable, by cause."""
        found = {cause: (self._flags[0] == number).nonzero().flatten() for number, cause in enumerate(CAUSES, start=1)}
        return {cause: indices.tolist() for cause, indices in found.items() if len(indices)}

    def cut_indices(self) -> list[int]:
        """Samples that were cut."""
        return self._flags[1].nonzero().flatten().tolist()

    @property
    def num_noted(self) -> int:
        """How many samples have a flag of either kind."""
        return int(self._flags.count_nonzero())

    def take_over(self, flags: Tensor) -> None:
        """Add flags that others have set; those that workers have set here meanwhile stay."""
        torch.maximum(self._flags, flags, out=self._flags)

    @property
    def flags(self) -> Tensor:
        """(2, samples): what ranks compare notes with, the larger value of each place winning."""
        return self._flags


@dataclass(frozen=True)
class DataAccount:
    """How a data set was used, as a summary tells it.

    Args:
        path: the file.
        num_records: records in it.
        num_used: those that are samples.
        left_out: records that were left out before training, by cause.
        replaced: samples that were replaced while training, by cause.
        num_cut: samples that were cut, of those that were read.
        examples: for each cause, and for "cut", a few messages that name file, index and id.
    """

    path: str
    num_records: int
    num_used: int
    left_out: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, int] = field(default_factory=dict)
    num_cut: int = 0
    examples: dict[str, Sequence[str]] = field(default_factory=dict)
