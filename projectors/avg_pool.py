"""DeCo's parameter-free compression: average the patch map down to a small square, then an MLP (arXiv 2405.20985)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from ._base import PatchGrid, Projector, ProjectorConfig, refuse_small_grid
from ._errors import ProjectorError
from ._options import option
from ._registry import register_projector
from .layers import build_mlp, concatenate_layers, map_to_tokens, reset_module, tokens_to_map


@dataclass(frozen=True, kw_only=True)
class AvgPoolConfig(ProjectorConfig):
    """Any grid of at least num_queries patches gives num_queries tokens; the original takes square grids only."""

    num_queries: int = option(144, "tokens per image, a square number", minimum=1)
    depth: int = option(
        2, "number of Linear layers after the pooling, with GELU between each two", minimum=1, maximum=1000
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_cls_token()
        if math.isqrt(self.num_queries) ** 2 != self.num_queries:
            raise ProjectorError(f"AvgPoolConfig.num_queries: got {self.num_queries}, expected a square number")

    def num_output_tokens(self, grid: PatchGrid) -> int:
        refuse_small_grid(grid, self.num_queries)
        return self.num_queries

    def token_grid(self, grid: PatchGrid) -> PatchGrid:
        refuse_small_grid(grid, self.num_queries)
        side = math.isqrt(self.num_queries)
        return PatchGrid(side, side)

    @classmethod
    def tiny_options(cls) -> dict[str, Any]:
        return {"num_queries": 4}


@register_projector(
    "avg_pool",
    config=AvgPoolConfig,
    summary="DeCo: adaptive average pooling to a fixed number of tokens, then an MLP.",
    paper="https://arxiv.org/abs/2405.20985",
    aliases=("deco",),
    token_formula="num_queries",
)
class AvgPoolProjector(Projector):
    """AdaptiveAvgPool2d(sqrt(num_queries)) on the raw features, then `mlp{depth}x_gelu`.

    Source: the code block in DeCo's README; the order (pool first, MLP after) is DeCo's point.
    """

    def __init__(self, config: AvgPoolConfig) -> None:
        super().__init__(config)
        self.mlp = build_mlp(config.fused_hidden_size, config.text_hidden_size, config.depth)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default."""
        self.mlp.apply(reset_module)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        refuse_small_grid(grid, self.config.num_queries)
        feature_map = tokens_to_map(concatenate_layers(features), grid)
        side = math.isqrt(self.config.num_queries)
        return self.mlp(map_to_tokens(functional.adaptive_avg_pool2d(feature_map, (side, side))))

    def convert_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """DeCo's `mlp_projector.{0,2}` -> `mlp.{0,2}`."""
        prefix = "mlp_projector."
        return {
            f"mlp.{key.removeprefix(prefix)}" if key.startswith(prefix) else key: state_dict[key] for key in state_dict
        }

    def to_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"mlp_projector.{key.removeprefix('mlp.')}": tensor for key, tensor in state_dict.items()}
