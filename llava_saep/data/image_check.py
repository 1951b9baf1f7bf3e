"""Decoding every image of a data set before training, so that what is damaged shows in minutes and not after days."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch.utils.data import DataLoader, Dataset

from llava_saep.data.dataset import ConversationDataset
from llava_saep.data.progress import show_progress
from llava_saep.data.records import BadSampleError, SampleSource


class _Finding(NamedTuple):
    """What a worker sends: an error's parts, since an exception loses its own on the way."""

    index: int
    message: str
    source: SampleSource
    cause: str


class _ImageCheck(Dataset[_Finding | None]):
    """The samples of a data set as findings about their images."""

    def __init__(self, dataset: ConversationDataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> _Finding | None:
        index = self.indices[position]
        error = self.dataset.find_damaged_image(index)
        return None if error is None else _Finding(index, str(error), error.source, error.cause)


def find_damaged_images(
    dataset: ConversationDataset, indices: Sequence[int], *, num_workers: int
) -> dict[int, BadSampleError]:
    """Decode the images of some samples.

    Args:
        indices: which samples.
        num_workers: processes that decode; 0: this one.
    Returns:
        what is wrong, by index, in the order of `indices`.
    """
    loader = DataLoader(
        _ImageCheck(dataset, indices), batch_size=32, num_workers=num_workers, collate_fn=_only_findings
    )
    found = (finding for batch in show_progress(loader, "Decoding all images", "batches") for finding in batch)
    return {finding.index: BadSampleError(finding.message, finding.source, finding.cause) for finding in found}


def _only_findings(batch: list[_Finding | None]) -> list[_Finding]:
    return [finding for finding in batch if finding is not None]
