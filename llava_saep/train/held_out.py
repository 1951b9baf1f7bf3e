"""Loss and token accuracy on held-out records, the same number for any number of ranks.

Each rank gets every n-th record, and what divides unevenly is filled up with a sample that has no supervised token, so
that ranks make equally many calls and nothing counts twice. Only sums cross between ranks, never logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from llava_saep.constants import IGNORE_INDEX
from llava_saep.data.collator import SAMPLE_INDICES
from llava_saep.data.dataset import ConversationDataset

Sample = dict[str, Any]


def blank_sample(pad_token_id: int) -> Sample:
    """Make a sample of two tokens without an image and without anything to learn."""
    return {"input_ids": torch.full((2,), pad_token_id), "labels": torch.full((2,), IGNORE_INDEX)}


class HeldOutShard(Dataset[Sample]):
    """One rank's share of a data set, equally long on every rank, in the order of lengths to pad little.

    A sample that cannot be read counts for nothing and is noted in the data set's ledger.
    """

    def __init__(self, dataset: ConversationDataset, *, rank: int, world_size: int, blank: Sample) -> None:
        longest_first = sorted(range(len(dataset)), key=dataset.lengths.__getitem__, reverse=True)
        own: list[int | None] = list(longest_first[rank::world_size])
        self._indices = own + [None] * (math.ceil(len(dataset) / world_size) - len(own))
        self._dataset = dataset
        self._blank = blank

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Sample:
        index = self._indices[position]
        sample = None if index is None else self._dataset.load_or_skip(index)
        return self._blank if sample is None else sample


def held_out_loader(
    shard: HeldOutShard, *, batch_size: int, collator: Callable[[list[Sample]], dict[str, Any]], num_workers: int
) -> DataLoader:
    """Make the loader of a shard; it draws no random numbers from the training's generator."""
    return DataLoader(
        shard,
        batch_size=batch_size,
        collate_fn=collator,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),
    )


@dataclass(frozen=True)
class HeldOutSums:
    """What is added up over batches and ranks.

    Args:
        loss: sum of the cross-entropies.
        num_right: supervised tokens that had the highest logit.
        num_tokens: supervised tokens.
    """

    loss: float = 0.0
    num_right: int = 0
    num_tokens: int = 0

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the token means, under the names that are logged; NaN where there is no supervised token."""
        count = self.num_tokens or math.nan
        return {
            f"{prefix}_loss": self.loss / count,
            f"{prefix}_token_accuracy": self.num_right / count,
            f"{prefix}_supervised": self.num_tokens,
        }


def measure(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], prepare: Callable[[Any], Any], on_batch: Callable[[], None]
) -> HeldOutSums:
    """Add up this rank's batches.

    Args:
        model: takes `labels` and `logits_at_labels`; is put into evaluation mode.
        prepare: moves a batch to the model's device.
        on_batch: called after each.
    """
    model.eval()
    loss, num_right, num_tokens = 0.0, 0, 0
    for batch in batches:
        inputs = prepare({name: value for name, value in batch.items() if name != SAMPLE_INDICES})
        with torch.no_grad():
            logits = model(**inputs, logits_at_labels=True).logits.float()
        targets = supervised_targets(inputs["labels"])
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        num_right += int((logits.argmax(-1) == targets).sum())
        num_tokens += len(targets)
        on_batch()
    return HeldOutSums(loss, num_right, num_tokens)


def supervised_targets(labels: Tensor) -> Tensor:
    """Return what is to be predicted, in row-major order: labels (B, T) -> (targets,)."""
    targets = labels[:, 1:]
    return targets[targets != IGNORE_INDEX]


def add_up(sums: HeldOutSums, device: torch.device) -> HeldOutSums:
    """Add up the sums of all ranks; every rank must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sums
    totals = torch.tensor([sums.loss, sums.num_right, sums.num_tokens], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(totals)
    loss, num_right, num_tokens = totals.tolist()
    return HeldOutSums(loss, int(num_right), int(num_tokens))
