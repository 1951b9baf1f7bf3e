"""`llava-saep eval doctor`: which files of benchmarks are there, which are missing, and where to get those."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from llava_saep.commands.evaluate.flags import add_flag
from llava_saep.errors import UserError
from llava_saep.evaluation.requirements import Finding, examine
from llava_saep.evaluation.tasks import select_tasks, task_names
from llava_saep.evaluation.tasks._base import DATA_ROOT
from llava_saep.program import AbbreviatingParser

MARKS = {"ok": "ok     ", "missing": "MISSING"}


def main(argv: Sequence[str]) -> int:
    """Print what was found; exit code 1 when something is missing.

    Raises:
        UserError: an unknown task.
    """
    arguments = _parser().parse_args(argv)
    tasks = select_tasks([arguments.task] if arguments.task else task_names())
    if not tasks:
        raise UserError(f"--task {arguments.task!r} names no benchmark; they are: {', '.join(task_names())}")
    data_dir = Path(arguments.data_dir).expanduser()
    findings = [finding for selected in tasks for finding in examine(data_dir, selected)]
    missing = {finding.label for finding in findings if finding.level == "missing"}
    if arguments.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        if not data_dir.is_dir():
            print(f"--data-dir {data_dir}: no such folder here; make it, or name another one\n")
        print("\n".join(map(format_finding, findings)))
        ready = [selected.label for selected in tasks if selected.label not in missing]
        print(f"\nready: {', '.join(ready) or 'none'}\nsomething is missing: {', '.join(sorted(missing)) or 'none'}")
    return 1 if missing else 0


def format_finding(finding: Finding) -> str:
    """One line, and a second one with the advice where there is some."""
    detail = f": {finding.detail}" if finding.detail else ""
    line = f"{MARKS[finding.level]}  {finding.label}: {finding.subject}{detail}"
    return f"{line}\n         -> {finding.advice}" if finding.advice else line


def _parser() -> argparse.ArgumentParser:
    parser = AbbreviatingParser(
        prog="llava-saep eval doctor",
        description="Look for the files of benchmarks in the folders of LLaVA's Evaluation guide, read the questions, "
        "and look for their images. Exit code 1 when something is missing.",
    )
    add_flag(parser, "task", help="benchmarks, with commas between them (default: all)")
    add_flag(parser, "data-dir", default=str(DATA_ROOT), help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
