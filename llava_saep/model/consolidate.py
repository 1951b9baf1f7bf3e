"""LLaVA's program of this name: a model in many files, of any format, becomes one in as few as possible.

python -m llava_saep.model.consolidate --src MODEL --dst OUTPUT

`llava-saep convert` is what does it. The format stays as it is, and so does the precision (LLaVA's rounds to float16).
"""

import sys
from collections.abc import Sequence

from llava_saep.commands import convert
from llava_saep.model.formats import detect_format
from llava_saep.model.hub import local_folder
from llava_saep.program import AbbreviatingParser, run_program

NAME = "llava_saep.model.consolidate"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the model anew; returns the exit code.

    Raises:
        UserError, ProjectorError: as `llava-saep convert`.
    """
    parser = AbbreviatingParser(prog=NAME, description="Write a model anew, in as few files as possible.")
    parser.add_flag("src", required=True, help="folder or hub name")
    parser.add_flag("dst", required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    own_format = detect_format(local_folder(arguments.src))
    return convert.main(["--to", own_format, arguments.src, arguments.dst])


if __name__ == "__main__":
    sys.exit(run_program(NAME, main, sys.argv[1:]))
