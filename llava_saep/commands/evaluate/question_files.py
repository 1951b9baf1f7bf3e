"""`llava-saep eval --question-file`: answers to questions of one's own, scored by their final words."""

import argparse
from pathlib import Path

from llava_saep.evaluation import ranks
from llava_saep.evaluation.answer_files import check_free
from llava_saep.evaluation.evaluate import Evaluation, answer_files, evaluate_questions, excluded_note
from llava_saep.evaluation.questions import as_task_question, read_questions
from llava_saep.evaluation.report import report_rows, terminal_table
from llava_saep.evaluation.runner import check_images


def run(arguments: argparse.Namespace) -> int:
    """Answer, score, print the table and write the reports."""
    from llava_saep.commands.evaluate.flags import DEFAULT_BATCH_SIZE

    question_file = Path(arguments.question_file)
    questions = read_questions(question_file)
    image_folder = Path(arguments.image_folder) if arguments.image_folder else default_image_folder(question_file)
    if arguments.on_bad_image != "exclude":
        check_images([as_task_question(question, image_folder) for question in questions])
    # Brings transformers, which mistakes in the files shall not wait for.
    from llava_saep.commands.evaluate.model import chosen_model, chosen_output_dir

    output_dir = chosen_output_dir(arguments)
    ranks.from_rank_zero(lambda: check_free(answer_files(output_dir, blind=arguments.blind)))
    evaluation = evaluate_questions(
        chosen_model(arguments),
        questions,
        image_folder=image_folder,
        output_dir=output_dir,
        batch_size=arguments.batch_size or DEFAULT_BATCH_SIZE,
        max_new_tokens=arguments.max_new_tokens,
        blind=arguments.blind,
        on_bad_image=arguments.on_bad_image,
    )
    if evaluation is not None:
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
    else:
        print("\n" + terminal_table(report_rows(evaluation.scores, evaluation.blind_scores)))
        print("\nchance: the most frequent answer of its kind, given to every question")
        print("blind:  the same model, image removed")
    if evaluation.excluded:
        print(excluded_note(evaluation))
