"""`llava-saep projectors bench [NAMES]`: parameters, tokens, operations, time and memory, as text, JSON and picture."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from llava_saep.bench.placement import refuse_unusable
from llava_saep.bench.plot import check_plot_path, plot_measurements
from llava_saep.bench.profiling import StepProfile
from llava_saep.bench.projectors import DEFAULT_PROJECTORS, ProjectorBenchmark
from llava_saep.bench.report import bench_document
from llava_saep.bench.workload import Workload
from llava_saep.commands.projectors.bench_tables import bench_lines, heading_lines, profile_lines
from llava_saep.commands.projectors.flags import add_option_flag, add_size_flags, not_negative, positive, sizes_of
from llava_saep.commands.projectors.progress import Progress
from llava_saep.commands.projectors.text import terminal_width
from llava_saep.errors import UserError
from llava_saep.machine import describe_machine
from projectors import parse_projector_options

EXIT_INTERRUPTED = 130
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: Sequence[str]) -> int:
    """Measure, print the tables and write what was asked for; after Ctrl-C with what there is by then.

    Raises:
        UserError: at the end, one that was named cannot be used or measured.
    """
    arguments = _parser().parse_args(argv)
    _refuse_contradictions(arguments)
    json_path = check_json_path(arguments.json) if arguments.json else None
    plot_path = check_plot_path(arguments.plot) if arguments.plot else None
    workload = workload_of(arguments)
    progress = Progress(sys.stderr)
    with _threads(arguments.threads):
        benchmark = plan_benchmark(arguments, workload, progress)
        profile, is_interrupted = _run(benchmark, arguments.profile)
        progress.clear()
        machine = describe_machine(workload.device)
    document = bench_document(
        benchmark,
        command=["llava-saep", "projectors", "bench", *argv],
        machine=machine,
        profile=profile,
        interrupted=is_interrupted,
    )
    # The file first: it holds everything, whatever happens to the terminal or the picture.
    if json_path is not None:
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    width = terminal_width()
    print("\n".join(bench_lines(document, width)))
    if profile is not None:
        print("\n" + "\n".join(profile_lines(profile, width)))
    if plot_path is not None:
        _plot(benchmark, document, plot_path)
    if json_path is not None:
        print(f"\nevery repeat, settings and machine: {json_path}")
    if is_interrupted:
        return EXIT_INTERRUPTED
    if arguments.names:
        refuse_unusable({row.name: row.error for row in benchmark.measurements})
    return 0


def plan_benchmark(arguments: argparse.Namespace, workload: Workload, progress: Progress) -> ProjectorBenchmark:
    """Look the projectors up; fewer repeats on a processor, where a step takes seconds instead of milliseconds."""
    is_slow = workload.device.type == "cpu"
    return ProjectorBenchmark(
        arguments.names or DEFAULT_PROJECTORS,
        workload,
        options=parse_projector_options(arguments.mm_projector_options),
        num_warmup=arguments.warmup if arguments.warmup is not None else (1 if is_slow else 5),
        num_repeats=arguments.repeats or (5 if is_slow else 30),
        progress=progress,
    )


def workload_of(arguments: argparse.Namespace) -> Workload:
    """Batch, number format and device.

    Raises:
        UserError: there is no such device here.
    """
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: {reason}") from error
    dtype = DTYPES[arguments.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    return Workload(
        sizes=sizes_of(arguments),
        batch_size=arguments.batch_size,
        dtype=dtype,
        device=device,
        train_tower=arguments.train_tower,
        compile=arguments.compile,
    )


def check_json_path(path: str) -> Path:
    """Find out before a long measurement whether the file can be written.

    Raises:
        UserError: its folder does not exist, or it is a folder.
    """
    checked = Path(path)
    if checked.is_dir() or not checked.parent.is_dir():
        raise UserError(f"--json {path}: expected the name of a file in a folder that exists")
    return checked


def _refuse_contradictions(arguments: argparse.Namespace) -> None:
    if arguments.mm_projector_options and len(arguments.names) != 1:
        raise UserError("--mm_projector_options belong to one projector: name it alone, as in `bench saep`")
    if arguments.profile and len(arguments.names) != 1:
        raise UserError("--profile looks into one projector: name it alone, as in `bench saep --profile`")


def _run(benchmark: ProjectorBenchmark, wants_profile: bool) -> tuple[StepProfile | None, bool]:
    """Returns the profile, and whether Ctrl-C ended the run early."""
    try:
        benchmark.run()
        return benchmark.profile() if wants_profile else None, False
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured so far follows", file=sys.stderr)
        return None, True


def _plot(benchmark: ProjectorBenchmark, document: dict, path: Path) -> None:
    title = "\n".join(heading_lines(document))
    num_drawn = plot_measurements(benchmark.measurements, path, title=title)
    print(f"\nplot of {num_drawn} projectors: {path}" if num_drawn else "\nno plot: nothing was timed")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-saep projectors bench",
        description="Measure projectors: every one runs once per round, and median and spread of the rounds are told. "
        "Times are absolute and per 10**9 floating-point operations, so that unequal projectors can be compared at "
        "equal work.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"whatever `llava-saep projectors show` takes (default: {' '.join(DEFAULT_PROJECTORS)})",
    )
    add_option_flag(parser)
    parser.add_argument("--batch_size", type=positive, default=8, help="images per batch (default 8)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of weights and features (default: fp32 on cpu, bf16 elsewhere)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--repeats", type=positive, help="timed rounds (default: 5 on cpu, 30 elsewhere)")
    parser.add_argument("--warmup", type=not_negative, help="rounds before them (default: 1 on cpu, 5 elsewhere)")
    parser.add_argument("--threads", type=positive, help="threads of torch on the processor (default: torch's own)")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile's version")
    parser.add_argument(
        "--train_tower", action="store_true", help="the features want a gradient, as of a tower that is trained too"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also: operators by time and every copy, of one projector"
    )
    parser.add_argument("--json", metavar="FILE", help="write every repeat, the settings and the machine")
    parser.add_argument("--plot", metavar="FILE", help="write a plot of tokens against time, .png or .svg")
    add_size_flags(parser)
    return parser
