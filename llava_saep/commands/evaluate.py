"""`llava-saep eval`: answers to a question file, with and without the images, scored by their final words."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava_saep.errors import UserError
from llava_saep.evaluation.evaluate import Evaluation, evaluate_model
from llava_saep.evaluation.questions import read_questions
from llava_saep.evaluation.report import report_rows, terminal_table
from llava_saep.evaluation.runner import check_images
from llava_saep.program import AbbreviatingParser


def main(argv: Sequence[str]) -> int:
    """Answer, score, print the table and write the reports."""
    arguments = _parser().parse_args(argv)
    if arguments.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, got {arguments.batch_size}")
    question_file = Path(arguments.question_file)
    questions = read_questions(question_file)
    image_folder = Path(arguments.image_folder) if arguments.image_folder else default_image_folder(question_file)
    check_images(questions, image_folder)
    from llava_saep.model.hub import is_hub_name, local_folder  # brings transformers, which --help shall not wait for

    model_path = Path(arguments.model_path)
    # Beside a model of the hub nobody would find the answers.
    default_output_dir = Path("evaluation") / model_path.name if is_hub_name(model_path) else model_path / "evaluation"
    output_dir = Path(arguments.output_dir or default_output_dir)
    evaluation = evaluate_model(
        local_folder(model_path),
        questions,
        model_id=model_path.name,
        image_folder=image_folder,
        output_dir=output_dir,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        blind=arguments.blind,
        device=arguments.device,
        trust_projector_code=arguments.trust_projector_code,
    )
    print_evaluation(evaluation)
    print(f"\nanswers and reports: {output_dir}")
    return 0


def default_image_folder(question_file: Path) -> Path:
    """`images/` beside the question file where there is one, else the folder that the file is in."""
    images = question_file.parent / "images"
    return images if images.is_dir() else question_file.parent


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the table of accuracies, or that the questions hold no answers to compare with."""
    if not evaluation.scores:
        print(f"\n{len(evaluation.answers)} answers; the question file has no `answer` fields to score them with.")
        return
    print("\n" + terminal_table(report_rows(evaluation.scores, evaluation.blind_scores)))
    print("\nchance: the most frequent answer of its kind, given to every question")
    print("blind:  the same model, image removed")


def _parser() -> argparse.ArgumentParser:
    parser = AbbreviatingParser(
        prog="llava-saep eval",
        description="Answer a question file (one JSON object per line: question_id, image, text, category, answer) and "
        "score the final words of each freely generated answer. An interrupted run goes on where it stopped.",
    )
    parser.add_argument("--model_path", "--model-path", required=True, help="folder that training wrote, or hub name")
    parser.add_argument("--question_file", "--question-file", required=True)
    parser.add_argument(
        "--image_folder",
        "--image-folder",
        help="default: images/ beside the question file, or else the folder that the file is in",
    )
    parser.add_argument(
        "--output_dir",
        "--output-dir",
        help="default: evaluation/ in the model's folder; evaluation/NAME for a model of the hub",
    )
    parser.add_argument("--batch_size", "--batch-size", type=int, default=32)
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=64)
    parser.add_argument("--blind", action="store_true", help="also answer without the images, for comparison")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument(
        "--trust_projector_code",
        "--trust-projector-code",
        action="store_true",
        help="import a projector that the checkpoint names as package.module:Class",
    )
    return parser
