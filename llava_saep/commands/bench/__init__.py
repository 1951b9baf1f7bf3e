"""`llava-saep bench`: measure the machinery on the machine at hand. Projectors alone: `llava-saep projectors bench`."""

import importlib
from collections.abc import Sequence

from llava_saep.errors import UserError

SUBCOMMANDS = {
    "packing": "what padding costs by the way of batching, and attention over one row of many conversations",
    "training": "training steps side by side with transformers' own Llava under its own Trainer",
    "generation": "time to the first token with and without earlier turns, and tokens per second",
    "faults": "whether a run that is killed, stopped or short of disk goes on with nothing lost",
}
"""Modules of this package."""


def usage() -> str:
    """What `llava-saep bench --help` prints."""
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name.ljust(width)}  {summary}" for name, summary in SUBCOMMANDS.items()]
    heading = ["usage: llava-saep bench <what> [flags]", "", "what is measured:"]
    return "\n".join([*heading, *lines, "", "llava-saep bench <what> --help lists the flags of one of them."])


def main(argv: Sequence[str]) -> int:
    """Run a subcommand.

    Raises:
        UserError: there is no such subcommand.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not argv or argv[0] not in SUBCOMMANDS:
        given = f"unknown {argv[0]!r}" if argv else "what to measure is missing"
        raise UserError(f"{given}; expected one of {', '.join(SUBCOMMANDS)}")
    return importlib.import_module(f"{__name__}.{argv[0]}").main(argv[1:])
