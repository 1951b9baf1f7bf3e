"""Honeybee's C-Abstractor (arXiv 2312.06742): residual convolution blocks around an adaptive average pooling.

Submodule names are Honeybee's (and timm's RegStage's), so its checkpoints load without renaming; what is called `bn`
there is a LayerNorm over the channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._base import PatchGrid, Projector, ProjectorConfig, refuse_small_grid
from ._errors import ProjectorError
from ._keys import without_class_position
from ._options import option
from ._registry import register_projector
from .layers import (
    LayerNorm2d,
    SqueezeExcite,
    build_mlp,
    concatenate_layers,
    learned_tokens,
    map_to_tokens,
    reset_module,
    reset_module_normal,
    reset_module_trunc_normal,
    resize_positions,
    tokens_to_map,
    trunc_normal_,
)

_NORM_EPS, _PRENORM_EPS = 1e-5, 1e-6
_SQUEEZE_RATIO = 0.25
_INITIALISERS = {
    "default": reset_module,
    "normal": reset_module_normal,
    "trunc_normal": reset_module_trunc_normal,
}


@dataclass(frozen=True, kw_only=True)
class CAbstractorConfig(ProjectorConfig):
    """A grid gives num_queries (+ num_eos_tokens) tokens and needs as many patches as num_queries says.

    Learned positions are interpolated to it.

    Honeybee reads the last hidden state (`vision_layers=[-1]`); the default here is the package's.
    """

    num_queries: int = option(144, "tokens per image, a square number", minimum=1)
    hidden_size: int = option(1024, "channels of the convolution blocks", minimum=1)
    depth: int = option(
        3, "blocks before and again after the pooling; 0 leaves pooling and read-out", minimum=0, maximum=1000
    )
    readout_depth: int = option(2, "Linear layers of the read-out, with SiLU between each two", minimum=1, maximum=1000)
    use_position_embedding: bool = option(True, "add a learned position embedding to the features")
    position_grid: tuple[int, int] = option(
        (24, 24), "height and width of the grid of learned positions; others are interpolated", minimum=1
    )
    prenorm: bool = option(False, "LayerNorm on the features before the positions are added")
    num_eos_tokens: int = option(0, "learned tokens appended after the image", minimum=0)
    init: Literal["default", "normal", "trunc_normal"] = option(
        "default",
        "PyTorch's default; N(0, 0.02**2) with zero biases, as Honeybee trained; or that normal cut at two standard "
        "deviations",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_cls_token()
        if math.isqrt(self.num_queries) ** 2 != self.num_queries:
            raise ProjectorError(f"CAbstractorConfig.num_queries: got {self.num_queries}, expected a square number")

    def num_output_tokens(self, grid: PatchGrid) -> int:
        refuse_small_grid(grid, self.num_queries)
        return self.num_queries + self.num_eos_tokens

    def token_grid(self, grid: PatchGrid) -> PatchGrid | None:
        refuse_small_grid(grid, self.num_queries)
        if self.num_eos_tokens:
            return None
        side = math.isqrt(self.num_queries)
        return PatchGrid(side, side)

    @classmethod
    def tiny_options(cls) -> dict[str, Any]:
        return {"num_queries": 4, "hidden_size": 24, "depth": 1, "position_grid": [4, 4]}


class MatrixConv2d(nn.Conv2d):
    """A 1x1 convolution as the matrix product that it is on channels-last memory; the weight keeps its four axes."""

    def forward(self, feature_map: Tensor) -> Tensor:
        return functional.linear(feature_map.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """Convolution without bias, LayerNorm over channels, optionally SiLU."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, groups: int = 1, activate: bool = True):
        super().__init__()
        convolution = MatrixConv2d if kernel_size == groups == 1 else nn.Conv2d
        self.conv = convolution(in_channels, channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
        self.bn = LayerNorm2d(channels, eps=_NORM_EPS)
        self.activate = activate

    def forward(self, feature_map: Tensor) -> Tensor:
        normed = self.bn(self.conv(feature_map))
        return functional.silu(normed) if self.activate else normed


class Bottleneck(nn.Module):
    """RegNet's block with one channel per group: 1x1, depthwise 3x3, squeeze-and-excitation, 1x1, residual, SiLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, channels, 1)
        self.conv2 = ConvNorm(channels, channels, 3, groups=channels)
        # timm derives the squeezed width from the block's input.
        self.se = SqueezeExcite(channels, max(round(in_channels * _SQUEEZE_RATIO), 1))
        self.conv3 = ConvNorm(channels, channels, 1, activate=False)
        is_widening = in_channels != channels
        self.downsample = ConvNorm(in_channels, channels, 1, activate=False) if is_widening else nn.Identity()

    def forward(self, feature_map: Tensor) -> Tensor:
        branch = self.conv3(self.se(self.conv2(self.conv1(feature_map))))
        return functional.silu(branch + self.downsample(feature_map))


def build_stage(in_channels: int, channels: int, depth: int) -> nn.Sequential:
    """`depth` blocks named b1, b2, ...; the first changes the width."""
    stage = nn.Sequential()
    for index in range(depth):
        stage.add_module(f"b{index + 1}", Bottleneck(in_channels if index == 0 else channels, channels))
    return stage


@register_projector(
    "c_abstractor",
    config=CAbstractorConfig,
    summary="Honeybee's C-Abstractor: residual convolution blocks around adaptive pooling; a fixed number of tokens.",
    paper="https://arxiv.org/abs/2312.06742",
    aliases=("c-abs",),
    token_formula="num_queries + num_eos_tokens",
)
class CAbstractor(Projector):
    """Position embedding, blocks, AdaptiveAvgPool2d(sqrt(num_queries)), blocks, `readout_depth` Linear with SiLU.

    Unlike the original it takes other grids than its own (positions are interpolated) and leaves the caller's
    features unchanged.

    Source: Honeybee `honeybee/projectors/projectors.py` at 2658d5a21fe4eb7cb17066dec3f7fa1efa7a65ef (Apache-2.0).
    """

    def __init__(self, config: CAbstractorConfig) -> None:
        super().__init__(config)
        channels, depth = config.fused_hidden_size, config.depth
        num_positions = PatchGrid(*config.position_grid).num_patches
        self.eos_tokens = learned_tokens(config.num_eos_tokens, config.text_hidden_size)
        self.pos_emb = learned_tokens(num_positions if config.use_position_embedding else 0, channels)
        self.prenorm = nn.LayerNorm(channels, eps=_PRENORM_EPS) if config.prenorm else nn.Identity()
        side = math.isqrt(config.num_queries)
        sampler = nn.AdaptiveAvgPool2d((side, side))
        if depth:
            before = build_stage(channels, config.hidden_size, depth)
            after = build_stage(config.hidden_size, config.hidden_size, depth)
            self.net: nn.Module = nn.Sequential(before, sampler, after)
        else:
            self.net = sampler
        readout_input = config.hidden_size if depth else channels
        self.readout = build_mlp(readout_input, config.text_hidden_size, config.readout_depth, nn.SiLU)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions and Linear layers as the option `init` says; learned tokens truncated normal, std 0.02."""
        self.apply(_INITIALISERS[self.config.init])
        trunc_normal_(self.pos_emb)
        trunc_normal_(self.eos_tokens)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        refuse_small_grid(grid, self.config.num_queries)
        tokens = self.prenorm(concatenate_layers(features))
        if self.pos_emb is not None:
            positions = resize_positions(self.pos_emb, PatchGrid(*self.config.position_grid), grid)
            tokens = tokens + positions.to(tokens.dtype)
        output = self.readout(map_to_tokens(self.net(tokens_to_map(tokens, grid))))
        if self.eos_tokens is None:
            return output
        return torch.cat([output, self.eos_tokens.expand(output.shape[0], -1, -1).to(output.dtype)], dim=1)

    def convert_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Old Honeybee checkpoints hold one more position, for the class token, in front: it is dropped."""
        return without_class_position(state_dict, "pos_emb", self.pos_emb)
