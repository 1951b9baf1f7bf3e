"""LLaVA's script of this name, for GPUs without flash attention: attention whose memory does not grow with the square.

LLaVA takes it from xformers; torch has it by now, as `--attn_implementation sdpa`, which this script adds.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    # Run as a file; the reason is given in train_mem.py.
    sys.path[:1] = [str(Path(__file__).resolve().parents[2]), os.getcwd()]

from llava_saep.train import train_mem

MEMORY_EFFICIENT = ("--attn_implementation", "sdpa")


def main(argv: Sequence[str] | None = None) -> int:
    """Train as `train_mem.main` does, with torch's attention unless a flag later in `argv` names another."""
    return train_mem.main([*MEMORY_EFFICIENT, *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
