"""Which conversations share a row: whole ones, by their lengths alone, the same for the same seed.

Rows are planned once, before training. The order in which they come is the sampler's, so shuffling, sharding over ranks
and resuming work on rows as they do on single conversations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llava_saep.data.dataset import ConversationDataset
from llava_saep.errors import UserError

WINDOW = 16_384
"""Conversations that are packed together. Within a window the long ones find short partners; drawing the windows at
random keeps the company that a conversation gets random too."""


@dataclass(frozen=True)
class PackingPlan:
    """Rows of conversations.

    Attributes:
        rows: indices of the conversations in each row; every one is in exactly one row.
        lengths: tokens of each conversation.
        capacity: most tokens in a row.
    """

    rows: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    capacity: int

    @cached_property
    def row_lengths(self) -> list[int]:
        """Tokens of each row."""
        return [sum(self.lengths[index] for index in row) for row in self.rows]

    @property
    def unused_share(self) -> float:
        """Share of the rows' capacity that stays empty, in [0, 1)."""
        return 1 - sum(self.lengths) / (len(self.rows) * self.capacity)

    def __str__(self) -> str:
        return (
            f"{len(self.lengths):,} conversations in {len(self.rows):,} rows of at most {self.capacity:,} tokens: "
            f"{len(self.lengths) / len(self.rows):.2f} per row, {self.unused_share:.1%} of the rows left empty"
        )


def plan_rows(lengths: Sequence[int], *, capacity: int, seed: int, window: int = WINDOW) -> PackingPlan:
    """Pack conversations into rows: first fit, longest first, within windows drawn at random.

    Takes O(n log window): 665,000 conversations in a few seconds.

    Args:
        lengths: tokens of each conversation, positive.
        capacity: most tokens in a row.
        seed: decides which conversations come into a window together.
    Raises:
        UserError: a conversation is longer than a row.
    """
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > capacity:
        raise UserError(
            f"sample {longest} has {lengths[longest]} tokens, more than the {capacity} of a row; raise "
            "--model_max_length, or train without --packing"
        )
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    rows: list[tuple[int, ...]] = []
    for start in range(0, len(order), window):
        longest_first = sorted(order[start : start + window], key=lambda index: lengths[index], reverse=True)
        places = first_fit([lengths[index] for index in longest_first], capacity)
        contents: list[list[int]] = [[] for _ in range(max(places) + 1)]
        for index, place in zip(longest_first, places, strict=True):
            contents[place].append(index)
        rows += map(tuple, contents)
    return PackingPlan(tuple(rows), tuple(lengths), capacity)


def first_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """Put each item, in the order given, into the first bin that has room for it.

    Args:
        lengths: each at most `capacity`.
    Returns:
        the bin of each item, counted from 0.
    """
    # A tournament tree: node k knows the largest room below it, its children are 2k and 2k + 1, the leaves are bins.
    num_leaves = 1 << (len(lengths) - 1).bit_length()
    room = [capacity] * (2 * num_leaves)
    bins = []
    for length in lengths:
        node = 1
        while node < num_leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        bins.append(node - num_leaves)
        room[node] -= length
        while node > 1:
            node //= 2
            largest = max(room[2 * node], room[2 * node + 1])
            if room[node] == largest:
                break
            room[node] = largest
    return bins


class PackedDataset(Dataset[list[dict[str, Tensor]]]):
    """Rows of a plan: each item is the list of its conversations, as `ConversationDataset` makes them."""

    def __init__(self, dataset: ConversationDataset, plan: PackingPlan) -> None:
        self.dataset = dataset
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan.rows)

    def __getitem__(self, index: int) -> list[dict[str, Tensor]]:
        """Load a row. With on_bad_sample "skip", an unusable conversation is left out, and an empty row is the next.

        A replacement of another length, which a single conversation would get, might not fit.

        Raises:
            IndexError: `index` is outside the data set.
            BadSampleError: a conversation cannot be used and on_bad_sample is "error".
            UserError: with "skip", no conversation of any row can be used.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a data set with {len(self)} rows")
        for offset in range(len(self)):
            row = self.plan.rows[(index + offset) % len(self)]
            samples = [sample for member in row if (sample := self.dataset.load_or_skip(member)) is not None]
            if samples:
                return samples
        raise self.dataset.nothing_usable()

    @property
    def skipped(self) -> dict[str, int]:
        """See `ConversationDataset.skipped`."""
        return self.dataset.skipped

    @property
    def image_size(self) -> tuple[int, int]:
        """See `ConversationDataset.image_size`."""
        return self.dataset.image_size
