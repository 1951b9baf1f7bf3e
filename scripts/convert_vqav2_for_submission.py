"""LLaVA's script of this name: answers to VQAv2 as the file that EvalAI scores.

python scripts/convert_vqav2_for_submission.py --split llava_vqav2_mscoco_test-dev2015 --ckpt MODEL

Reads DIR/answers/SPLIT/CKPT/merge.jsonl and writes DIR/answers_upload/SPLIT/CKPT.json with an answer to every question
of the test set, empty where there is none. How many these are goes to standard error.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_saep.errors import UserError
from llava_saep.evaluation.tasks._files import ID, read_answer_file, read_json_lines, required, write_json
from llava_saep.evaluation.tasks._matching import id_misfits, texts_by_id
from llava_saep.evaluation.tasks.vqav2 import TEST_FILE, upload_records
from llava_saep.program import AbbreviatingParser, run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code. Raises UserError: a file is absent or malformed."""
    parser = AbbreviatingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_flag("dir", default="./playground/data/eval/vqav2", help="default: %(default)s")
    parser.add_flag("ckpt", required=True, help="name of the model's answers")
    parser.add_flag("split", required=True, help="name of the question file without .jsonl")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.dir).expanduser()
    source = read_answer_file(folder / "answers" / arguments.split / arguments.ckpt / "merge.jsonl")
    texts = texts_by_id(source.answers)
    ids = [required(record, "question_id", TEST_FILE, ID) for record in read_json_lines(folder / TEST_FILE)]
    if not ids:
        raise UserError(f"{folder / TEST_FILE}: holds no questions; is the file complete?")
    print(f"total results: {len(texts)}, total split: {len(ids)}, error_line: {source.num_broken_lines}")
    for words in id_misfits((str(answer.question_id) for answer in source.answers), set(map(str, ids))):
        print(words, file=sys.stderr)
    write_json(folder / "answers_upload" / arguments.split / f"{arguments.ckpt}.json", upload_records(ids, texts))
    return 0


if __name__ == "__main__":
    sys.exit(run_program("convert_vqav2_for_submission", main, sys.argv[1:]))
