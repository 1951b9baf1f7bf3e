"""Progress bars for work that may take long, on the first rank only."""

import os
from collections.abc import Collection, Iterable
from typing import TypeVar

from tqdm import tqdm

DELAY_SECONDS = 3
"""Work that takes less shows no bar."""

T = TypeVar("T")


def show_progress(items: Collection[T], description: str, unit: str) -> Iterable[T]:
    """Pass `items` through, with a bar once that takes longer than DELAY_SECONDS."""
    is_first_rank = os.environ.get("RANK", "0") == "0"
    return tqdm(items, desc=description, unit=f" {unit}", delay=DELAY_SECONDS, disable=not is_first_rank)
