"""LLaVA's scorer of this name: soft accuracy on TextVQA of one answer file, or of all in a folder.

python -m llava_saep.eval.eval_textvqa --annotation-file TextVQA_0.5.1_val.json --result-file answers.jsonl

Questions are told apart by their words in `prompt`. Every line of an answer file counts, nothing else, as in LLaVA's;
how many questions have no answer, or several, goes to standard error.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_saep.errors import UserError
from llava_saep.evaluation.tasks import Answer
from llava_saep.evaluation.tasks._files import read_answers
from llava_saep.evaluation.tasks.textvqa import Annotations, annotation_key, read_annotations, score_answer
from llava_saep.program import AbbreviatingParser, run_program

NAME = "llava_saep.eval.eval_textvqa"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; flags are LLaVA's."""
    parser = AbbreviatingParser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_flag("annotation-file", required=True)
    parser.add_flag("result-file", help="answers of model_vqa_loader")
    parser.add_flag("result-dir", help="folder whose .jsonl files are all scored")
    return parser


def eval_single(annotations: Annotations, result_file: Path) -> float:
    """Print LLaVA's lines on one answer file and return the accuracy, in [0, 1]."""
    answers = read_answers(result_file)
    if not answers:
        raise UserError(f"{result_file}: holds no answers")
    scores = [score_answer(answer, annotations, str(result_file)) for answer in answers]
    accuracy = sum(scores) / len(scores)
    print(f"{result_file.stem}\nSamples: {len(scores)}\nAccuracy: {100 * accuracy:.2f}%\n")
    _report_misfits(annotations, answers, str(result_file))
    return accuracy


def _report_misfits(annotations: Annotations, answers: Sequence[Answer], place: str) -> None:
    answered = {annotation_key(answer, place) for answer in answers}
    misfits = {
        "annotated questions have no answer, and count in no number": len(annotations.keys() - answered),
        "answers are to a question that has another one; all count": len(answers) - len(answered),
    }
    for words, number in misfits.items():
        if number:
            print(f"{place}: {number} {words}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Score; returns the exit code.

    Raises:
        UserError: a file is absent or malformed, or an answer is to a question that is not annotated.
    """
    arguments = build_parser().parse_args(argv)
    if arguments.result_file is None and arguments.result_dir is None:
        raise UserError("name answers with --result-file, or a folder of answer files with --result-dir")
    annotations = read_annotations(Path(arguments.annotation_file).expanduser())
    if arguments.result_file is not None:
        eval_single(annotations, Path(arguments.result_file).expanduser())
    if arguments.result_dir is not None:
        folder = Path(arguments.result_dir).expanduser()
        if not folder.is_dir():
            raise UserError(f"--result-dir {folder}: no such folder")
        for path in sorted(folder.iterdir()):
            if path.suffix == ".jsonl":
                eval_single(annotations, path)
            else:
                print(f"Skipping {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(NAME, main, sys.argv[1:]))
