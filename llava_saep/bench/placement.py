"""A projector between a tower and a language model: its tokens, parameters and layers, without its weights."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llava_saep.errors import UserError
from projectors import (
    PatchGrid,
    Projector,
    ProjectorConfig,
    ProjectorError,
    ProjectorSelection,
    select_projector,
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The tower and language model between which a projector is placed."""

    vision_hidden_size: int
    text_hidden_size: int
    grid: PatchGrid
    num_vision_layers: int | None


CLIP_L_INTO_7B = Sizes(vision_hidden_size=1024, text_hidden_size=4096, grid=PatchGrid(24, 24), num_vision_layers=24)
"""CLIP ViT-L/14 at 336 px and a language model 4096 wide: LLaVA-1.5-7B."""


@dataclass(frozen=True, kw_only=True)
class ProjectorDescription:
    """What a name means at given sizes. With `error`, the projector cannot be used with them and has no numbers."""

    name: str
    summary: str
    paper: str = ""
    provider: str = ""
    package: str = ""
    registered_name: str = ""
    preset_of: str | None = None
    aliases: tuple[str, ...] = ()
    token_formula: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    num_tokens: int | None = None
    num_parameters: int | None = None
    vision_layers: tuple[int, ...] = ()
    error: str | None = None


def describe_projector(name: str, sizes: Sizes, options: Mapping[str, Any] | None = None) -> ProjectorDescription:
    """Count the tokens and parameters of a projector without allocating its weights.

    Args:
        name: whatever `--mm_projector_type` takes; code outside the package is imported.
    Raises:
        ProjectorError: the name or an option is unknown. A projector that is known, but does not go with the sizes,
            gives a description with `error`.
    """
    selection = select_by_hand(name, options)
    known = _known(name, selection)
    try:
        config = build_config(selection, sizes)
        num_tokens = config.num_output_tokens(sizes.grid)
        projector = build_without_memory(selection, config)
    except ProjectorError as error:
        return ProjectorDescription(**known, error=str(error))
    except (RuntimeError, OverflowError) as error:  # torch's, where a product of sizes is beyond its integers
        reason = str(error).splitlines()[:1]  # behind it torch may append its own stack
        return ProjectorDescription(**known, error=": ".join([type(error).__name__, *reason]))
    return ProjectorDescription(
        **known,
        num_tokens=num_tokens,
        num_parameters=sum(parameter.numel() for parameter in projector.parameters()),
        vision_layers=tuple(config.vision_layers),
    )


def describe_registered(names: Sequence[str], sizes: Sizes) -> list[ProjectorDescription]:
    """One description per name; an installed projector that cannot be used has an `error` too."""
    descriptions = []
    for name in names:
        try:
            descriptions.append(describe_projector(name, sizes))
        except Exception as error:  # Other people's code may raise anything, and must not end the list.
            reason = str(error) if isinstance(error, ProjectorError) else f"{type(error).__name__}: {error}"
            descriptions.append(ProjectorDescription(name=name, registered_name=name, summary="", error=reason))
    return descriptions


def refuse_unusable(reasons: Mapping[str, str | None]) -> None:
    """For the end of a command, when everything has been printed: what was asked for by name, but cannot be used.

    Args:
        reasons: the `error` of each projector that was named.
    Raises:
        UserError: at least one has a reason; it names all of them.
    """
    unusable = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    if unusable:
        # A file or pipe is written in blocks: without this the reasons would come before what they are about.
        sys.stdout.flush()
        raise UserError("\n".join(unusable))


def select_by_hand(name: str, options: Mapping[str, Any] | None = None) -> ProjectorSelection:
    """Select a projector that a person named: who writes package.module:Class on the command line means to run it."""
    return select_projector(name, options, trust_projector_code=True)


def build_config(selection: ProjectorSelection, sizes: Sizes) -> ProjectorConfig:
    """The projector's config between that tower and that language model."""
    return selection.build_config(
        vision_hidden_size=sizes.vision_hidden_size,
        text_hidden_size=sizes.text_hidden_size,
        num_vision_layers=sizes.num_vision_layers,
    )


def build_without_memory(selection: ProjectorSelection, config: ProjectorConfig) -> Projector:
    """The projector on the meta device: shapes without values."""
    with torch.device("meta"):
        return selection.build(config)


def _known(name: str, selection: ProjectorSelection) -> dict[str, Any]:
    spec = selection.spec
    preset = spec.presets.get(name)
    return {
        "name": selection.name if ":" in name else name,
        "summary": preset.summary if preset else spec.summary,
        "paper": spec.paper,
        "provider": spec.provider,
        "package": spec.package,
        "registered_name": spec.name,
        "preset_of": spec.name if preset else None,
        "aliases": spec.aliases,
        "token_formula": spec.token_formula,
        "options": dict(selection.options),
    }
