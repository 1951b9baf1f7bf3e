"""What a projector's registration says, put into words: for `show` and for the reference page alike."""

import dataclasses
import inspect
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from llava_saep.commands.projectors.text import layer_ranges, option_text, options_text
from projectors import ProjectorConfig, ProjectorPreset, ProjectorSpec, describe_options

_COMMON_OPTIONS = ("vision_layers", "keep_cls_token")
"""Options that every projector has."""
_MAX_LAYERS_LISTED = 6


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option as a user meets it; `allowed` is its range or its named values, in words, or empty."""

    name: str
    type: str
    default: Any
    allowed: str
    help: str


def explain_options(
    config_class: type[ProjectorConfig], num_vision_layers: int | None, given: Mapping[str, Any] = MappingProxyType({})
) -> list[Option]:
    """Every option, those of the projector itself before those that all have.

    Args:
        num_vision_layers: blocks of the tower, and
        given: options that have been chosen; the layers that are read by default may depend on both.
    """
    metadata = {field.name: field.metadata for field in dataclasses.fields(config_class)}
    layers = config_class.default_vision_layers(num_vision_layers, given)
    options = [
        Option(
            name=info.name,
            type=info.type,
            default=_as_json(layers if info.name == "vision_layers" else info.default),
            allowed=_allowed(info.name, metadata[info.name], config_class),
            help=info.help,
        )
        for info in describe_options(config_class)
    ]
    return sorted(options, key=lambda option: option.name in _COMMON_OPTIONS)


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _allowed(name: str, metadata: Mapping[str, Any], config_class: type[ProjectorConfig]) -> str:
    if name == "vision_layers" and config_class.layer_presets:
        presets = ", ".join(
            f"{preset} {'|'.join(map(str, layers))}" for preset, layers in config_class.layer_presets.items()
        )
        return f"or by name: {presets}"
    minimum, maximum = metadata.get("minimum"), metadata.get("maximum")
    bounds = [f"at least {minimum}" if minimum is not None else "", f"at most {maximum}" if maximum is not None else ""]
    return ", ".join(filter(None, bounds))


def preset_meaning(preset: ProjectorPreset) -> str:
    """What a preset fixes, and what it only changes the default of, as options are typed."""
    fixed = options_text(preset.options)
    defaults = options_text(preset.defaults)
    return "; ".join(filter(None, [fixed, f"{defaults} unless given" if defaults else ""]))


def provider_in_words(spec: ProjectorSpec) -> str:
    """Where the class comes from; code outside the package says so itself, as `module:Class` or `file.py:Class`."""
    if ":" in spec.provider:
        return spec.provider
    package = f" of {spec.package}" if spec.package else ""
    return f"{spec.provider}{package} ({class_place(spec)})"


def class_place(spec: ProjectorSpec) -> str:
    """`module:Class`."""
    return f"{spec.module_class.__module__}:{spec.module_class.__qualname__}"


def example_flags(
    name: str, spec: ProjectorSpec, given: Mapping[str, Any] = MappingProxyType({}), typed: str = ""
) -> str:
    """Training flags that choose the projector, with the options as typed, or one of its own at its default.

    Args:
        given: options that the name fixes, which the example of one leaves out.
        typed: the text of `--mm_projector_options`.
    """
    flags = f"--mm_projector_type {shlex.quote(name)}"
    if typed.strip():
        return f"{flags} --mm_projector_options {shlex.quote(typed)}"
    for option in explain_options(spec.config_class, None):
        if option.name not in _COMMON_OPTIONS and option.name not in given and option.default is not None:
            text = options_text({option.name: option.default})
            return f"{flags} --mm_projector_options {shlex.quote(text)}"
    return flags


def value_text(option: Option, value: Any) -> str:
    """A value as one types it; a long list of layers with ranges."""
    is_long = option.name == "vision_layers" and len(value) > _MAX_LAYERS_LISTED
    return layer_ranges(value).replace(" ", "|") if is_long else option_text(value)


def class_description(spec: ProjectorSpec) -> str:
    """The class's own docstring, reStructuredText as written; an inherited one says nothing of it."""
    return _own_docstring(spec.module_class)


def config_description(spec: ProjectorSpec) -> str:
    """The config class's own docstring, likewise."""
    return _own_docstring(spec.config_class)


def _own_docstring(documented: type) -> str:
    written = inspect.cleandoc(documented.__dict__.get("__doc__") or "")
    # dataclasses write a signature where there is no docstring.
    return "" if written.startswith(f"{documented.__name__}(") else written


def paragraphs(docstring: str) -> list[tuple[str, bool]]:
    """Split into (text, is_literal): literal blocks follow a paragraph that ends in `::` and are indented."""
    blocks: list[tuple[str, bool]] = []
    expects_literal = False
    for block in filter(str.strip, docstring.split("\n\n")):
        is_literal = block.startswith(" ") and (expects_literal or blocks[-1][1])
        if is_literal and blocks[-1][1]:
            blocks[-1] = (f"{blocks[-1][0]}\n\n{textwrap.dedent(block)}", True)
        elif is_literal:
            blocks.append((textwrap.dedent(block), True))
        else:
            expects_literal = block.rstrip().endswith("::")
            blocks.append((block.rstrip()[:-1] if expects_literal else block, False))
    return blocks
