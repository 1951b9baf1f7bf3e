"""`llava-saep projectors [NAMES]`: a table of tokens, parameters and layers read."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from llava_saep.bench.placement import ProjectorDescription, describe_projector, describe_registered, refuse_unusable
from llava_saep.commands.projectors import SUBCOMMANDS
from llava_saep.commands.projectors.flags import add_option_flag, add_size_flags, sizes_of
from llava_saep.commands.projectors.text import columns, describe_sizes, layer_ranges, terminal_width, wrapped
from llava_saep.errors import UserError
from projectors import load_plug_ins, parse_projector_options, registered_presets, registered_projectors

HEADER = ("projector", "tokens", "parameters", "layers read")
_MIN_SENTENCE_WIDTH = 44
"""Narrower than this, the sentences stand below the numbers instead of beside them."""
_INDENT_BELOW = 4


def main(argv: Sequence[str]) -> int:
    """Print the table, with a line for every projector and preset or for those that are named.

    Raises:
        UserError: at the end, one that was named cannot be used.
    """
    arguments = _parser().parse_args(argv)
    if arguments.mm_projector_options and len(arguments.names) != 1:
        raise UserError("--mm_projector_options belong to one projector: name it, as in `llava-saep projectors saep`")
    sizes = sizes_of(arguments)
    options = parse_projector_options(arguments.mm_projector_options)
    if arguments.names:
        rows = [describe_projector(name, sizes, options) for name in arguments.names]
    else:
        load_plug_ins()  # for what installed packages register beside the names that they announce
        rows = describe_registered(registered_projectors(), sizes)
        rows = with_presets(rows, describe_registered(tuple(registered_presets()), sizes))
    if arguments.json:
        print(json.dumps({"sizes": asdict(sizes), "projectors": [asdict(row) for row in rows]}, indent=2))
    else:
        print(describe_sizes(sizes) + "\n")
        print("\n".join(table_lines(rows, terminal_width())))
    if arguments.names:
        refuse_unusable({row.name: row.error for row in rows})
    return 0


def with_presets(
    rows: Sequence[ProjectorDescription], presets: Sequence[ProjectorDescription]
) -> list[ProjectorDescription]:
    """Each projector followed by its presets."""
    return [each for row in rows for each in (row, *(preset for preset in presets if preset.preset_of == row.name))]


def table_lines(rows: Sequence[ProjectorDescription], width: int) -> list[str]:
    """Lines of the table: numbers in columns, then what it is, wrapped beside them or below; presets are indented."""
    names = {row.name for row in rows}
    cells = [
        (
            f"  {row.name}" if row.preset_of in names else row.name,
            "-" if row.num_tokens is None else str(row.num_tokens),
            "-" if row.num_parameters is None else f"{row.num_parameters:,}",
            layer_ranges(row.vision_layers) or "-",
        )
        for row in rows
    ]
    header, *numbers = columns([HEADER, *cells], left=(0, 3))
    indent = max(map(len, [header, *numbers])) + 2
    is_beside = width - indent >= _MIN_SENTENCE_WIDTH
    lines = [header.ljust(indent) + "what it is" if is_beside else header]
    for row, line in zip(rows, numbers, strict=True):
        if is_beside:
            first, *others = explanation(row, width - indent)
            lines += [line.ljust(indent) + first, *(" " * indent + other for other in others)]
        else:
            lines += [line, *(" " * _INDENT_BELOW + other for other in explanation(row, width - _INDENT_BELOW))]
    return lines


def explanation(row: ProjectorDescription, width: int) -> list[str]:
    """What a projector is, or why it cannot be used here; its other names; its formula where that fits in one line."""
    if row.error:
        return wrapped(row.error, width)
    if row.preset_of:
        return wrapped(f"Preset of {row.preset_of}. {row.summary}", width)
    other_names = [name for name in (row.registered_name, *row.aliases) if name != row.name]
    is_alias = row.name in (row.registered_name, *row.aliases)
    lines = wrapped(row.summary + (f" Also {', '.join(other_names)}." if is_alias and other_names else ""), width)
    formula = f"Tokens: {row.token_formula}."
    if not row.token_formula or len(formula) > width:
        return lines
    if len(lines[-1]) + 1 + len(formula) <= width:
        return [*lines[:-1], f"{lines[-1]} {formula}"]
    return [*lines, formula]


def _parser() -> argparse.ArgumentParser:
    subcommands = "\n".join(f"  llava-saep projectors {name:<6} {what}" for name, what in SUBCOMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="llava-saep projectors",
        description="Every projector and preset with its visual tokens per image and its parameters.",
        epilog=f"further subcommands, each with --help:\n{subcommands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="only these: names, spellings such as mlp3x_gelu, package.module:Class or path/to/file.py:Class",
    )
    add_option_flag(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_size_flags(parser)
    return parser
