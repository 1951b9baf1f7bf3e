"""LLaVA's script of this name: answers to a table of MMBench, images in the table.

python -m llava_saep.eval.model_vqa_mmbench --model-path MODEL --question-file mmbench_dev_20230712.tsv \\
    --answers-file answers.jsonl --single-pred-prompt --temperature 0

As in model_vqa the template is the model's own unless --conv-mode names one, and an interrupted run goes on.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_saep.eval import model_vqa
from llava_saep.evaluation.tasks._mmbench import table_questions
from llava_saep.program import run_program

NAME = "llava_saep.eval.model_vqa_mmbench"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; flags and defaults are LLaVA's."""
    parser = model_vqa.build_parser(NAME)
    parser.description = __doc__
    parser.add_flag("all-rounds", action="store_true", help="ask once for each rotation of the options")
    parser.add_flag("single-pred-prompt", action="store_true", help="ask for the option's letter alone")
    parser.add_flag("lang", default="en", help="language of that request: cn, or English for all others")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the rows of one chunk; returns the exit code. Errors as `model_vqa.answer_part`."""
    arguments = build_parser().parse_args(argv)
    questions = table_questions(
        Path(arguments.question_file).expanduser(),
        all_rounds=arguments.all_rounds,
        ask_for_letter=arguments.single_pred_prompt,
        language=arguments.lang,
    )
    # A chunk is of rows, so that all rounds of a row are answered together.
    rows = list(dict.fromkeys(question.question_id for question in questions))
    own = set(model_vqa.chunk(rows, arguments.num_chunks, arguments.chunk_idx))
    model_vqa.answer_part(arguments, [question for question in questions if question.question_id in own])
    return 0


if __name__ == "__main__":
    sys.exit(run_program(NAME, main, sys.argv[1:]))
