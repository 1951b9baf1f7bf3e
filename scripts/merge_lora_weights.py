"""LLaVA's script of this name: a LoRA adapter and its language model become one whole model.

python scripts/merge_lora_weights.py --model-path LORA --model-base vicuna-7b-v1.5 --save-model-path MERGED

`llava-saep convert --model_base vicuna-7b-v1.5 LORA MERGED` does the same, and takes more formats out.
"""

import argparse
import sys
from collections.abc import Sequence

from llava_saep.cli import main as llava_saep


def main(argv: Sequence[str] | None = None) -> int:
    """Merge; the exit code is `llava-saep convert`'s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="folder with the adapter")
    parser.add_argument("--model-base", help="language model of the adapter, where it does not name it")
    parser.add_argument("--save-model-path", required=True, help="folder to write")
    parser.add_argument("--to", choices=("own", "llava", "hf"), default="own", help="format to write (default: own)")
    arguments = parser.parse_args(argv)
    base = [] if arguments.model_base is None else ["--model_base", arguments.model_base]
    return llava_saep(["convert", "--to", arguments.to, *base, arguments.model_path, arguments.save_model_path])


if __name__ == "__main__":
    sys.exit(main())
