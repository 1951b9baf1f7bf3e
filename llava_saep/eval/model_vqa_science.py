"""LLaVA's script of this name: answers to ScienceQA, whose question file is a list of training records.

python -m llava_saep.eval.model_vqa_science --model-path MODEL --question-file llava_test_CQM-A.json \\
    --image-folder images/test --answers-file answers.jsonl --single-pred-prompt --temperature 0

As in model_vqa the template is the model's own unless --conv-mode names one, and an interrupted run goes on.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_saep.eval import model_vqa
from llava_saep.evaluation.tasks.scienceqa import read_science_questions
from llava_saep.program import run_program

logger = logging.getLogger(__name__)

NAME = "llava_saep.eval.model_vqa_science"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; flags and defaults are LLaVA's."""
    parser = model_vqa.build_parser(NAME)
    parser.description = __doc__
    parser.set_defaults(question_file="tables/question.json")
    parser.add_flag("answer-prompter", action="store_true", help="no effect")
    parser.add_flag("single-pred-prompt", action="store_true", help="ask for the option's letter alone")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the questions of one chunk; returns the exit code. Errors as `model_vqa.answer_part`."""
    arguments = build_parser().parse_args(argv)
    if arguments.answer_prompter:
        logger.warning("--answer-prompter has no effect; --single-pred-prompt asks for the letter alone")
    questions = read_science_questions(
        Path(arguments.question_file).expanduser(),
        Path(arguments.image_folder).expanduser(),
        ask_for_letter=arguments.single_pred_prompt,
    )
    model_vqa.answer_part(arguments, model_vqa.chunk(questions, arguments.num_chunks, arguments.chunk_idx))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(NAME, main, sys.argv[1:]))
