"""LLaVA's script of this name, without its request for flash attention: here the same as train_mem.py.

deepspeed llava_saep/train/train.py --deepspeed deepspeed_configs/zero2.json --mm_projector_type saep ...
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
