"""`llava-saep projectors`: list every projector, show one, check it against the contract, measure it, document all."""

import importlib
from collections.abc import Sequence

from llava_saep.bench.placement import Sizes, describe_projector
from llava_saep.commands.projectors.flags import parse_grid

SUBCOMMANDS = {
    "show": "everything about one projector: options, presets, sizes, source",
    "check": "test a projector, also one of your own, against the contract",
    "bench": "measure speed and memory",
    "docs": "write the reference page docs/projectors.md",
}
"""Modules of this package; without one of these words the projectors are listed."""

__all__ = ["SUBCOMMANDS", "Sizes", "describe_projector", "main", "parse_grid"]


def main(argv: Sequence[str]) -> int:
    """Run a subcommand, or list the projectors."""
    name, rest = (argv[0], argv[1:]) if argv and argv[0] in SUBCOMMANDS else ("listing", argv)
    return importlib.import_module(f"{__name__}.{name}").main(rest)
