"""Tokens as maps and back, and the convolution blocks that work on them.

Features arrive as (batch, height * width, channels), which is exactly a channels-last map: the conversions are views,
norms and 1x1 convolutions run on the channels-last axis without a copy, and only spatial filters see (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, cat, nn
from torch.nn import functional

from .._base import PatchGrid


def concatenate_layers(features: Sequence[Tensor]) -> Tensor:
    """Put the channels of several layers side by side: K times (B, N, C) -> (B, N, K * C), contiguous.

    One contiguous layer comes back as it is. One that is not (its class token was cut off in front) is copied here
    once, since a Linear layer would copy it too and then add its bias in a pass of its own.
    """
    return features[0].contiguous() if len(features) == 1 else cat(tuple(features), dim=2)


def tokens_to_map(tokens: Tensor, grid: PatchGrid) -> Tensor:
    """View (batch, height * width, channels) tokens, row-major, as a (batch, channels, height, width) map."""
    return tokens.unflatten(1, (grid.height, grid.width)).permute(0, 3, 1, 2)


def map_to_tokens(feature_map: Tensor) -> Tensor:
    """The inverse of `tokens_to_map`; a view when the map is channels-last."""
    return feature_map.permute(0, 2, 3, 1).flatten(1, 2)


def pad_to_multiple(feature_map: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of a (B, C, H, W) map until both sides are multiples of `multiple`."""
    # Concatenation rather than F.pad(mode="replicate"): its backward is deterministic on CUDA, and layout is kept.
    for dimension in (2, 3):
        missing = -feature_map.shape[dimension] % multiple
        if missing:
            edge = feature_map.narrow(dimension, feature_map.shape[dimension] - 1, 1)
            feature_map = cat([feature_map] + [edge] * missing, dim=dimension)
    return feature_map


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each position of a (B, C, H, W) map."""

    def forward(self, feature_map: Tensor) -> Tensor:
        return super().forward(feature_map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PointwiseConv2d(nn.Linear):
    """A 1x1 convolution of a (B, C, H, W) map, as the matrix product that it is on channels-last memory."""

    def forward(self, feature_map: Tensor) -> Tensor:
        return super().forward(feature_map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DepthwiseConv2d(nn.Conv2d):
    """One kernel_size x kernel_size filter per channel; output sides are ceil(side / stride) for any kernel.

    An even kernel is padded by one zero more at the right and bottom, so kernel 2 with stride 2 sees disjoint blocks.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1, bias: bool = True) -> None:
        is_odd = kernel_size % 2 == 1
        super().__init__(
            channels, channels, kernel_size, stride, kernel_size // 2 if is_odd else 0, groups=channels, bias=bias
        )
        before, after = (kernel_size - 1) // 2, kernel_size // 2
        self.zero_padding = None if is_odd else (before, after, before, after)

    def forward(self, feature_map: Tensor) -> Tensor:
        if self.zero_padding is not None:
            feature_map = functional.pad(feature_map, self.zero_padding)
        return super().forward(feature_map)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (arXiv 1709.01507): scale each channel by a gate computed from the channel means.

    By default SiLU between the two 1x1 convolutions and a sigmoid gate, as in timm's SEModule with act_layer=SiLU.
    """

    def __init__(
        self,
        channels: int,
        squeezed_channels: int,
        activation: Callable[[Tensor], Tensor] = functional.silu,
        gate: Callable[[Tensor], Tensor] = functional.sigmoid,
    ) -> None:
        super().__init__()
        self.activation, self.gate = activation, gate
        self.fc1 = nn.Conv2d(channels, squeezed_channels, 1)
        self.fc2 = nn.Conv2d(squeezed_channels, channels, 1)

    def forward(self, feature_map: Tensor) -> Tensor:
        squeezed = feature_map.mean((2, 3), keepdim=True)
        return feature_map * self.gate(self.fc2(self.activation(self.fc1(squeezed))))
