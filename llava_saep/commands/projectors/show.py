"""`llava-saep projectors show NAME`: everything that is known about one projector."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llava_saep.bench.placement import ProjectorDescription, Sizes, describe_projector, refuse_unusable, select_by_hand
from llava_saep.commands.projectors.explaining import (
    Option,
    class_description,
    class_place,
    config_description,
    example_flags,
    explain_options,
    paragraphs,
    preset_meaning,
    provider_in_words,
    value_text,
)
from llava_saep.commands.projectors.flags import add_option_flag, add_size_flags, sizes_of
from llava_saep.commands.projectors.text import (
    describe_sizes,
    layer_ranges,
    options_text,
    terminal_width,
    wrapped,
)
from projectors import ProjectorSpec, parse_projector_options

_LABEL_WIDTH = 13
_INDENT = 2
_DEEP_INDENT = 6


def main(argv: Sequence[str]) -> int:
    """Print the projector as text or as JSON.

    Raises:
        UserError: at the end, it cannot be used with these sizes and options.
    """
    arguments = _parser().parse_args(argv)
    sizes = sizes_of(arguments)
    options = parse_projector_options(arguments.mm_projector_options)
    row = describe_projector(arguments.name, sizes, options)
    spec = select_by_hand(arguments.name, options).spec
    if arguments.json:
        print(json.dumps(as_document(arguments.name, row, spec, sizes, arguments.mm_projector_options), indent=2))
    else:
        print("\n".join(as_lines(arguments.name, row, spec, sizes, terminal_width(), arguments.mm_projector_options)))
    refuse_unusable({row.name: row.error})
    return 0


def as_document(
    name: str, row: ProjectorDescription, spec: ProjectorSpec, sizes: Sizes, typed: str = ""
) -> dict[str, Any]:
    """Everything, JSON-able; `value` is what an option is under this name."""
    options = explain_options(spec.config_class, sizes.num_vision_layers, row.options)
    return {
        "sizes": asdict(sizes),
        **asdict(row),
        "options": [{**asdict(option), "value": _value(option, row.options)} for option in options],
        "presets": {name: asdict(preset) for name, preset in spec.presets.items()},
        "class": class_place(spec),
        "description": class_description(spec),
        "options_description": config_description(spec),
        "example": None if row.error else example_flags(name, spec, row.options, typed),
    }


def as_lines(
    name: str, row: ProjectorDescription, spec: ProjectorSpec, sizes: Sizes, width: int, typed: str = ""
) -> Iterator[str]:
    """Heading, facts, options, presets and description, wrapped to the width.

    Args:
        typed: the text of `--mm_projector_options`, for the line to copy.
    """
    yield from wrapped(_heading(name, row), width)
    yield ""
    if row.preset_of:
        yield from _indented(row.summary, width)
    yield from _indented(spec.summary, width)
    yield ""
    for label, text in _facts(name, row, spec, sizes, typed).items():
        first, *others = wrapped(text, width - _LABEL_WIDTH - _INDENT)
        yield " " * _INDENT + label.ljust(_LABEL_WIDTH) + first
        yield from (" " * (_INDENT + _LABEL_WIDTH) + other for other in others)
    yield "\ndescription:"
    yield from _description_lines(class_description(spec), width)
    yield "\noptions, as --mm_projector_options NAME=VALUE,NAME=VALUE or as a JSON object:"
    if config_description(spec):
        yield from _description_lines(config_description(spec), width)
        yield ""
    for option in explain_options(spec.config_class, sizes.num_vision_layers, row.options):
        yield from _option_lines(option, row.options, width)
    if spec.presets:
        yield "\npresets, further names with options that they fix:"
    for preset_name, preset in spec.presets.items():
        yield f"  {preset_name}: {preset_meaning(preset)}"
        yield from _indented(preset.summary, width, _DEEP_INDENT)


def _heading(name: str, row: ProjectorDescription) -> str:
    options = f" with {options_text(row.options)}" if row.options else ""
    if row.preset_of:
        return f"{name}: a preset of {row.preset_of}{options}"
    if name in row.aliases:
        return f"{name}: another name of {row.registered_name}{options}"
    return f"{name}{options}" if name == row.registered_name else f"{name}: {row.registered_name}{options}"


def _facts(name: str, row: ProjectorDescription, spec: ProjectorSpec, sizes: Sizes, typed: str) -> dict[str, str]:
    formula = row.token_formula
    if row.error:
        measured = {"tokens": formula, "cannot here": row.error}
    else:
        count = f"{row.num_tokens} on {sizes.grid.height} x {sizes.grid.width} patches"
        measured = {
            "tokens": f"{count}: {formula}" if formula else count,
            "parameters": f"{row.num_parameters:,}",
            "layers read": f"{layer_ranges(row.vision_layers)} (of {sizes.num_vision_layers} blocks)",
        }
    facts = {
        "between": describe_sizes(sizes),
        **measured,
        "also called": ", ".join(row.aliases),
        "paper": row.paper,
        "provider": provider_in_words(spec),
        "train with": "" if row.error else f"llava-saep train ... {example_flags(name, spec, row.options, typed)}",
    }
    return {label: text for label, text in facts.items() if text}


def _option_lines(option: Option, given: Mapping[str, Any], width: int) -> Iterator[str]:
    value = _value(option, given)
    default = f"  (default {value_text(option, option.default)})" if value != option.default else ""
    yield f"  {option.name} = {value_text(option, value)}{default}"
    allowed = f"{option.type}, {option.allowed}" if option.allowed else option.type
    yield from _indented(f"{option.help} [{allowed}]", width, _DEEP_INDENT)


def _value(option: Option, given: Mapping[str, Any]) -> Any:
    return given.get(option.name, option.default)


def _description_lines(docstring: str, width: int) -> Iterator[str]:
    for index, (text, is_literal) in enumerate(paragraphs(docstring)):
        if index:
            yield ""
        if is_literal:
            yield from (" " * _DEEP_INDENT + line for line in text.splitlines())
        else:
            yield from _indented(" ".join(text.split()), width)


def _indented(text: str, width: int, indent: int = _INDENT) -> list[str]:
    return [" " * indent + line for line in wrapped(text, width - indent)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-saep projectors show",
        description="Options, presets, source, tokens and parameters of one projector.",
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="a registered name, alias, preset or spelling (mlp3x_gelu), package.module:Class or path/to/file.py:Class",
    )
    add_option_flag(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_size_flags(parser)
    return parser
