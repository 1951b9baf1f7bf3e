"""LLaVA's script of this name: answers to MMBench as the table that its server scores.

python scripts/convert_mmbench_for_submission.py --annotation-file mmbench_dev_20230712.tsv --result-dir answers \\
    --upload-dir answers_upload --experiment MODEL

Reads RESULT_DIR/EXPERIMENT.jsonl and writes UPLOAD_DIR/EXPERIMENT.xlsx. Of several answers to one question the last
counts; a question without one keeps an empty cell. How many these are goes to standard error.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_saep.evaluation.tasks._files import read_answers
from llava_saep.evaluation.tasks._matching import texts_by_id
from llava_saep.evaluation.tasks._mmbench import predictions_by_index, read_table, upload_table, write_xlsx
from llava_saep.program import AbbreviatingParser, run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code. Raises UserError: a file is absent or malformed, or an answer too long."""
    parser = AbbreviatingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_flag("annotation-file", required=True, help="MMBench's table")
    parser.add_flag("result-dir", required=True, help="folder with the answers of model_vqa_mmbench")
    parser.add_flag("upload-dir", required=True, help="folder to write to")
    parser.add_flag("experiment", required=True, help="name of the answer file without .jsonl")
    arguments = parser.parse_args(argv)
    rows = read_table(Path(arguments.annotation_file).expanduser())
    answers = read_answers(Path(arguments.result_dir).expanduser() / f"{arguments.experiment}.jsonl")
    predictions = predictions_by_index(answers)
    indices = {int(row["index"] or 0) for row in rows}
    missing, unknown = len(indices - predictions.keys()), len(texts_by_id(answers).keys() - set(map(str, indices)))
    if missing or unknown:
        print(f"{missing} of {len(rows)} questions have no answer, {unknown} answers no question", file=sys.stderr)
    path = Path(arguments.upload_dir).expanduser() / f"{arguments.experiment}.xlsx"
    write_xlsx(path, upload_table(rows, predictions))
    return 0


if __name__ == "__main__":
    sys.exit(run_program("convert_mmbench_for_submission", main, sys.argv[1:]))
