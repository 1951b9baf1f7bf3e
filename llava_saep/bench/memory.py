"""Peak memory of a step beyond what was there before it (weights and features)."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

_KINETO_LOG_LEVEL = "KINETO_LOG_LEVEL"

METHODS = {
    "cuda": "torch.cuda.max_memory_allocated of one step in a pass of its own",
    "cpu": "every allocation and release of torch's CPU allocator in one step, as torch.profiler records them "
    "(profile_memory), in a pass of its own; memory that math libraries take for themselves is not in it",
}
"""How the peak is found, by device type; on others it is not measured."""


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Highest bytes allocated during a step, beyond weights and features; `forward` without a graph."""

    forward: int
    forward_backward: int


def peak_of(run: Callable[[], None], device: torch.device) -> int | None:
    """Bytes that `run` has allocated at its highest, beyond what was allocated before; None where nothing tells."""
    if device.type == "cuda":
        return _peak_on_cuda(run, device)
    return _peak_on_cpu(run) if device.type == "cpu" else None


def _peak_on_cuda(run: Callable[[], None], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(run: Callable[[], None]) -> int:
    with quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        allocated += change.nbytes()
        peak = max(peak, allocated)
    return peak


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Keep the profiler's library from writing lines about itself to stderr."""
    before = os.environ.get(_KINETO_LOG_LEVEL)
    os.environ.setdefault(_KINETO_LOG_LEVEL, "99")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_KINETO_LOG_LEVEL, None)
