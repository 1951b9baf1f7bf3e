"""What torchrun and deepspeed start on each rank: `-m llava_saep.commands.evaluate`."""

import sys

from llava_saep.commands.evaluate import main
from llava_saep.program import run_program

if __name__ == "__main__":
    sys.exit(run_program("llava-saep eval", main, sys.argv[1:]))
