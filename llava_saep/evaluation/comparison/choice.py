"""The list of projectors that a comparison is given: names of the registry, each with options in brackets."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llava_saep.errors import UserError
from projectors import ProjectorSelection, parse_projector_options, registered_presets, select_projector

_ITEM = re.compile(r"(?P<name>[^()]+?)\s*(?:\((?P<options>.*)\))?", re.DOTALL)
_MAX_FOLDER_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One projector of the list.

    Args:
        written: as the user wrote it, without spaces.
        label: the same, but of a file's path only the last part where that tells it from the others.
        name: whatever `--mm_projector_type` takes.
        options: what was written in brackets.
    """

    written: str
    label: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder_name(self) -> str:
        """What was written as a folder's name; one that has to be changed for it ends in a hash, so that none meet."""
        plain = re.sub(r"[^\w.-]+", "-", self.written).strip("-")[:_MAX_FOLDER_CHARACTERS]
        if plain == self.written:
            return plain
        return f"{plain}-{hashlib.sha256(self.written.encode()).hexdigest()[:8]}"


def parse_choices(text: str) -> list[Choice]:
    """Read `saep,saep(stride=1,kernel_size=5),mlp2x_gelu`.

    Raises:
        UserError: an item is not NAME or NAME(OPTIONS), one is written twice, or there is none.
        ProjectorError: no such projector, or not such options. Code that a name points to is imported.
    """
    choices = [_parse_choice(item) for item in split_outside_brackets(text) if item.strip()]
    if not choices:
        raise UserError("--projectors names none; expected for example saep,mlp2x_gelu,saep(stride=1)")
    repeated = _repeated([choice.written for choice in choices])
    if repeated:
        raise UserError(f"--projectors names {repeated[0]} twice")
    for choice in choices:
        selected(choice)
    not_unique = _repeated([choice.label for choice in choices])
    return [replace(choice, label=choice.written) if choice.label in not_unique else choice for choice in choices]


def _repeated(texts: Sequence[str]) -> list[str]:
    return sorted({text for text in texts if texts.count(text) > 1})


def split_outside_brackets(text: str) -> list[str]:
    """Split at the commas that are outside of `(...)`."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _parse_choice(item: str) -> Choice:
    match = _ITEM.fullmatch(item.strip())
    if match is None:
        raise UserError(f"--projectors: {item.strip()!r} is neither NAME nor NAME(OPTION=VALUE,...)")
    options = parse_projector_options(match["options"] or "")
    written = "".join(item.split())
    # The folders of a path say nothing in a table, and leave it no room.
    folders, _, _ = "".join(match["name"].split()).rpartition("/")
    label = written[len(folders) :].removeprefix("/")
    return Choice(written=written, label=label, name=match["name"], options=options)


def selected(choice: Choice, defaults: Mapping[str, str] | None = None) -> ProjectorSelection:
    """The projector with its options, over those that a recipe has for its registered name.

    Args:
        defaults: options text by registered name. What a preset's name stands for is not overridden.
    """
    plain = select_projector(choice.name, choice.options, trust_projector_code=True)
    for_this = parse_projector_options((defaults or {}).get(plain.name, ""))
    options = {**without_meant_by_name(choice.name, for_this), **choice.options}
    return select_projector(choice.name, options, trust_projector_code=True)


def without_meant_by_name(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the spelling of a projector leaves open: `mlp2x_gelu` fixes its depth, a preset its options."""
    preset = registered_presets().get(name)
    fixed = select_projector(name, trust_projector_code=True).options if preset is None else preset.options
    return {option: value for option, value in options.items() if option not in fixed}
