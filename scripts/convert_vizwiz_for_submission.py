"""LLaVA's script of this name: answers to VizWiz as the file that its challenge scores.

python scripts/convert_vizwiz_for_submission.py --annotation-file llava_test.jsonl --result-file answers.jsonl \\
    --result-upload-file upload.json
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_saep.errors import UserError
from llava_saep.evaluation.tasks._files import read_answer_file, read_json_lines, write_json
from llava_saep.evaluation.tasks._matching import id_misfits, texts_by_id
from llava_saep.evaluation.tasks.vizwiz import upload_records
from llava_saep.program import AbbreviatingParser, run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code. Raises UserError: a file is absent or malformed, or an answer is missing."""
    parser = AbbreviatingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_flag("annotation-file", required=True, help="the question file")
    parser.add_flag("result-file", required=True, help="answers of model_vqa_loader")
    parser.add_flag("result-upload-file", required=True, help="file to write")
    arguments = parser.parse_args(argv)
    source = read_answer_file(Path(arguments.result_file).expanduser())
    texts = texts_by_id(source.answers)
    questions = read_json_lines(Path(arguments.annotation_file).expanduser())
    if not questions:
        raise UserError(f"{arguments.annotation_file}: holds no questions; is the file complete?")
    print(f"total results: {len(texts)}, total split: {len(questions)}, error_line: {source.num_broken_lines}")
    records = upload_records(questions, texts, arguments.result_file)
    asked = {str(question["question_id"]) for question in questions}
    for words in id_misfits((str(answer.question_id) for answer in source.answers), asked):
        print(words, file=sys.stderr)
    write_json(Path(arguments.result_upload_file).expanduser(), records)
    return 0


if __name__ == "__main__":
    sys.exit(run_program("convert_vizwiz_for_submission", main, sys.argv[1:]))
