"""LLaVA's script of this name, for GPUs without flash attention: here the same as train_mem.py.

What LLaVA takes from xformers, attention whose memory does not grow with the square of the length, is the default here
and comes from torch (`--attn_implementation`).
"""

import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    # Run as a file; the reason is given in train_mem.py.
    sys.path[:1] = [str(Path(__file__).resolve().parents[2]), os.getcwd()]

from llava_saep.train.train_mem import main

if __name__ == "__main__":
    sys.exit(main())
