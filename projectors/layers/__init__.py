"""Blocks that two or more projectors share."""

from .deformable import DeformableAttention
from .initialization import (
    constant_,
    normal_,
    ones_,
    reset_module,
    reset_module_normal,
    reset_module_trunc_normal,
    trunc_normal_,
    uniform_,
    zeros_,
)
from .maps import (
    DepthwiseConv2d,
    LayerNorm2d,
    PointwiseConv2d,
    SqueezeExcite,
    map_to_tokens,
    pad_to_multiple,
    tokens_to_map,
)
from .mlp import build_mlp
from .positions import LearnedPositions, SincosPositions, resize_positions, sincos_positions
from .windows import fold_windows, pad_to_windows, split_windows

__all__ = [
    "DeformableAttention",
    "DepthwiseConv2d",
    "LayerNorm2d",
    "LearnedPositions",
    "PointwiseConv2d",
    "SincosPositions",
    "SqueezeExcite",
    "build_mlp",
    "constant_",
    "fold_windows",
    "map_to_tokens",
    "normal_",
    "ones_",
    "pad_to_multiple",
    "pad_to_windows",
    "reset_module",
    "reset_module_normal",
    "reset_module_trunc_normal",
    "resize_positions",
    "sincos_positions",
    "split_windows",
    "tokens_to_map",
    "trunc_normal_",
    "uniform_",
    "zeros_",
]
