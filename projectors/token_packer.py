"""TokenPacker (arXiv 2407.02392): each window of patches is packed into one token that has looked at all of them.

A pooled patch of one layer is the query; the patches of its own window, from several layers, are keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._base import PatchGrid, Projector, same_relative_depths
from ._errors import ProjectorError
from ._options import option
from ._registry import register_projector
from ._windows import WindowedProjectorConfig
from .layers import build_mlp, pad_to_windows, reset_module_trunc_normal, uniform_, zeros_

_NORM_EPS = 1e-6
_KEY_LAYERS, _REFERENCE_DEPTH = (12, 16, 22, 23), 24


@dataclass(frozen=True, kw_only=True)
class TokenPackerConfig(WindowedProjectorConfig):
    """`factor` is the original's scale factor. Any vision width and any grid that the windows tile is taken.

    With factor 1 a window is one patch, and the query decides nothing unless `residual` adds it.
    """

    vision_layers: tuple[int, ...] = option(
        (-2, *_KEY_LAYERS),
        "hidden states of the vision tower to read: the first gives the queries, the others are concatenated for keys "
        "and values",
    )
    hidden_size: int = option(1024, "width of queries, keys and values", minimum=1)
    num_heads: int = option(8, "attention heads; must divide hidden_size", minimum=1)
    query_pooling: Literal["area", "bilinear"] = option(
        "area",
        "what a window's query is made of: the mean of all its patches, or, as in the original, of the middle ones "
        "alone (1 of 9 at factor 3, 4 of 16 at factor 4; the same at factor 2)",
    )
    residual: bool = option(False, "add the normalised query to what it has read; the original does not")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_heads:
            raise ProjectorError(
                f"TokenPackerConfig: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if len(self.vision_layers) < 2:
            raise ProjectorError(
                f"TokenPackerConfig.vision_layers: got {len(self.vision_layers)} layer {self.vision_layers}, expected "
                "at least 2: the query's, then those of keys and values; the same layer may be named twice"
            )

    @classmethod
    def default_vision_layers(
        cls, num_vision_layers: int | None = None, options: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[int, ...]:
        """The layer before the last for the query, then 12, 16, 22, 23 of 24, or the same relative depths."""
        query_layer = (num_vision_layers or _REFERENCE_DEPTH) - 1
        return (query_layer, *same_relative_depths(_KEY_LAYERS, _REFERENCE_DEPTH, num_vision_layers))

    @classmethod
    def tiny_options(cls) -> dict[str, Any]:
        return {"hidden_size": 24, "num_heads": 4}


class WindowAttention(nn.Module):
    """Multi-head attention of one query over the patches of its window, with torch.nn.MultiheadAttention's weights."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def reset_parameters(self) -> None:
        """That of torch.nn.MultiheadAttention for what goes in: xavier_uniform over the three matrices at once."""
        # From the size and not from the tensor, whose shape ZeRO-3 takes away: 3 hidden_size rows, hidden_size columns.
        uniform_(self.in_proj_weight, math.sqrt(6 / (4 * self.hidden_size)))
        zeros_(self.in_proj_bias)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(B, windows, hidden_size), twice (B, windows, patches, hidden_size) -> (B, windows, hidden_size)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        projected = map(functional.linear, (queries.unsqueeze(2), keys, values), weights, biases)
        # (B, windows, patches or 1, heads, head size)
        queries, keys, values = (tokens.unflatten(3, (self.num_heads, -1)) for tokens in projected)
        # One query and a few keys: products and sums take them as they lie, while attention kernels want a batch entry
        # per window, of which CUDA allows 65535. Like those kernels they count in float32 or better.
        dtype = torch.promote_types(keys.dtype, torch.float32)
        scores = (queries.to(dtype) * keys).sum(4, keepdim=True) / math.sqrt(keys.shape[4])
        attended = (scores.softmax(2) * values).sum(2)
        return self.out_proj(attended.flatten(2).to(keys.dtype))


@register_projector(
    "token_packer",
    config=TokenPackerConfig,
    summary="TokenPacker: a pooled patch attends to its own window in several layers; a quarter of the tokens.",
    paper="https://arxiv.org/abs/2407.02392",
    token_formula="ceil(H / factor) * ceil(W / factor)",
)
class TokenPacker(Projector):
    """One token per window, from the first layer's pooled patches q and the other layers' concatenated channels x::

        q = LN(Linear(q));  k, v = LN(Linear(GELU(Linear(x)))), each its own
        Linear(GELU(Linear(attention of q over the k and v of its window)))

    There is no position embedding and, by default, no residual from the query, as in the original. Its bilinear
    pooling without anti-aliasing leaves most patches of a large window out of the query: `query_pooling=bilinear`.

    Architecture after the paper and TokenPacker's `llava/model/multimodal_projector/builder.py` (published without a
    licence: written from its documented behaviour); parameter names are the original's, so its checkpoints load.
    """

    def __init__(self, config: TokenPackerConfig) -> None:
        super().__init__(config)
        hidden_size = config.hidden_size
        key_width = config.vision_hidden_size * (len(config.vision_layers) - 1)
        self.q_proj_1 = nn.Linear(config.vision_hidden_size, hidden_size, bias=False)
        self.k_proj_1 = build_mlp(key_width, hidden_size, depth=2)
        self.v_proj_1 = build_mlp(key_width, hidden_size, depth=2)
        self.ln_q_1 = nn.LayerNorm(hidden_size, eps=_NORM_EPS)
        self.ln_k_1 = nn.LayerNorm(hidden_size, eps=_NORM_EPS)
        self.ln_v_1 = nn.LayerNorm(hidden_size, eps=_NORM_EPS)
        self.clip_attn = WindowAttention(hidden_size, config.num_heads)
        self.mlp = build_mlp(hidden_size, config.text_hidden_size, depth=2)
        self.reset_parameters()

    @property
    def zero_gradient_parameters(self) -> tuple[str, ...]:
        # A softmax does not see what moves all scores alike, and over the one patch of a window it is 1.
        key_bias = ("ln_k_1.bias",)
        return ("q_proj_1.*", "ln_q_1.*", "k_proj_1.*", "ln_k_1.*") if self.config.factor == 1 else key_bias

    def reset_parameters(self) -> None:
        """The original's: Linear layers truncated normal, std 0.02, with zero biases; attention as in PyTorch."""
        self.apply(reset_module_trunc_normal)
        self.clip_attn.reset_parameters()

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        query_windows, *key_windows = (self._windows(tokens, grid) for tokens in features)
        queries = self.ln_q_1(self.q_proj_1(self._pool(query_windows)))
        # (B, windows, patches, channels): the concatenation is the one copy, and it brings windows together.
        patches = torch.cat(key_windows, dim=5).flatten(3, 4).flatten(1, 2)
        keys, values = self.ln_k_1(self.k_proj_1(patches)), self.ln_v_1(self.v_proj_1(patches))
        packed = self.clip_attn(queries, keys, values)
        return self.mlp(packed + queries if self.config.residual else packed)

    def _windows(self, tokens: Tensor, grid: PatchGrid) -> Tensor:
        """(B, N, C) -> a view as (B, window rows, window columns, factor, factor, C)."""
        factor = self.config.factor
        rows, columns = (side // factor for side in self.config.padded_grid(grid))
        padded = pad_to_windows(tokens, grid, factor)
        return padded.unflatten(1, (rows, factor, columns, factor)).transpose(2, 3)

    def _pool(self, windows: Tensor) -> Tensor:
        """One vector per window, (B, windows, C)."""
        factor, first = self.config.factor, 0
        if self.config.query_pooling == "bilinear":
            # Interpolation at the middle of a window is the middle patch, or the mean of the four around it.
            first = (factor - 1) // 2
        middle = windows[:, :, :, first : factor - first, first : factor - first]
        return middle.mean((3, 4)).flatten(1, 2)
