"""LLaVA's scorer of this name: POPE, one table per file of labels.

python -m llava_saep.eval.eval_pope --annotation-dir pope/coco --question-file pope/llava_pope_test.jsonl \\
    --result-file answers.jsonl

Not as there: a label belongs to the question about the same image in the same words, not to the answer on the same
line, and a ratio that would divide by zero is `nan`. What does not fit together is counted on standard error.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from llava_saep.errors import UserError
from llava_saep.evaluation.tasks import Exclusion
from llava_saep.evaluation.tasks._files import read_answers, read_task_questions
from llava_saep.evaluation.tasks._matching import match_answers
from llava_saep.evaluation.tasks.pope import YesNoCounts, score_category
from llava_saep.program import AbbreviatingParser, run_program

NAME = "llava_saep.eval.eval_pope"
PREFIX = "coco_pope_"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; flags are LLaVA's."""
    parser = AbbreviatingParser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_flag("annotation-dir", required=True, help=f"folder with {PREFIX}<category>.json files")
    parser.add_flag("question-file", required=True)
    parser.add_flag("result-file", required=True, help="answers of model_vqa_loader")
    return parser


def report_lines(counts: YesNoCounts) -> list[str]:
    """LLaVA's lines on one set of questions."""
    c = counts
    ratios = [float("nan") if each is None else each for each in (c.accuracy, c.precision, c.recall, c.f1, c.yes_ratio)]
    accuracy, precision, recall, f1, yes_ratio = ratios
    return [
        "TP\tFP\tTN\tFN\t",
        f"{c.true_positives}\t{c.false_positives}\t{c.true_negatives}\t{c.false_negatives}",
        f"Accuracy: {accuracy}",
        f"Precision: {precision}",
        f"Recall: {recall}",
        f"F1 score: {f1}",
        f"Yes ratio: {yes_ratio}",
        f"{f1:.3f}, {accuracy:.3f}, {precision:.3f}, {recall:.3f}, {yes_ratio:.3f}",
    ]


def print_exclusions(exclusions: Iterable[Exclusion]) -> None:
    """Say on standard error what was not scored as it stands."""
    for each in exclusions:
        print(f"{each.count} {each.reason}, {each.effect} (as {', '.join(each.examples)})", file=sys.stderr)


def _report_unlabelled(num_questions: Mapping[str, int], label_files: Iterable[Path]) -> None:
    labelled = {path.stem.removeprefix(PREFIX) for path in label_files}
    for category, number in num_questions.items():
        if category not in labelled:
            words = f"{number} questions are left out: there is no {PREFIX}{category}.json in --annotation-dir"
            print(words, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Score; returns the exit code.

    Raises:
        UserError: a file is absent or malformed, or labels do not belong to the questions.
    """
    arguments = build_parser().parse_args(argv)
    questions = read_task_questions(Path(arguments.question_file).expanduser(), Path())
    matched = match_answers(questions, read_answers(Path(arguments.result_file).expanduser()))
    print_exclusions(matched.exclusions)
    label_files = sorted(Path(arguments.annotation_dir).expanduser().glob(f"{PREFIX}*.json"))
    if not label_files:
        raise UserError(f"--annotation-dir {arguments.annotation_dir}: has no file named {PREFIX}<category>.json")
    _report_unlabelled(Counter(question.category for question in questions), label_files)
    for path in label_files:
        category = path.stem.removeprefix(PREFIX)
        pairs = [
            (question, text)
            for question, text in zip(questions, matched.texts, strict=True)
            if question.category == category
        ]
        counts, exclusions = score_category(path, category, pairs)
        print(f"Category: {category}, # samples: {counts.num_answers}")
        print("\n".join(report_lines(counts)))
        print("====================================")
        print_exclusions(exclusions)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(NAME, main, sys.argv[1:]))
