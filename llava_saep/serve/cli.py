"""LLaVA's terminal chat under its name: `python -m llava_saep.serve.cli`, the same as `llava-saep chat`."""

import sys

from llava_saep.program import run_program
from llava_saep.serve.chat import main

if __name__ == "__main__":
    sys.exit(run_program("llava_saep.serve.cli", main, sys.argv[1:]))
