"""LLaVA's program of this name: as eval_gpt_review_bench, for images that captions and boxes of objects describe.

python -m llava_saep.eval.eval_gpt_review_visual --question questions.jsonl --context caps_boxes.jsonl \\
    --answer-list reference.jsonl answers.jsonl --rule rule.json --output reviews.jsonl
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from llava_saep.eval import eval_gpt_review_bench
from llava_saep.evaluation.tasks._files import read_json_lines, required
from llava_saep.program import run_program


def read_captions_and_boxes(path: Path) -> dict[str, str]:
    """Per image, its captions and below them a line `category: box` per object.

    Raises:
        UserError: the file is absent or malformed.
    """
    contexts = {}
    for number, record in enumerate(read_json_lines(path), 1):
        place = f"{path}, record {number}"
        boxes = [
            f"{required(each, 'category', place)}: {required(each, 'bbox', place)}"
            for each in required(record, "instances", place, list)
        ]
        captions = "\n".join(map(str, required(record, "captions", place, list)))
        contexts[required(record, "image", place, str)] = captions + "\n\n" + "\n".join(boxes)
    return contexts


PROGRAM = eval_gpt_review_bench.ReviewProgram(
    name="llava_saep.eval.eval_gpt_review_visual", read_contexts=read_captions_and_boxes
)


def main(argv: Sequence[str] | None = None) -> int:
    """Have answers reviewed; returns the exit code. Errors as `eval_gpt_review_bench.main`."""
    return eval_gpt_review_bench.main(argv, PROGRAM, __doc__)


if __name__ == "__main__":
    sys.exit(run_program(PROGRAM.name, main, sys.argv[1:]))
