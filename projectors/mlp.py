"""LLaVA-1.5's multi-layer perceptron per token, `mlp{N}x_gelu` (arXiv 2310.03744).

LLaVA-NeXT's `mlp{N}x_res{M}x_gelu` is the same with M residual blocks behind it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ._base import PatchGrid, Projector, ProjectorConfig
from ._errors import ProjectorError
from ._options import option
from ._registry import register_projector
from .layers import build_mlp, concatenate_layers, reset_module

_HF_LAYER_NAMES = {"0": "linear_1", "2": "linear_2"}


@dataclass(frozen=True, kw_only=True)
class MLPConfig(ProjectorConfig):
    """Several layers of the tower are concatenated along the channels, as in transformers' Llava."""

    depth: int = option(2, "number of Linear layers, with GELU between each two", minimum=1, maximum=1000)
    num_residual_blocks: int = option(
        0,
        "LayerNorm, Linear, GELU, Linear, added to the normalised input, as often as this after the MLP",
        minimum=0,
        maximum=1000,
    )

    @property
    def reads_patch_map(self) -> bool:
        return False

    def num_output_tokens(self, grid: PatchGrid) -> int:
        return self.num_input_tokens(grid)

    def token_grid(self, grid: PatchGrid) -> PatchGrid | None:
        return None if self.keep_cls_token else grid


class NormedResidualBlock(nn.Module):
    """LayerNorm (eps 1e-5), then Linear, exact GELU and Linear, added to the output of the norm.

    The residual is what the norm gives, not what the block is given: LLaVA-NeXT's SimpleResBlock.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(channels)
        self.proj = build_mlp(channels, channels, depth=2)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.pre_norm(tokens)
        return normed + self.proj(normed)


def parse_mlp_spelling(spelling: str) -> dict[str, int] | None:
    """`mlp2x_gelu` -> {"depth": 2}, `mlp2x_res1x_gelu` -> also {"num_residual_blocks": 1}; None for anything else.

    Raises:
        ProjectorError: the spelling asks for an MLP without a Linear layer.
    """
    match = re.fullmatch(r"mlp(\d+)x(?:_res(\d+)x)?_gelu", spelling)
    if match is None:
        return None
    depth, num_residual_blocks = match.groups()
    if int(depth) == 0:
        raise ProjectorError(
            f"projector {spelling!r} means depth=0, an MLP without a Linear layer; expected at least 1, as in "
            "'mlp1x_gelu'. Features pass unchanged with 'identity'."
        )
    options = {"depth": int(depth)}
    return options if num_residual_blocks is None else options | {"num_residual_blocks": int(num_residual_blocks)}


@register_projector(
    "mlp",
    config=MLPConfig,
    summary="LLaVA-1.5's MLP per token: mlp{N}x_gelu (N is 2 by default), mlp{N}x_res{M}x_gelu; keeps every token.",
    paper="https://arxiv.org/abs/2310.03744",
    parse_spelling=parse_mlp_spelling,
    example_spellings=("mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "mlp4x_gelu", "mlp2x_res2x_gelu"),
    token_formula="H * W + keep_cls_token",
)
class MLPProjector(Projector):
    """Linear(layers * vision_hidden_size -> text_hidden_size), then depth - 1 times exact GELU and Linear.

    LLaVA-NeXT's `mlp{N}x_res{M}x_gelu` ends with M blocks that add an MLP's output to their normalised input.

    Source: LLaVA and LLaVA-NeXT `llava/model/multimodal_projector/builder.py` (Apache-2.0); their keys are
    `{0,2,...}.{weight,bias}` and `{3,...}.{pre_norm,proj.0,proj.2}`, transformers' are `linear_1`, `linear_2`; all
    load.
    """

    def __init__(self, config: MLPConfig) -> None:
        super().__init__(config)
        self.mlp = build_mlp(config.fused_hidden_size, config.text_hidden_size, config.depth)
        self.mlp.extend(NormedResidualBlock(config.text_hidden_size) for _ in range(config.num_residual_blocks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default, as in LLaVA."""
        self.mlp.apply(reset_module)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        return self.mlp(concatenate_layers(features))

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
