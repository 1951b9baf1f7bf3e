"""Dense Connector (arXiv 2405.13800): features of many layers, brought together in front of any other projector.

It has no weights of its own. Everything after the fusion is a registered projector that reads one layer; with the
default, LLaVA's mlp2x_gelu, this is the published model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ._base import PatchGrid, Projector, ProjectorConfig, refuse_small_grid, same_relative_depths
from ._errors import ProjectorError
from ._options import option
from ._registry import ProjectorPreset, ProjectorSelection, register_projector, select_projector

_REFERENCE_LAYERS, _REFERENCE_DEPTH = (7, 15), 24
_DEFAULT_KIND = "dci"
_INNER_PREFIX = "projector."


@dataclass(frozen=True, kw_only=True)
class DenseConnectorConfig(ProjectorConfig):
    """The last of `vision_layers` is the base, the layer before the tower's last; the others are brought to it.

    sti and sci read layers 7 and 15 of 24, or the same relative depths; dci reads an even number of layers from the
    embedding on: of 24 blocks the first 24 hidden states, the base once more among them, of SigLIP-so400m's 27 the
    first 26, as the original does.
    """

    kind: Literal["sti", "sci", "dci"] = option(
        _DEFAULT_KIND,
        "sti appends pooled tokens of the other layers, sci concatenates their channels, dci concatenates the mean of "
        "their first half and the mean of their second half",
    )
    projector: str = option(
        "mlp2x_gelu",
        "the projector behind it: a registered name; one of several layers, such as saep, is given the fused one",
    )
    projector_options: dict[str, Any] | None = option(None, "options of the projector behind it")
    pool_size: int = option(8, "sti: consecutive patches that are averaged to one appended token", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_cls_token()
        num_least = 3 if self.kind == "dci" else 2
        if len(self.vision_layers) < num_least:
            raise ProjectorError(
                f"projector 'dense_connector', option vision_layers: got {len(self.vision_layers)} layer(s) "
                f"{self.vision_layers}, expected at least {num_least} with kind {self.kind}: those to bring together, "
                "then the base"
            )
        # Built for every kind, so that wrong options of the projector behind are refused here.
        if self.inner_config.keep_cls_token:
            raise ProjectorError(
                "dense_connector: projector_options say keep_cls_token=true, but the fused features have no class "
                "token; leave it out"
            )
        if self.inner_config.reads_patch_map and self.kind == "sti":
            raise ProjectorError(
                f"dense_connector: kind 'sti' appends tokens that have no place on the map of patches, which projector "
                f"{self.projector!r} works on; choose kind sci or dci, or a projector such as mlp2x_gelu"
            )

    def __hash__(self) -> int:
        # Options of another projector are a dict, which has no hash of its own.
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    @cached_property
    def inner_selection(self) -> ProjectorSelection:
        """The projector behind the fusion."""
        if ":" in self.projector:
            raise ProjectorError(
                f"dense_connector: projector {self.projector!r} is code outside this package; inside another "
                "projector's options only registered names are allowed"
            )
        options = dict(self.projector_options or {})
        if "vision_layers" in options:
            raise ProjectorError(
                "dense_connector: vision_layers is an option of dense_connector itself; the projector behind it reads "
                f"the one fused map, so leave {options['vision_layers']!r} out of projector_options"
            )
        return select_projector(self.projector, options | {"vision_layers": [-2]})

    @cached_property
    def inner_config(self) -> ProjectorConfig:
        """The config of the projector behind the fusion, which sees the fused channels as one layer."""
        selection = self.inner_selection
        try:
            return selection.build_config(
                vision_hidden_size=self.fused_channels, text_hidden_size=self.text_hidden_size
            )
        except ProjectorError as error:
            raise ProjectorError(
                f"dense_connector gives the projector behind it one layer of {self.fused_channels} channels, and "
                f"{self.projector!r} does not take that: {error}"
            ) from error

    @property
    def fused_channels(self) -> int:
        """Channels of the fused tokens."""
        # dci: the base and two means, each as wide as one layer
        num_parts = {"sti": 1, "sci": len(self.vision_layers), "dci": 3}[self.kind]
        return num_parts * self.vision_hidden_size

    @property
    def reads_patch_map(self) -> bool:
        return True

    @classmethod
    def default_vision_layers(
        cls, num_vision_layers: int | None = None, options: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[int, ...]:
        """With dci all layers, in two equal halves, and the base; else the published ones and the base."""
        depth = num_vision_layers or _REFERENCE_DEPTH
        base = depth - 1
        if options.get("kind", _DEFAULT_KIND) == "dci":
            return (*range(depth // 2 * 2), base)
        others = same_relative_depths(_REFERENCE_LAYERS, _REFERENCE_DEPTH, num_vision_layers)
        # Depths are rounded up, so on a shallow tower they can meet each other and the base.
        return (*(dict.fromkeys(layer for layer in others if layer < base) or (0,)), base)

    def inner_grid(self, grid: PatchGrid) -> PatchGrid:
        """The grid that the projector behind is told: with sti a row of all tokens, appended ones too."""
        refuse_small_grid(grid)
        if self.kind != "sti":
            return grid
        if self.pool_size > grid.num_patches:
            raise ProjectorError(
                f"dense_connector: pool_size {self.pool_size} is more than the {grid.num_patches} patches of a {grid} "
                f"grid, so kind sti would append nothing; choose a pool_size of at most {grid.num_patches}"
            )
        num_appended = grid.num_patches // self.pool_size * (len(self.vision_layers) - 1)
        return PatchGrid(1, grid.num_patches + num_appended)

    def num_output_tokens(self, grid: PatchGrid) -> int:
        return self.inner_config.num_output_tokens(self.inner_grid(grid))

    def token_grid(self, grid: PatchGrid) -> PatchGrid | None:
        return None if self.kind == "sti" else self.inner_config.token_grid(grid)


_PRESETS = {
    f"dense_connector_{kind}": ProjectorPreset({"kind": kind}, f"Dense Connector, {meaning}.")
    for kind, meaning in {
        "sti": "sparse token integration: pooled tokens of two earlier layers are appended",
        "sci": "sparse channel integration: the channels of two earlier layers are concatenated",
        "dci": "dense channel integration: means of the shallower and deeper layers are concatenated",
    }.items()
}


@register_projector(
    "dense_connector",
    config=DenseConnectorConfig,
    summary="Dense Connector: features of many layers in front of any projector that reads one.",
    paper="https://arxiv.org/abs/2405.13800",
    token_formula="those of `projector`; with kind=sti it is given H * W + (len(vision_layers) - 1) * "
    "floor(H * W / pool_size) tokens",
    presets=_PRESETS,
)
class DenseConnector(Projector):
    """Fuses the layers, then calls the projector behind it. x is the base, h the other layers, C their channels::

        sti: tokens [x, AvgPool1d(pool_size)(h) of each other layer], over the row-major sequence; width C
        sci: channels [x, h, ...]; width C * number of layers
        dci: channels [x, mean of the shallower half of h, mean of the deeper half]; width 3 C

    Unlike the original it counts the tower's layers instead of guessing them from the tower's name.

    Source: Dense Connector `dc/model/multimodal_projector/dense_connector.py` (Apache-2.0). Its checkpoints hold the
    keys of the projector behind, LLaVA's `mm_projector.{0,2}`; those of any projector that can be behind load.
    """

    def __init__(self, config: DenseConnectorConfig) -> None:
        super().__init__(config)
        self.projector = config.inner_selection.build(config.inner_config)

    def reset_parameters(self) -> None:
        """As the projector behind draws them."""
        self.projector.reset_parameters()

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        inner_grid = self.config.inner_grid(grid)
        return self.projector([self._fuse(features)], inner_grid)

    def _fuse(self, features: Sequence[Tensor]) -> Tensor:
        """K tensors (B, N, C) -> (B, tokens, fused_channels)."""
        *others, base = features
        if self.config.kind == "sti":
            pooled = [functional.avg_pool1d(tokens.transpose(1, 2), self.config.pool_size) for tokens in others]
            return torch.cat([base, *(tokens.transpose(1, 2) for tokens in pooled)], dim=1)
        if self.config.kind == "sci":
            return torch.cat([base, *others], dim=2)
        middle = len(others) // 2
        means = [torch.stack(tuple(half)).mean(0) for half in (others[:middle], others[middle:])]
        return torch.cat([base, *means], dim=2)

    def convert_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keys of the projector behind, its own or its original's -> `projector.*`."""
        is_own = set(state_dict) == set(self.projector.state_dict())
        inner = state_dict if is_own else self.projector.convert_original_state_dict(state_dict)
        return {_INNER_PREFIX + key: tensor for key, tensor in inner.items()}

    def to_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inner = {key.removeprefix(_INNER_PREFIX): tensor for key, tensor in state_dict.items()}
        return self.projector.to_original_state_dict(inner)
