"""LLaVA-1.5's multi-layer perceptron per token, `mlp{N}x_gelu` (arXiv 2310.03744)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._base import PatchGrid, Projector, ProjectorConfig
from ._options import option
from ._registry import register_projector
from .layers import build_mlp, reset_module

_HF_LAYER_NAMES = {"0": "linear_1", "2": "linear_2"}


@dataclass(frozen=True, kw_only=True)
class MLPConfig(ProjectorConfig):
    """Several layers of the tower are concatenated along the channels, as in transformers' Llava."""

    depth: int = option(2, "number of Linear layers, with GELU between each two", minimum=1)

    @property
    def reads_patch_map(self) -> bool:
        return False

    def num_output_tokens(self, grid: PatchGrid) -> int:
        return self.num_input_tokens(grid)


def parse_mlp_spelling(spelling: str) -> dict[str, int] | None:
    """`mlp2x_gelu` -> {"depth": 2}; None for anything else."""
    match = re.fullmatch(r"mlp(\d+)x_gelu", spelling)
    return {"depth": int(match.group(1))} if match else None


@register_projector(
    "mlp",
    config=MLPConfig,
    summary="LLaVA-1.5's MLP per token (mlp2x_gelu by default); keeps every token.",
    paper="https://arxiv.org/abs/2310.03744",
    parse_spelling=parse_mlp_spelling,
    token_formula="H * W + keep_cls_token",
)
class MLPProjector(Projector):
    """Linear(layers * vision_hidden_size -> text_hidden_size), then depth - 1 times exact GELU and Linear.

    Source: LLaVA `llava/model/multimodal_projector/builder.py` (Apache-2.0); its keys are `{0,2,...}.{weight,bias}`,
    transformers' are `linear_1`, `linear_2`. Both load.
    """

    def __init__(self, config: MLPConfig) -> None:
        super().__init__(config)
        self.mlp = build_mlp(config.fused_hidden_size, config.text_hidden_size, config.depth)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default, as in LLaVA."""
        self.mlp.apply(reset_module)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        return self.mlp(torch.cat(tuple(features), dim=2))

    def convert_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """LLaVA's `0.weight` and transformers' `linear_1.weight` both become `mlp.0.weight`."""
        index_of = {name: index for index, name in _HF_LAYER_NAMES.items()}
        converted = {}
        for key, tensor in state_dict.items():
            layer, _, rest = key.partition(".")
            converted[f"mlp.{index_of.get(layer, layer)}.{rest}"] = tensor
        return converted

    def to_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix("mlp."): tensor for key, tensor in state_dict.items()}
