"""What was measured, for a program: one JSON document with every repeat, the settings, the machine and the methods."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llava_saep.bench.memory import METHODS
from llava_saep.bench.profiling import StepProfile
from llava_saep.bench.projectors import Measurement, ProjectorBenchmark
from llava_saep.bench.timing import Timing

BASELINE = "mlp2x_gelu"
"""LLaVA-1.5's projector, with which the others are compared."""

GIGA = 10**9

METHOD = {
    "timing": "wall-clock time of one call with the device synchronised before and after it; every projector once per "
    "round, the rounds repeated; forward in evaluation mode without a graph, forward_backward in training mode with a "
    "given gradient of the output; one untimed run first; spread: half the distance between the quartiles, as a share "
    "of the median",
    "flops": "multiplications and additions of matrix products and convolutions, counted on the meta device with "
    "torch.utils.flop_counter (backward of grouped convolutions corrected); norms, activations and pooling not counted",
    "features": "random, one tensor per layer read, each (batch, patches, channels) as what is left of "
    "(batch, 1 + patches, channels) without the class token",
    "weight_bytes": "parameters and buffers in the chosen number format",
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A projector's numbers divided by the baseline's; `..._per_flop` compares them at equal work."""

    forward_flops: float
    forward_seconds: float
    forward_seconds_per_flop: float
    forward_backward_flops: float
    forward_backward_seconds: float
    forward_backward_seconds_per_flop: float


def seconds_per_gflop(timing: Timing, flops: int | None) -> float | None:
    """Median time per 10**9 operations; None where nothing was timed, or nothing that is counted is done."""
    return timing.median / (flops / GIGA) if timing.median is not None and flops else None


def compare(row: Measurement, baseline: Measurement) -> Comparison | None:
    """Divide by the baseline; None where one of them has no times or no counted operations."""
    is_complete = all(each.flops and each.flops.forward and each.forward_backward.seconds for each in (row, baseline))
    if not is_complete:
        return None
    forward_flops = row.flops.forward / baseline.flops.forward
    training_flops = row.flops.total / baseline.flops.total
    forward_seconds = row.forward.median / baseline.forward.median
    training_seconds = row.forward_backward.median / baseline.forward_backward.median
    return Comparison(
        forward_flops=forward_flops,
        forward_seconds=forward_seconds,
        forward_seconds_per_flop=forward_seconds / forward_flops,
        forward_backward_flops=training_flops,
        forward_backward_seconds=training_seconds,
        forward_backward_seconds_per_flop=training_seconds / training_flops,
    )


def bench_document(
    benchmark: ProjectorBenchmark,
    *,
    command: Sequence[str],
    machine: Mapping[str, Any],
    profile: StepProfile | None = None,
    interrupted: bool = False,
) -> dict[str, Any]:
    """Everything, JSON-able; times in seconds, memory in bytes."""
    workload, rows = benchmark.workload, benchmark.measurements
    memory_method = METHODS.get(workload.device.type, f"not measured on {workload.device.type}")
    baseline = next((row for row in rows if row.name == BASELINE), None)
    return {
        "command": list(command),
        "machine": dict(machine),
        "settings": {
            **asdict(workload.sizes),
            "grid": list(workload.sizes.grid),
            "batch_size": workload.batch_size,
            "dtype": str(workload.dtype).removeprefix("torch."),
            "device": str(workload.device),
            "train_tower": workload.train_tower,
            "compile": workload.compile,
            "num_warmup": benchmark.num_warmup,
            "num_repeats": benchmark.num_repeats,
        },
        "method": {**METHOD, "peak_memory_bytes": f"beyond weights and features: {memory_method}"},
        "baseline": None if baseline is None else BASELINE,
        "interrupted": interrupted,
        "projectors": [_row_as_mapping(row, baseline) for row in rows],
        "profile": None if profile is None else _profile_as_mapping(profile),
    }


def _row_as_mapping(row: Measurement, baseline: Measurement | None) -> dict[str, Any]:
    comparison = compare(row, baseline) if baseline is not None else None
    return {
        "name": row.name,
        "error": row.error,
        "selection": row.selection.to_dict(),
        "vision_layers": None if row.config is None else list(row.config.vision_layers),
        "num_tokens": row.num_tokens,
        "num_parameters": row.num_parameters,
        "weight_bytes": row.weight_bytes,
        "flops": None if row.flops is None else row.flops._asdict(),
        "peak_memory_bytes": None if row.peak_memory is None else asdict(row.peak_memory),
        "forward": _timing_as_mapping(row.forward, row.flops and row.flops.forward),
        "forward_backward": _timing_as_mapping(row.forward_backward, row.flops and row.flops.total),
        "relative_to_baseline": None if comparison is None else asdict(comparison),
    }


def _timing_as_mapping(timing: Timing, flops: int | None) -> dict[str, Any]:
    return {
        "seconds": list(timing.seconds),
        "median_seconds": timing.median,
        "quartiles_seconds": timing.quartiles,
        "spread": timing.spread,
        "seconds_per_gflop": seconds_per_gflop(timing, flops),
    }


def _profile_as_mapping(profile: StepProfile) -> dict[str, Any]:
    return {
        "operators": [asdict(operator) for operator in profile.operators],
        "copies": [
            {**asdict(copies.site), **{name: value for name, value in asdict(copies).items() if name != "site"}}
            | {"is_counted_elsewhere": copies.is_wrapper}
            for copies in profile.copies
        ],
        "num_copied_bytes": profile.num_copied_bytes,
    }
