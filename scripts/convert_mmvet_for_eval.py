"""LLaVA's script of this name: answers to MM-Vet as the file that its evaluator reads.

python scripts/convert_mmvet_for_eval.py --src answers.jsonl --dst results.json
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_saep.errors import UserError
from llava_saep.evaluation.tasks._files import read_answers, write_json
from llava_saep.evaluation.tasks._matching import id_misfits, texts_by_id
from llava_saep.evaluation.tasks.mmvet import results_by_id
from llava_saep.program import AbbreviatingParser, run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code. Raises UserError: the file is absent or malformed."""
    parser = AbbreviatingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_flag("src", required=True, help="answers of model_vqa")
    parser.add_flag("dst", required=True, help="file to write")
    arguments = parser.parse_args(argv)
    answers = read_answers(Path(arguments.src).expanduser())
    if not answers:
        raise UserError(f"{arguments.src}: holds no answers")
    for words in id_misfits((str(answer.question_id) for answer in answers), texts_by_id(answers)):
        print(words, file=sys.stderr)
    write_json(Path(arguments.dst).expanduser(), results_by_id(answers), indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(run_program("convert_mmvet_for_eval", main, sys.argv[1:]))
