"""`llava-saep bench packing`: what padding and a long row's attention cost, as text."""

import argparse
from collections.abc import Sequence

import torch

from llava_saep.bench.packing import Batching, RowTiming, compare_batchings, draw_lengths, time_row
from llava_saep.commands.projectors.flags import positive
from llava_saep.machine import describe_machine
from llava_saep.train.distributed import has_accelerator


def main(argv: Sequence[str]) -> int:
    """Plan, measure and print."""
    flags = _parser().parse_args(argv)
    lengths = draw_lengths(
        flags.num_conversations, num_image_tokens=flags.image_tokens, max_length=flags.model_max_length, seed=flags.seed
    )
    batchings = compare_batchings(
        lengths,
        max_length=flags.model_max_length,
        batch_size=flags.batch_size,
        world_size=flags.world_size,
        seed=flags.seed,
    )
    print("\n".join(_batching_lines(lengths, batchings, flags)))
    device = torch.device("cuda" if has_accelerator() and torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    timings = time_row(num_segments=flags.segments, segment_tokens=flags.segment_tokens, device=device, dtype=dtype)
    print("\n".join(["", *_timing_lines(timings, flags, device)]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava-saep bench packing", description=__doc__)
    sizes = {
        "num_conversations": (665_000, "conversations drawn after LLaVA-1.5's instruction data"),
        "image_tokens": (576, "tokens that the projector makes of an image"),
        "model_max_length": (2048, "most tokens in a row"),
        "batch_size": (16, "rows per device and forward pass"),
        "world_size": (8, "devices, for grouping"),
        "segments": (16, "conversations in the row whose attention is timed"),
        "segment_tokens": (128, "tokens of each of them"),
    }
    for name, (default, meaning) in sizes.items():
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"{meaning} (default: {default})")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and the order (default: 0)")
    return parser


def _batching_lines(lengths: Sequence[int], batchings: Sequence[Batching], flags: argparse.Namespace) -> list[str]:
    tokens = sum(abs(length) for length in lengths)
    width = max(len(batching.name) for batching in batchings)
    lines = [
        f"{len(lengths):,} conversations, {tokens / len(lengths):.0f} tokens on average, images {flags.image_tokens}; "
        f"{flags.batch_size} rows of at most {flags.model_max_length} tokens per batch",
        "",
        f"{'batches':<{width}}  {'padding':>8}  {'rows':>9}  {'rows left empty':>15}",
    ]
    for batching in batchings:
        unused = "" if batching.unused is None else f"{batching.unused:.1%}"
        lines.append(
            f"{batching.name:<{width}}  {batching.padding:>8.1%}  {batching.num_rows:>9,}  {unused:>15}".rstrip()
        )
    return lines


def _timing_lines(timings: Sequence[RowTiming], flags: argparse.Namespace, device: torch.device) -> list[str]:
    machine = describe_machine(device)
    unit = "CPU-seconds" if device.type == "cpu" else "seconds"
    where = machine.get("gpu", machine["processor"])
    width = max(len(timing.attention) for timing in timings)
    lines = [
        f"one row of {flags.segments} conversations of {flags.segment_tokens} tokens, forward and backward through 6 "
        f"layers of 512 channels, on {where} ({machine['num_threads']} thread(s), commit {machine['commit']})",
        "",
    ]
    return lines + [f"{timing.attention:<{width}}  {timing.seconds:8.3f} {unit}" for timing in timings]
