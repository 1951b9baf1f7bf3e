"""LLaVA's order of samples: batches of similar length, and either all with images or all text only.

Samples of similar length waste little padding; batches of one modality keep ranks equally busy. The order is global:
consecutive runs of `batch_size` go to the ranks in turn, as accelerate deals them out. Given the same random state it
equals the order of LLaVA's trainer (llava/train/llava_trainer.py), which tests compare with.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthGroupedSampler(Sampler[int]):
    """Yields all indices, grouped by length and, if asked, by modality; the same for the same seed and epoch."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        world_size: int,
        seed: int,
        group_by_modality: bool = True,
    ) -> None:
        """
        Args:
            lengths: tokens per sample; negative for text-only samples (ConversationDataset.modality_lengths). Without
                group_by_modality the sign is ignored.
            batch_size: samples per device and forward pass.
            world_size: ranks times gradient accumulation steps: how many batches make one optimizer step.
            seed: with the epoch, decides the order.
        Raises:
            ValueError: a length is 0, or a count is below 1.
        """
        if min(batch_size, world_size) < 1:
            raise ValueError(f"batch_size and world_size must be at least 1, not {batch_size} and {world_size}")
        if not all(lengths):
            raise ValueError(f"sample {list(lengths).index(0)} has length 0; its modality is unknown")
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.group_by_modality = group_by_modality
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; the trainer calls this at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.group_by_modality:
            indices = modality_grouped_indices(self.lengths, self.batch_size, self.world_size, generator)
        else:
            indices = length_grouped_indices(
                [abs(length) for length in self.lengths], self.batch_size, self.world_size, generator
            )
        return iter(indices)


def length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator
) -> list[int]:
    """Shuffle, then sort by length within each run of `batch_size * world_size` samples and deal it out evenly.

    Args:
        lengths: positive.
    Returns:
        A permutation of range(len(lengths)).
    """
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    order = []
    for step in _runs(shuffled, batch_size * world_size):
        longest_first = sorted(step, key=lambda index: lengths[index], reverse=True)
        order += [index for batch in deal_evenly(longest_first, lengths, world_size) for index in batch]
    return order


def modality_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator
) -> list[int]:
    """As length_grouped_indices, with every optimizer step all images or all text.

    What is left over of both kinds makes one mixed step at the end, in ascending order (LLaVA's rule).

    Args:
        lengths: positive for samples with images, negative for text-only samples.
    Returns:
        A permutation of range(len(lengths)).
    """
    with_images = [index for index, length in enumerate(lengths) if length > 0]
    text_only = [index for index, length in enumerate(lengths) if length < 0]
    if not with_images or not text_only:
        return length_grouped_indices([abs(length) for length in lengths], batch_size, world_size, generator)
    steps: list[list[int]] = []
    left_over: list[int] = []
    for members in (with_images, text_only):
        member_lengths = [abs(lengths[index]) for index in members]
        order = length_grouped_indices(member_lengths, batch_size, world_size, generator)
        *full, last = _runs([members[position] for position in order], batch_size * world_size)
        steps += full
        left_over += last  # also when it is full, as in LLaVA
    shuffled = torch.randperm(len(steps), generator=generator).tolist()
    return [index for position in shuffled for index in steps[position]] + sorted(left_over)


def deal_evenly(indices: Sequence[int], lengths: Sequence[int], num_batches: int) -> list[list[int]]:
    """Split a step into batches of equal size and nearly equal total length.

    Args:
        indices: longest first. A number that does not divide into `num_batches` is dealt out in turn.
    """
    if len(indices) % num_batches:
        return [list(indices[start::num_batches]) for start in range(num_batches)]
    batch_size = len(indices) // num_batches
    batches: list[list[int]] = [[] for _ in range(num_batches)]
    totals = [0] * num_batches
    for index in indices:
        open_batches = [number for number in range(num_batches) if len(batches[number]) < batch_size]
        lightest = min(open_batches, key=totals.__getitem__)
        batches[lightest].append(index)
        totals[lightest] += lengths[index]
    return batches


def padding_share(lengths: Sequence[int], batch_size: int) -> float:
    """Return which share of all positions is padding when batches are padded to their longest row, in [0, 1).

    Args:
        lengths: tokens of each row, in the order of training.
        batch_size: rows per device and forward pass.
    """
    batches = _runs(list(lengths), batch_size)
    num_positions = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / num_positions


def _runs(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
