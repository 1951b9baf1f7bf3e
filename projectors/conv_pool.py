"""LLaVA-NeXT's pooler: a convolution over disjoint windows of patches, then an MLP (its `pooler` projector type)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from ._base import PatchGrid, Projector
from ._registry import register_projector
from ._windows import WindowedProjectorConfig
from .layers import concatenate_layers, fold_windows, pad_to_windows, reset_module


@dataclass(frozen=True, kw_only=True)
class ConvPoolConfig(WindowedProjectorConfig):
    """The original's window is 2x2; it takes only the square grid of its vision tower."""


class WindowConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel, as the one matrix product that it is; tokens in, tokens out.

    A window's channels are laid out as the flattened weight has them, so that the weight is never copied.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        super().__init__(in_channels, out_channels, factor, stride=factor)
        self.factor = factor

    def forward(self, tokens: Tensor, grid: PatchGrid) -> Tensor:
        windows = fold_windows(tokens, grid, self.factor, channel_major=True)
        return functional.linear(windows, self.weight.flatten(1), self.bias)


@register_projector(
    "conv_pool",
    config=ConvPoolConfig,
    summary="LLaVA-NeXT's pooler: a 2x2 convolution of stride 2, then GELU and Linear; a quarter of the tokens.",
    paper="https://github.com/LLaVA-VL/LLaVA-NeXT",
    aliases=("pooler",),
    token_formula="ceil(H / factor) * ceil(W / factor)",
)
class ConvPool(Projector):
    """Conv2d(layers * vision_hidden_size -> text_hidden_size, kernel and stride factor), exact GELU, Linear.

    Submodule names are the original's, so its checkpoints load without renaming.

    Source: LLaVA-NeXT `llava/model/multimodal_projector/pooler_projector.py` (Apache-2.0).
    """

    def __init__(self, config: ConvPoolConfig) -> None:
        super().__init__(config)
        width = config.text_hidden_size
        self.conv_pool = WindowConv2d(config.fused_hidden_size, width, config.factor)
        self.proj = nn.Sequential(nn.GELU(), nn.Linear(width, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default, as in LLaVA-NeXT."""
        self.apply(reset_module)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        padded_grid = self.config.padded_grid(grid)
        tokens = pad_to_windows(concatenate_layers(features), grid, self.config.factor)
        return self.proj(self.conv_pool(tokens, padded_grid))
