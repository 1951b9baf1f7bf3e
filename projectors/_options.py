"""Projector options: typed by the fields of a config dataclass, checked once, and readable from a command line.

Every entry point (command line, JSON file, Python call, stored checkpoint) goes through the same conversion, so an
option means the same thing everywhere and a wrong one is refused with its name, its value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, Union

from ._errors import ProjectorError

WIDTH_FIELDS = ("vision_hidden_size", "text_hidden_size")
"""Config fields that the models decide, so that they are never options."""

_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_NONE_WORDS = ("none", "null")


LARGEST_INTEGER = 10**6
"""What an integer may be at most where its field does not say; far beyond any model, and still quick to refuse."""


class OptionInfo(NamedTuple):
    """One option of a projector, for help texts and tables."""

    name: str
    type: str
    default: Any
    help: str


def option(default: Any, help: str, *, minimum: float | None = None, maximum: float | None = None) -> Any:
    """Declare a config field with its help text and, for numbers (or each entry of a tuple), its range.

    Without a maximum an integer is at most LARGEST_INTEGER. What is repeated that often, such as layers, needs a
    smaller one, so that a slip of the finger ends in a message.
    """
    return dataclasses.field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum})


def option_fields(config_class: type) -> dict[str, dataclasses.Field]:
    """The fields of a config that a user may set, by name, in declaration order."""
    return {field.name: field for field in dataclasses.fields(config_class) if field.name not in WIDTH_FIELDS}


def describe_options(config_class: type) -> tuple[OptionInfo, ...]:
    """Name, type, default and help of each option, in declaration order."""
    hints = typing.get_type_hints(config_class)
    return tuple(
        OptionInfo(name, describe_type(hints[name]), field.default, field.metadata.get("help", ""))
        for name, field in option_fields(config_class).items()
    )


def describe_type(hint: Any) -> str:
    """A type as a sentence has it: `int`, `one of 1, 2, 3`, `list of int (as 1|2|3 or 1-3)`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if argument is type(None) else describe_type(argument) for argument in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            ranges = " or 1-3" if arguments[0] is int else ""
            return f"list of {describe_type(arguments[0])} (as 1|2|3{ranges})"
        return f"{len(arguments)} values: " + ", ".join(describe_type(argument) for argument in arguments)
    if origin is dict:
        return "options (a JSON object, or [key=value,...])"
    return {bool: "true or false"}.get(hint, getattr(hint, "__name__", str(hint)))


def parse_projector_options(text: str) -> dict[str, Any]:
    """Read `--mm_projector_options`: a JSON object, or `key=value,key=value` with tuples as `1|2|3` or `[1, 2, 3]`.

    Values of the second form stay strings; `select_projector` converts them by the option's type.

    Raises:
        ProjectorError: the text is neither form, or names an option twice.
    """
    text = text.strip()
    if not text:
        return {}
    if text.startswith("{"):
        return _parse_json_options(text)
    options: dict[str, Any] = {}
    for item in _split_outside_brackets(text):
        key, separator, value = (part.strip() for part in item.partition("="))
        if not separator or not key:
            raise ProjectorError(
                f"projector options {text!r}: {item!r} is not key=value. "
                'Write key=value,key=value (a list as 1|2|3) or a JSON object such as {"stride": 3}.'
            )
        if key in options:
            raise ProjectorError(f"projector options {text!r}: option {key!r} is given twice")
        options[key] = value
    return options


def convert_options(projector_name: str, config_class: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check option names and convert each value to its field's type.

    Args:
        options: JSON values, tuples, or strings as a command line has them.
    Returns:
        JSON-able values (tuples become lists).
    Raises:
        ProjectorError: unknown option (with the nearest names), wrong type, value outside the range.
    """
    hints = typing.get_type_hints(config_class)
    fields = option_fields(config_class)
    converted = {}
    for name, value in options.items():
        if name not in fields:
            raise ProjectorError(
                unknown_name_message(f"option of projector {projector_name!r}", name, fields, "Options")
            )
        if name == "vision_layers" and isinstance(value, str):
            value = config_class.layer_presets.get(value, value)
        label = f"projector {projector_name!r}, option {name!r}"
        named = config_class.layer_presets if name == "vision_layers" else ()
        converted[name] = _to_json(convert_value(label, value, hints[name], fields[name].metadata, named=named))
    return converted


def convert_value(
    label: str,
    value: Any,
    hint: Any,
    metadata: Mapping[str, Any],
    from_text: bool = True,
    named: Iterable[str] = (),
) -> Any:
    """One value as its declared type; strings are read as text of that type unless `from_text` is false.

    Args:
        named: words that the caller has already put values for, which a refusal lists.
    """
    converted = _convert(value, hint, from_text)
    if converted is _REFUSED:
        # What was typed is always text, so its type is no news.
        given = repr(value) if from_text and isinstance(value, str) else f"{value!r} ({type(value).__name__})"
        names = f", or one of {', '.join(named)}" if named else ""
        raise ProjectorError(
            f"{label}: got {given}, expected {describe_type(hint)}{names}{_near_hint(str(value), named)}"
        )
    _check_range(label, converted, metadata)
    return converted


def check_fields(config: Any) -> None:
    """Check every field of a frozen config against its declared type and range, turning lists into tuples."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        label = f"{type(config).__name__}.{field.name}"
        value = convert_value(label, getattr(config, field.name), hints[field.name], field.metadata, from_text=False)
        object.__setattr__(config, field.name, value)


def unknown_name_message(kind: str, name: str, known: Iterable[str], listing: str) -> str:
    """`unknown KIND 'sape'. Did you mean 'saep'? LISTING: ...`"""
    known = list(known)
    hint = _near_hint(name, known)
    return f"unknown {kind}: {name!r}{hint or '.'} {listing}: {', '.join(known)}."


def _near_hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f". Did you mean {near[0]!r}?" if near else ""


_REFUSED = object()


def _convert(value: Any, hint: Any, from_text: bool) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _convert_literal(value, arguments, from_text)
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, from_text)
    if origin is tuple:
        return _convert_tuple(value, arguments, from_text)
    if origin is dict:
        return _convert_nested_options(value, from_text)
    if isinstance(value, str) and hint is not str:
        return _convert_text(value, hint) if from_text else _REFUSED
    if hint is float and type(value) is int:
        return float(value)
    return value if type(value) is hint else _REFUSED


def _convert_text(text: str, hint: Any) -> Any:
    if hint is bool:
        return _BOOLEANS.get(text.strip().lower(), _REFUSED)
    try:
        return hint(text.strip())
    except (TypeError, ValueError):
        return _REFUSED


def _convert_nested_options(value: Any, from_text: bool) -> Any:
    """Options inside an option: a JSON object, or the text that `parse_projector_options` reads, in brackets."""
    if from_text and isinstance(value, str):
        text = value.strip()
        value = parse_projector_options(text[1:-1] if text.startswith("[") and text.endswith("]") else text)
    return dict(value) if isinstance(value, Mapping) else _REFUSED


def _convert_literal(value: Any, choices: tuple, from_text: bool) -> Any:
    for choice in choices:
        # `type` as well, because True == 1 in Python.
        if value == choice and type(value) is type(choice):
            return choice
        if from_text and isinstance(value, str) and value.strip() == str(choice):
            return choice
    return _REFUSED


def _convert_union(value: Any, members: tuple, from_text: bool) -> Any:
    is_none_word = from_text and isinstance(value, str) and value.strip().lower() in _NONE_WORDS
    if type(None) in members and (value is None or is_none_word):
        return None
    for member in members:
        converted = _REFUSED if member is type(None) else _convert(value, member, from_text)
        if converted is not _REFUSED:
            return converted
    return _REFUSED


def _convert_tuple(value: Any, members: tuple, from_text: bool) -> Any:
    if from_text and isinstance(value, str):
        value = _tuple_text_to_list(value, with_ranges=members[0] is int)
    elif from_text and type(value) is int and members[-1] is Ellipsis:
        value = [value]
    if not isinstance(value, list | tuple):
        return _REFUSED
    hints = [members[0]] * len(value) if members[-1] is Ellipsis else list(members)
    if len(hints) != len(value):
        return _REFUSED
    converted = tuple(_convert(entry, hint, from_text) for entry, hint in zip(value, hints, strict=True))
    return _REFUSED if any(entry is _REFUSED for entry in converted) else converted


def _tuple_text_to_list(text: str, with_ranges: bool) -> Any:
    if text.strip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return None
    parts = text.split("|")
    return [entry for part in parts for entry in _range_entries(part)] if with_ranges else parts


def _range_entries(part: str) -> Iterable[Any]:
    """`4-6` -> 4, 5, 6; anything else, a long range too, as it is, to be refused where it is no integer."""
    first, separator, last = part.strip().partition("-")
    if not (separator and _is_short_number(first) and _is_short_number(last)):
        return [part]
    return range(int(first), int(last) + 1) or [part]


def _is_short_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= 4


def _check_range(label: str, value: Any, metadata: Mapping[str, Any]) -> None:
    minimum, maximum = metadata.get("minimum"), metadata.get("maximum")
    for entry in value if isinstance(value, tuple) else (value,):
        if entry is None or isinstance(entry, str | dict):
            continue
        # NaN is neither below a minimum nor above a maximum.
        if isinstance(entry, float) and not math.isfinite(entry):
            raise ProjectorError(f"{label}: got {entry}, expected a finite number")
        if minimum is not None and entry < minimum:
            raise ProjectorError(f"{label}: got {entry}, expected at least {minimum}")
        largest = LARGEST_INTEGER if maximum is None and type(entry) is int else maximum
        if largest is not None and entry > largest:
            raise ProjectorError(f"{label}: got {entry}, expected at most {largest}")


def _to_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _parse_json_options(text: str) -> dict[str, Any]:
    try:
        return json.loads(text, object_pairs_hook=_refuse_repeated_keys)
    except json.JSONDecodeError as error:
        raise ProjectorError(f"projector options {text!r} begin like a JSON object but are not one: {error}") from error


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ProjectorError(f"projector option {repeated[0]!r} is given twice")
    return dict(pairs)


def _split_outside_brackets(text: str) -> list[str]:
    """Split at the commas that are not inside `[...]`."""
    parts, depth = [""], 0
    for character in text:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]
