"""`llava-saep projectors check NAME`: is a projector safe to train, save, load, shard and serve?"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llava_saep.commands.projectors.flags import add_option_flag
from llava_saep.commands.projectors.progress import Progress
from llava_saep.commands.projectors.text import options_text, terminal_width, wrapped
from projectors import parse_projector_options
from projectors.conformance import CHECK_NAMES, CheckResult, check_projector

_STATUSES = ("failed", "skipped", "passed")
_STATUS_WIDTH = 9


@dataclass(frozen=True)
class TimedCheck:
    """A check's outcome and how long it took."""

    result: CheckResult
    seconds: float


def main(argv: Sequence[str]) -> int:
    """Print the report; exit code 1 when a check fails."""
    arguments = _parser().parse_args(argv)
    options = parse_projector_options(arguments.mm_projector_options)
    name, checks = run_checks(arguments.name, options, compile=arguments.compile)
    if arguments.json:
        print(json.dumps(as_document(name, options, checks), indent=2))
    else:
        print("\n".join(as_lines(name, options, checks, terminal_width())))
    return 1 if _count(checks, "failed") else 0


def run_checks(name: str, options: Mapping[str, Any], compile: bool) -> tuple[str, list[TimedCheck]]:
    """Run every check by itself; returns the registered name too.

    Raises:
        ProjectorError: no such projector or option.
    """
    progress = Progress(sys.stderr)
    checks = []
    for position, check in enumerate(CHECK_NAMES, 1):
        progress("checking", f"{position} of {len(CHECK_NAMES)}, {check}")
        start = time.perf_counter()
        report = check_projector(name, options, compile=compile, checks=[check], trust_projector_code=True)
        checks.append(TimedCheck(_in_flags(report.results[0]), time.perf_counter() - start))
    progress.clear()
    return report.projector, checks


def _in_flags(result: CheckResult) -> CheckResult:
    """The reason as advice for the command line instead of Python."""
    return replace(result, detail=result.detail.replace("compile=True", "--compile"))


def as_document(name: str, options: Mapping[str, Any], checks: Sequence[TimedCheck]) -> dict[str, Any]:
    """The report, JSON-able, checks in the order of running."""
    return {
        "projector": name,
        "options": dict(options),
        "passed": not _count(checks, "failed"),
        "counts": {status: _count(checks, status) for status in _STATUSES},
        "seconds": sum(check.seconds for check in checks),
        "checks": [{**asdict(check.result), "seconds": check.seconds} for check in checks],
    }


def as_lines(name: str, options: Mapping[str, Any], checks: Sequence[TimedCheck], width: int) -> Iterator[str]:
    """Counts, then failed, skipped and passed checks, the first two with their reasons."""
    counts = ", ".join(f"{_count(checks, status)} {status}" for status in _STATUSES)
    chosen = f" with {options_text(dict(options))}" if options else ""
    yield f"{name}: {counts} in {sum(check.seconds for check in checks):.1f} s{chosen}"
    for status in ("failed", "skipped"):
        for check in checks:
            if check.result.status == status:
                yield f"  {status:<{_STATUS_WIDTH - 2}}  {check.result.name}"
                yield from (" " * (_STATUS_WIDTH + 2) + line for line in _reason_lines(check.result.detail, width))
    passed = [check.result.name for check in checks if check.result.status == "passed"]
    yield from _passed_lines(passed, width)


def _reason_lines(detail: str, width: int) -> list[str]:
    return [line for part in detail.splitlines() for line in wrapped(part, width - _STATUS_WIDTH - 2)]


def _passed_lines(names: Sequence[str], width: int) -> Iterator[str]:
    for index, line in enumerate(wrapped(", ".join(names), width - _STATUS_WIDTH - 2) if names else []):
        yield ("  passed " if index == 0 else " " * _STATUS_WIDTH) + "  " + line


def _count(checks: Sequence[TimedCheck], status: str) -> int:
    return sum(check.result.status == status for check in checks)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-saep projectors check",
        description="Test a projector, in a tiny size, against the contract of docs/architecture.md; exit code 1 if it "
        "is not kept.",
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="a registered name, preset or spelling, package.module:Class or path/to/file.py:Class",
    )
    add_option_flag(parser)
    parser.add_argument("--compile", action="store_true", help="also run torch.compile, which takes longer")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
