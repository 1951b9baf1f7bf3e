"""The contract of a projector: a config that knows the token count without weights, and a module that obeys it.

Features are always a sequence (one tensor per selected layer of the vision tower) and the patch grid is always an
argument, so multi-layer projectors and rectangular images need no special case.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ._errors import ProjectorError
from ._options import check_fields, option, option_fields, unknown_name_message


class PatchGrid(NamedTuple):
    """Height and width of the patch map, in patches."""

    height: int
    width: int

    @property
    def num_patches(self) -> int:
        """height * width."""
        return self.height * self.width

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def refuse_small_grid(grid: PatchGrid, num_queries: int = 1) -> None:
    """Refuse an empty grid, or one that holds fewer patches than a projector shall make tokens of by pooling.

    Raises:
        ProjectorError: names the grid.
    """
    if min(grid.height, grid.width) < 1:
        raise ProjectorError(f"a {grid} grid holds no patch; expected at least one in height and in width")
    if grid.num_patches < num_queries:
        raise ProjectorError(
            f"a {grid} grid holds {grid.num_patches} patches, fewer than num_queries {num_queries}: pooling would only "
            f"repeat them. Choose num_queries of at most {grid.num_patches}, or larger images."
        )


def same_relative_depths(layers: Sequence[int], depth: int, num_vision_layers: int | None) -> tuple[int, ...]:
    """Layers that were chosen on a tower of `depth` blocks, on one of another depth: rounded up, repeats kept."""
    if num_vision_layers is None:
        return tuple(layers)
    return tuple(-(-layer * num_vision_layers // depth) for layer in layers)


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """What every projector is told: the two widths, which hidden states to read, and whether to keep the class token.

    Subclasses are frozen, keyword-only dataclasses too; each further field (made with `option`) is an option of the
    projector. A check that involves several fields goes into `__post_init__` after `super().__post_init__()`.

    Raises:
        ProjectorError: a field of the wrong type or outside its range.
    """

    layer_presets: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    """Names that the option `vision_layers` accepts in place of indices."""

    vision_hidden_size: int = dataclasses.field(metadata={"minimum": 1})
    text_hidden_size: int = dataclasses.field(metadata={"minimum": 1})
    vision_layers: tuple[int, ...] = option(
        (-2,), "hidden states of the vision tower to read, in this order (0 is the embedding, -1 the last block)"
    )
    keep_cls_token: bool = option(False, "pass the vision tower's class token on, in front of the patches")

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.vision_layers:
            raise ProjectorError(f"{type(self).__name__}.vision_layers: got no layer, expected at least one")

    def num_output_tokens(self, grid: PatchGrid) -> int:
        """Tokens per image on this grid, by arithmetic alone.

        Raises:
            ProjectorError: the projector cannot take this grid (the message names it).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define num_output_tokens")

    def num_input_tokens(self, grid: PatchGrid) -> int:
        """Tokens that `forward` expects from each layer: the patches, and the class token when it is kept.

        Raises:
            ProjectorError: the grid holds no patch.
        """
        refuse_small_grid(grid)
        return grid.height * grid.width + int(self.keep_cls_token)

    def token_grid(self, grid: PatchGrid) -> PatchGrid | None:
        """The map that the output tokens form, row by row; None where they form none (learned queries, extra tokens).

        Needed where the tokens of an image's crops are put together as one map.
        """
        return None

    @property
    def fused_hidden_size(self) -> int:
        """Channels after concatenating the selected layers."""
        return self.vision_hidden_size * len(self.vision_layers)

    @property
    def reads_patch_map(self) -> bool:
        """Whether the arrangement of the patches matters, beyond their number and order."""
        return True

    @classmethod
    def default_vision_layers(
        cls, num_vision_layers: int | None = None, options: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[int, ...]:
        """Layers to read when the user names none.

        Args:
            num_vision_layers: blocks of the tower; None where it is not known yet.
            options: the options that the user has given, JSON-able values by name.
        """
        return (-2,)

    @classmethod
    def tiny_options(cls) -> dict[str, Any]:
        """Options that make an instance small enough for a test; everything structural stays as it is."""
        return {}

    def options(self) -> dict[str, Any]:
        """Every option with its value, JSON-able (tuples as lists)."""
        values = {name: getattr(self, name) for name in option_fields(type(self))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """The whole config, JSON-able."""
        widths = {"vision_hidden_size": self.vision_hidden_size, "text_hidden_size": self.text_hidden_size}
        return widths | self.options()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProjectorConfig:
        """The inverse of `to_dict`, after a trip through JSON or not.

        Raises:
            ProjectorError: an unknown or missing field, or a value of the wrong type.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ProjectorError(unknown_name_message(f"field of {cls.__name__}", name, known, "Fields"))
        for name in ("vision_hidden_size", "text_hidden_size"):
            if name not in values:
                raise ProjectorError(f"{cls.__name__}: field {name!r} is missing; given: {', '.join(values)}")
        return cls(**values)

    def check_vision_layers(self, num_vision_layers: int) -> None:
        """Refuse layers that a tower with `num_vision_layers` blocks does not have.

        Such a tower has num_vision_layers + 1 hidden states: the embedding (0) and one per block.
        """
        for layer in self.vision_layers:
            if not -(num_vision_layers + 1) <= layer <= num_vision_layers:
                raise ProjectorError(
                    f"vision_layers {self.vision_layers}: layer {layer} does not exist. The vision tower has "
                    f"{num_vision_layers} blocks, so layers run from {-(num_vision_layers + 1)} to {num_vision_layers}."
                )

    def refuse_cls_token(self) -> None:
        """For projectors that need a rectangular map, where a class token has no place."""
        if self.keep_cls_token:
            raise ProjectorError(
                f"{type(self).__name__}.keep_cls_token: got true, expected false, because this projector works on "
                "the map of patches and a class token has no place in it; --mm_vision_select_feature patch drops it"
            )


class Projector(nn.Module):
    """Turns hidden states of a vision tower into tokens of a language model.

    A subclass defines `forward` (beginning with `self.check_features(features, grid)`) and `reset_parameters`, and
    ends its `__init__` with `self.reset_parameters()`.
    """

    compile_limitation: ClassVar[str] = ""
    """Why `torch.compile(fullgraph=True)` cannot take this projector; empty when it can."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def zero_gradient_parameters(self) -> tuple[str, ...]:
        """Patterns (as of fnmatch) of parameters whose gradient is zero by construction.

        Such as the bias of attention's keys, which moves all scores alike.
        """
        return ()

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        """Project one batch of images that share a grid.

        Args:
            features: one (batch, config.num_input_tokens(grid), vision_hidden_size) tensor per entry of
                config.vision_layers; patches are row-major, after the class token where that is kept.
            grid: height and width of the map in patches.
        Returns:
            (batch, config.num_output_tokens(grid), text_hidden_size)
        Raises:
            ProjectorError: number of layers, patches or channels not as the config says, or an impossible grid.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def apply(self, fn: Callable[[nn.Module], None]) -> Projector:
        """Call `fn` on every submodule and on this module, children first, as `nn.Module.apply` does.

        Not that method itself, because inside DeepSpeed's `zero.Init` it partitions each module again when it is done,
        and what `reset_parameters` has still to draw would be out of reach.
        """
        for module in _children_first(self):
            fn(module)
        return self

    def reset_parameters(self) -> None:
        """Draw every parameter anew, with the functions of `projectors.layers.initialization`.

        transformers builds models on the meta device and hands over raw memory for whatever a checkpoint lacks, so a
        parameter that is forgotten here starts from garbage. The functions leave a tensor alone that a checkpoint
        has already filled.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define reset_parameters")

    def convert_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the original implementation's keys (already without prefix) to this module's; others stay."""
        return dict(state_dict)

    def to_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename this module's keys to the original implementation's; the inverse of the conversion above."""
        return dict(state_dict)

    def check_features(self, features: Sequence[Tensor], grid: PatchGrid) -> None:
        """Compare layer count, patches and channels with the config."""
        name, config = type(self).__name__, self.config
        if isinstance(features, Tensor) or len(features) != len(config.vision_layers):
            given = "one bare tensor" if isinstance(features, Tensor) else f"{len(features)} tensors"
            raise ProjectorError(
                f"{name}: got {given}, expected a sequence of {len(config.vision_layers)}, one per layer of "
                f"vision_layers {config.vision_layers}"
            )
        num_tokens = config.num_input_tokens(grid)
        for layer, tokens in zip(config.vision_layers, features, strict=True):
            if tokens.dim() != 3 or tokens.shape[2] != config.vision_hidden_size:
                raise ProjectorError(
                    f"{name}: features of layer {layer} have shape {tuple(tokens.shape)}, expected "
                    f"(batch, patches, {config.vision_hidden_size} channels)"
                )
            if tokens.shape[1] != num_tokens:
                cls_note = " and one class token" if config.keep_cls_token else ""
                raise ProjectorError(
                    f"{name}: features of layer {layer} hold {tokens.shape[1]} tokens, expected {num_tokens} "
                    f"for a {grid.height}x{grid.width} grid{cls_note}"
                )


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
    yield module
