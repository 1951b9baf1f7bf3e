"""Blocks that two or more projectors share."""

from .deformable import DeformableAttention
from .initialization import (
    constant_,
    copy_,
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
    concatenate_layers,
    map_to_tokens,
    pad_to_multiple,
    tokens_to_map,
)
from .mlp import build_mlp
from .positions import LearnedPositions, SincosPositions, learned_tokens, resize_positions, sincos_positions
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
    "concatenate_layers",
    "constant_",
    "copy_",
    "fold_windows",
    "learned_tokens",
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
