"""What was measured, for a program: one JSON document with every step, the settings, the machine and the methods."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llava_saep.bench.timing import Timing
from llava_saep.bench.training.benchmark import SideResult, TrainingBenchmark, loss_disagreement, relative_to

METHOD = {
    "step": "from the end of the optimizer step before to the end of this one: batch from samples in memory, forward, "
    "backward, gradient clipping, optimizer, log; the device synchronised at both ends; every step trains on the same "
    "conversations",
    "sides": "each in a process of its own; the stock side is transformers' LlavaForConditionalGeneration under its "
    "Trainer with the library's defaults (sdpa, its loss, padding to the longest), the own sides are what "
    "`llava-saep train` makes of `own_flags`, with weights and samples drawn in memory in place of files",
    "peak_memory_cpu": "highest resident memory of the process (VmHWM) less what it had after all imports; weights, "
    "gradients, optimizer and batch are in it",
    "peak_memory_cuda": "torch.cuda.max_memory_allocated; weights, gradients, optimizer and batch are in it",
    "cpu_seconds": "of all threads of the process, per step",
    "padding_waste": "share of the positions given to the language model that hold no token of a conversation",
    "utilisation": "needed operations per second divided by the device's dense bf16 peak; needed are the matrix "
    "products of real tokens: attention below the diagonal, the head at supervised positions, the tower to the deepest "
    "layer read, backward only for what is trained and what it is reached through, nothing twice",
    "first_loss": "of the first step; sides with the same projector start from the same weights",
}


def training_document(
    benchmark: TrainingBenchmark,
    *,
    command: Sequence[str],
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    interrupted: bool = False,
) -> dict[str, Any]:
    """Everything, JSON-able; times in seconds, memory in bytes.

    Args:
        settings: what the command adds to the workload's: preset, flags of the own sides.
    """
    results, workload = benchmark.results, benchmark.workload
    baseline = next((result for result in results if result.side.is_stock), None)
    device_name = str(machine.get("gpu", machine["processor"]))
    return {
        "command": list(command),
        "machine": dict(machine),
        "settings": {
            **settings,
            "shape": asdict(workload.shape),
            "train": workload.train,
            "batch_size": workload.batch_size,
            "num_micro_batches": workload.num_micro_batches,
            "texts": asdict(workload.texts),
            "device": workload.device,
            "dtype": workload.dtype,
            "seed": workload.seed,
            "num_threads": workload.num_threads,
            "num_warmup": benchmark.num_warmup,
            "num_rounds": benchmark.num_rounds,
            "steps_per_round": benchmark.steps_per_round,
        },
        "method": METHOD,
        "interrupted": interrupted,
        "baseline": None if baseline is None else baseline.side.name,
        "first_loss_disagreement": loss_disagreement(results),
        "sides": [_side_as_mapping(result, baseline, device_name) for result in results],
    }


def _side_as_mapping(result: SideResult, baseline: SideResult | None, device_name: str) -> dict[str, Any]:
    return {
        "name": result.side.name,
        "error": result.error,
        "projector": result.side.projector,
        "num_image_tokens": result.num_image_tokens,
        "batch_size": result.batch_size,
        "num_tokens": result.num_tokens,
        "num_supervised": result.num_supervised,
        "steps": [asdict(step) for step in result.steps],
        "seconds": _timing_as_mapping(result.wall),
        "cpu_seconds": _timing_as_mapping(result.cpu),
        "samples_per_second": result.samples_per_second,
        "supervised_tokens_per_second": result.supervised_tokens_per_second,
        "peak_memory_bytes": result.peak_memory_bytes,
        "padding_waste": result.padding_waste,
        "flops": {**asdict(result.work), "total": result.work.total},
        "utilisation": result.utilisation(device_name),
        "first_loss": result.first_loss,
        "times_better_than_baseline": None if baseline is None else relative_to(result, baseline),
    }


def _timing_as_mapping(timing: Timing) -> dict[str, float | None]:
    return {"median": timing.median, "spread": timing.spread}
