"""LLaVA's program of this name: a language model compares two files of answers, without knowing any image.

python -m llava_saep.eval.eval_gpt_review --question questions.jsonl --answer-list reference.jsonl answers.jsonl \\
    --rule rule.json --output reviews.jsonl

A category without a rule of its own is rated by the rule "default". The judge as in eval_gpt_review_bench.
"""

import sys
from collections.abc import Sequence

from llava_saep.eval import eval_gpt_review_bench
from llava_saep.program import run_program

PROGRAM = eval_gpt_review_bench.ReviewProgram(name="llava_saep.eval.eval_gpt_review", judge_model="gpt-4")


def main(argv: Sequence[str] | None = None) -> int:
    """Have answers reviewed; returns the exit code. Errors as `eval_gpt_review_bench.main`."""
    return eval_gpt_review_bench.main(argv, PROGRAM, __doc__)


if __name__ == "__main__":
    sys.exit(run_program(PROGRAM.name, main, sys.argv[1:]))
