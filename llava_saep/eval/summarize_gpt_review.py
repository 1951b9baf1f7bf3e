"""LLaVA's program of this name: mean points of review files, per category.

python -m llava_saep.eval.summarize_gpt_review -f reviews/my-model.jsonl

Columns: the model's points in percent of the reference's, ten times the reference's points, ten times the model's.
Reviews without points are left out and counted on standard error; LLaVA averages their -1 with the points.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_saep.errors import UserError
from llava_saep.evaluation.tasks._files import read_json_lines
from llava_saep.evaluation.tasks.llava_bench import has_points, summarize_points
from llava_saep.program import AbbreviatingParser, run_program

NAME = "llava_saep.eval.summarize_gpt_review"
PREFIXES = ("gpt4_text", "reviews_", "review_")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; flags are LLaVA's."""
    parser = AbbreviatingParser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dir", help=f"folder of --files; without them, its files {', '.join(PREFIXES)}*.jsonl")
    parser.add_argument("-f", "--files", nargs="*", help="review files")
    parser.add_argument("-i", "--ignore", nargs="*", help="question_ids to leave out")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the means; returns the exit code.

    Raises:
        UserError: no file is named, or one is absent, malformed or without points.
    """
    arguments = build_parser().parse_args(argv)
    for path in sorted(_review_files(arguments)):
        print(path.name.replace("gpt4_text_", "").replace(".jsonl", ""))
        ignored = set(arguments.ignore or ())
        lines = [line for line in read_json_lines(path) if str(line.get("question_id")) not in ignored]
        for category, summary in summarize_points(lines, str(path)).items():
            print(category, *summary.line_numbers)
        print("=================================")
        unreadable = sum(not has_points(line) for line in lines)
        if unreadable:
            print(f"{path}: {unreadable} of {len(lines)} reviews have no points and are left out", file=sys.stderr)
    return 0


def _review_files(arguments: argparse.Namespace) -> list[Path]:
    folder = None if arguments.dir is None else Path(arguments.dir).expanduser()
    if arguments.files:
        return [Path(name).expanduser() if folder is None else folder / name for name in arguments.files]
    if folder is None:
        raise UserError("name review files with --files, or their folder with --dir")
    if not folder.is_dir():
        raise UserError(f"--dir {folder}: no such folder")
    found = [path for path in folder.glob("*.jsonl") if path.name.startswith(PREFIXES)]
    if not found:
        raise UserError(f"--dir {folder}: has no review file ({', '.join(PREFIXES)}*.jsonl); name files with --files")
    return found


if __name__ == "__main__":
    sys.exit(run_program(NAME, main, sys.argv[1:]))
