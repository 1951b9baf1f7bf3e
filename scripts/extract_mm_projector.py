"""LLaVA's script of this name: the projector of a saved model as a file of its own.

python scripts/extract_mm_projector.py --model-path MODEL --output mm_projector.bin

`llava-saep convert --to projector MODEL mm_projector.bin` does the same.
"""

import argparse
import sys
from collections.abc import Sequence

from llava_saep.cli import main as llava_saep


def main(argv: Sequence[str] | None = None) -> int:
    """Extract; the exit code is `llava-saep convert`'s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="folder with the model")
    parser.add_argument("--output", required=True, help="FILE.bin or FILE.safetensors, or a folder")
    arguments = parser.parse_args(argv)
    return llava_saep(["convert", "--to", "projector", arguments.model_path, arguments.output])


if __name__ == "__main__":
    sys.exit(main())
