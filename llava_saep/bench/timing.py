"""Wall-clock times of repeated runs: taking them, ordering them, and summing them up."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, in the order of measuring."""

    seconds: tuple[float, ...] = ()

    def with_repeat(self, seconds: float) -> "Timing":
        """One repeat more."""
        return Timing((*self.seconds, seconds))

    @property
    def median(self) -> float | None:
        """The middle repeat, which a few disturbed ones do not move; None before the first."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """First and third quartile of the repeats, interpolated between neighbours."""
        if not self.seconds:
            return None
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    @property
    def spread(self) -> float | None:
        """Half the distance between the quartiles, as a share of the median; None before there are two repeats."""
        if len(self.seconds) < 2:
            return None
        first, third = self.quartiles
        return (third - first) / 2 / self.median


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds from the call until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for what the device has been given to do."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def interleaved(names: Sequence[str], num_rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name): every name once per round, so that a machine that grows slower or busier meets all alike."""
    for round_index in range(num_rounds):
        for name in names:
            yield round_index, name
