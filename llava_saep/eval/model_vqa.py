"""Answers to a question file (jsonl) in LLaVA's format, with the flags of its script of this name.

python -m llava_saep.eval.model_vqa --model-path MODEL --question-file questions.jsonl --image-folder images \\
    --answers-file answers.jsonl

Not as there: the template is the model's own unless --conv-mode names one, and an interrupted run goes on where it
stopped when the same command is given again.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from llava_saep.errors import UserError
from llava_saep.evaluation import ranks
from llava_saep.evaluation.asking import AskedModel, ModelChoice, fit_to_context
from llava_saep.evaluation.questions import as_task_question, read_questions
from llava_saep.evaluation.runner import answer_questions, check_images
from llava_saep.evaluation.tasks import TaskQuestion
from llava_saep.generation import GenerationOptions
from llava_saep.mm_utils import get_model_name_from_path
from llava_saep.model.hub import local_folder
from llava_saep.program import AbbreviatingParser, run_program

NAME = "llava_saep.eval.model_vqa"
MAX_NEW_TOKENS = 1024
"""What LLaVA's script allows."""

T = TypeVar("T")


def build_parser(name: str = NAME, max_new_tokens: int = MAX_NEW_TOKENS) -> AbbreviatingParser:
    """Return the parser; flags and defaults are LLaVA's."""
    parser = AbbreviatingParser(prog=name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_flag("model-path", required=True, help="folder or hub name")
    parser.add_flag(
        "model-base", help="language model of a projector or adapter, where that is not known, or has moved"
    )
    parser.add_flag("image-folder", default="", help="folder that the questions' images are relative to")
    parser.add_flag("question-file", default="tables/question.jsonl", help="default: %(default)s")
    parser.add_flag("answers-file", default="answer.jsonl", help="default: %(default)s")
    parser.add_flag("conv-mode", help="conversation template (default: the one that the model was trained with)")
    parser.add_flag("num-chunks", type=int, default=1, help="cut the questions into so many parts,")
    parser.add_flag("chunk-idx", type=int, default=0, help="and answer this one, counted from 0")
    add_decoding_flags(parser, max_new_tokens)
    parser.add_flag("batch-size", type=int, default=1, help="questions answered at once (default: %(default)s)")
    # The deepspeed launcher hands it to each rank, which reads it from the environment.
    parser.add_flag("local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def add_decoding_flags(parser: AbbreviatingParser, max_new_tokens: int) -> None:
    """Add the flags on how an answer is decoded, and where."""
    parser.add_flag("temperature", type=float, default=0.2, help="0 decodes greedily (default: %(default)s)")
    parser.add_flag("top-p", type=float, help="sample from the smallest set of tokens with this probability")
    parser.add_flag("num-beams", type=int, default=1)
    parser.add_flag("max-new-tokens", type=int, default=max_new_tokens, help="default: %(default)s")
    parser.add_flag("device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_flag(
        "trust-projector-code", action="store_true", help="let the checkpoint import a projector from elsewhere"
    )


def decoding_options(arguments: argparse.Namespace) -> GenerationOptions:
    """Read the flags of `add_decoding_flags`; errors as `GenerationOptions`."""
    return GenerationOptions(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=1.0 if arguments.top_p is None else arguments.top_p,
        num_beams=arguments.num_beams,
    )


def chunk(items: Sequence[T], num_chunks: int, index: int) -> Sequence[T]:
    """Return one of `num_chunks` consecutive parts; the last ones may be shorter, or empty.

    Raises:
        UserError: there is no part of this index.
    """
    if num_chunks < 1 or not 0 <= index < num_chunks:
        raise UserError(f"--num-chunks {num_chunks} --chunk-idx {index}: expected 0 <= chunk-idx < num-chunks")
    size = math.ceil(len(items) / num_chunks)
    return items[index * size : (index + 1) * size]


def main(argv: Sequence[str] | None = None, *, name: str = NAME, max_new_tokens: int = MAX_NEW_TOKENS) -> int:
    """Answer the questions of one chunk; returns the exit code.

    Raises:
        UserError, ProjectorError: a flag, the model's folder, the question file or an image is wrong.
    """
    arguments = build_parser(name, max_new_tokens).parse_args(argv)
    questions = read_questions(Path(arguments.question_file).expanduser(), ids_are_unique=False)
    image_folder = Path(arguments.image_folder).expanduser()
    asked = [as_task_question(question, image_folder) for question in questions]
    answer_part(arguments, chunk(asked, arguments.num_chunks, arguments.chunk_idx))
    return 0


def answer_part(arguments: argparse.Namespace, questions: Sequence[TaskQuestion]) -> None:
    """Answer questions with the model and the decoding that the flags of `build_parser` name.

    Raises:
        UserError, ProjectorError: a flag, the model's folder or an image is wrong.
    """
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    decoding = decoding_options(arguments)
    check_images(questions)
    with ranks.process_group():
        model = AskedModel.load(_chosen_model(arguments))
        options = fit_to_context(decoding, model.predictor, "--max-new-tokens")
        answer_questions(
            questions,
            model.asking(options, batch_size=arguments.batch_size, on_bad_image="error"),
            answers_path=Path(arguments.answers_file).expanduser(),
            model_id=model.choice.model_id,
            fingerprint=model.answers_fingerprint(options),
        )


def _chosen_model(arguments: argparse.Namespace) -> ModelChoice:
    return ModelChoice(
        path=local_folder(Path(arguments.model_path).expanduser()),
        model_id=get_model_name_from_path(arguments.model_path),
        base=arguments.model_base,
        template=arguments.conv_mode,
        device=arguments.device,
        trust_projector_code=arguments.trust_projector_code,
    )


if __name__ == "__main__":
    sys.exit(run_program(NAME, main, sys.argv[1:]))
