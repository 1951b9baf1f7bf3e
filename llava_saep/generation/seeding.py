"""Random numbers of one answer's own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from a seed inside the block, and leave the program's random numbers as they were; None: do neither."""
    if seed is None:
        yield
        return
    on_device = {} if device.type == "cpu" else {"device_type": device.type}
    with torch.random.fork_rng(devices=[device] if on_device else [], **on_device):
        torch.manual_seed(seed)
        yield
