"""LLaVA's scorer of this name: accuracy on ScienceQA, and on its questions with an image.

python -m llava_saep.eval.eval_science_qa --base-dir scienceqa --result-file answers.jsonl \\
    --output-file output.jsonl --output-result result.json

Of several answers to one question the last counts, one without an answer is wrong, answers to no question are passed
over; their numbers go to standard error.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_saep.evaluation.tasks._files import read_answers, write_json
from llava_saep.evaluation.tasks._matching import id_misfits
from llava_saep.evaluation.tasks.scienceqa import LETTERS, ScienceOutcome, judge_problems, read_problems
from llava_saep.program import AbbreviatingParser, run_program

NAME = "llava_saep.eval.eval_science_qa"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; flags and defaults are LLaVA's."""
    parser = AbbreviatingParser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_flag("base-dir", required=True, help="folder with problems.json and pid_splits.json")
    parser.add_flag("result-file", required=True, help="answers of model_vqa_science")
    parser.add_flag("output-file", required=True, help="written: what was right and wrong, as JSON")
    parser.add_flag("output-result", required=True, help="written: the score and each answer's reading, as JSON")
    parser.add_flag("split", default="test", help="default: %(default)s")
    parser.add_flag("options", type=list, default=list(LETTERS), help="letters of the options (default: ABCDE)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Score; returns the exit code.

    Raises:
        UserError: a file is absent or malformed, or there is no such split.
    """
    arguments = build_parser().parse_args(argv)
    folder = Path(arguments.base_dir).expanduser()
    problems, ids = read_problems(folder, arguments.split)
    given = read_answers(Path(arguments.result_file).expanduser())
    answers = {str(answer.question_id): answer for answer in given}
    outcomes = judge_problems(problems, ids, answers, str(folder / "problems.json"), arguments.options)
    for words in id_misfits((str(answer.question_id) for answer in given), ids):
        print(words, file=sys.stderr)
    right = [outcome for outcome in outcomes if outcome.is_right]
    print(
        f"Total: {len(outcomes)}, Correct: {len(right)}, Accuracy: {_percent(outcomes)}, "
        f"IMG-Accuracy: {_percent([outcome for outcome in outcomes if outcome.has_image])}"
    )
    wrong = [outcome for outcome in outcomes if not outcome.is_right]
    analyses = {
        name: [_analysis(outcome, arguments.options) for outcome in each]
        for name, each in (("correct", right), ("incorrect", wrong))
    }
    write_json(Path(arguments.output_file).expanduser(), analyses, indent=2)
    result = {
        "acc": len(right) / len(outcomes) * 100 if outcomes else None,
        "correct": len(right),
        "count": len(outcomes),
        "results": {outcome.problem_id: outcome.index for outcome in outcomes},
        "outputs": {outcome.problem_id: outcome.prediction for outcome in outcomes},
    }
    write_json(Path(arguments.output_result).expanduser(), result, indent=2)
    return 0


def _percent(outcomes: Sequence[ScienceOutcome]) -> str:
    if not outcomes:
        return "undefined (no such question)"
    return f"{sum(outcome.is_right for outcome in outcomes) / len(outcomes) * 100:.2f}%"


def _analysis(outcome: ScienceOutcome, letters: Sequence[str]) -> dict[str, Any]:
    return {
        "question_id": outcome.problem_id,
        "parsed_ans": outcome.letter,
        "ground_truth": letters[outcome.truth],
        "question": outcome.prompt,
        "pred": outcome.prediction,
        "is_multimodal": outcome.has_image,
    }


if __name__ == "__main__":
    sys.exit(run_program(NAME, main, sys.argv[1:]))
