"""LLaVA's script of this name: model_vqa with answers of at most 128 tokens.

LLaVA's reads images in other processes meanwhile, and takes an mmtag template where the model's name says "plain";
here `--conv-mode` says so.
"""

import sys
from collections.abc import Sequence

from llava_saep.eval import model_vqa
from llava_saep.program import run_program

NAME = "llava_saep.eval.model_vqa_loader"
MAX_NEW_TOKENS = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Answer as `model_vqa.main` does, with this script's limit."""
    return model_vqa.main(argv, name=NAME, max_new_tokens=MAX_NEW_TOKENS)


if __name__ == "__main__":
    sys.exit(run_program(NAME, main, sys.argv[1:]))
