"""LLaVA's script of this name: scores answers to SEED-Bench and writes them as its leaderboard takes them.

python scripts/convert_seed_for_submission.py --annotation-file SEED-Bench.json --result-file answers.jsonl \\
    --result-upload-file upload.jsonl

The score counts a question without an answer as wrong; the upload is not written then.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_saep.evaluation.tasks._files import read_answers, write_json_lines
from llava_saep.evaluation.tasks._matching import id_misfits, texts_by_id
from llava_saep.evaluation.tasks.seed_bench import read_seed_annotations, upload_records
from llava_saep.program import AbbreviatingParser, run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Score and convert; returns the exit code. Raises UserError: a file is malformed, or an answer is missing."""
    parser = AbbreviatingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_flag("annotation-file", required=True, help="SEED-Bench.json")
    parser.add_flag("result-file", required=True, help="answers of model_vqa_loader")
    parser.add_flag("result-upload-file", required=True, help="file to write")
    arguments = parser.parse_args(argv)
    questions, names = read_seed_annotations(Path(arguments.annotation_file).expanduser())
    answers = read_answers(Path(arguments.result_file).expanduser())
    texts = texts_by_id(answers)
    for number, name in sorted(names.items()):
        print_accuracy(name, [each for each in questions if each["question_type_id"] == number], texts)
    print_accuracy("Total accuracy", questions, texts)
    for medium in ("image", "video"):
        print_accuracy(f"{medium} accuracy", [each for each in questions if each["data_type"] == medium], texts)
    asked = {str(question["question_id"]) for question in questions}
    for words in id_misfits((str(answer.question_id) for answer in answers), asked):
        print(words, file=sys.stderr)
    records = upload_records(questions, texts, arguments.result_file)
    write_json_lines(Path(arguments.result_upload_file).expanduser(), records)
    return 0


def print_accuracy(label: str, questions: Sequence[Mapping[str, Any]], texts: Mapping[str, str]) -> None:
    """Print the percentage of exactly right letters; nothing for no questions."""
    right = sum(texts.get(str(each["question_id"])) == each["answer"] for each in questions)
    if questions:
        print(f"{label}: {right / len(questions) * 100:.2f}%")


if __name__ == "__main__":
    sys.exit(run_program("convert_seed_for_submission", main, sys.argv[1:]))
