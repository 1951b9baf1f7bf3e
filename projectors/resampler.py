"""Honeybee's resampler (arXiv 2312.06742), the baseline of its abstractors: queries that read the image and each other.

Not Flamingo's (`perceiver`): here a layer is pre-norm attention with biases, a gated feed-forward network with a norm
inside, and the residual starts from the query after its norm.
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
    concatenate_layers,
    learned_tokens,
    normal_,
    reset_module_normal,
    resize_positions,
    trunc_normal_,
    zeros_,
)

_NORM_EPS, _INNER_NORM_EPS = 1e-5, 1e-6
_QUERY_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig(ProjectorConfig):
    """Any grid gives num_queries (+ num_eos_tokens) tokens. Honeybee's configuration has 64 queries."""

    num_queries: int = option(144, "learned queries, which is the number of tokens per image", minimum=1)
    hidden_size: int = option(1024, "width of the queries", minimum=1)
    depth: int = option(6, "layers", minimum=1, maximum=1000)
    num_heads: int = option(16, "attention heads; must divide hidden_size", minimum=1)
    intermediate_size: int = option(4096, "inner width of the gated feed-forward network", minimum=1)
    dropout: float = option(0.1, "dropout of the attention weights in training", minimum=0, maximum=1)
    use_position_embedding: bool = option(False, "add a learned position embedding to the features")
    position_grid: tuple[int, int] = option(
        (24, 24), "height and width of the grid of learned positions; others are interpolated", minimum=1
    )
    num_eos_tokens: int = option(0, "learned tokens appended after the image", minimum=0)
    attention: Literal["fused", "explicit"] = option(
        "fused",
        "PyTorch's fused attention, or products and softmax one after another as in Honeybee, to the same bits; the "
        "outputs are large, and in six layers the rounding of the fused one grows to some 1e-4",
    )
    query_init: Literal["normal", "zeros"] = option(
        "normal", "how queries start: normal of std 0.02, or Honeybee's zeros, with which all are alike"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_heads:
            raise ProjectorError(
                f"ResamplerConfig: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if self.use_position_embedding:
            self.refuse_cls_token()

    @property
    def reads_patch_map(self) -> bool:
        return self.use_position_embedding

    def num_output_tokens(self, grid: PatchGrid) -> int:
        refuse_small_grid(grid)
        return self.num_queries + self.num_eos_tokens

    @classmethod
    def tiny_options(cls) -> dict[str, Any]:
        sizes = {"num_queries": 5, "hidden_size": 24, "depth": 2, "num_heads": 4, "intermediate_size": 32}
        return sizes | {"position_grid": [4, 4]}


class Attention(nn.Module):
    """Multi-head attention without an output layer, with biases."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.is_explicit = config.attention == "explicit"
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """(B, Q, hidden_size), (B, N, hidden_size) -> (B, Q, hidden_size)."""
        heads = (self._split(self.query(queries)), self._split(self.key(context)), self._split(self.value(context)))
        dropout = self.dropout if self.training else 0.0
        attend = explicit_attention if self.is_explicit else functional.scaled_dot_product_attention
        return attend(*heads, dropout_p=dropout).transpose(1, 2).flatten(2)

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def explicit_attention(queries: Tensor, keys: Tensor, values: Tensor, dropout_p: float = 0.0) -> Tensor:
    """What scaled_dot_product_attention computes, in Honeybee's order of operations and with all weights in memory.

    (B, heads, Q, size), twice (B, heads, N, size) -> (B, heads, Q, size)
    """
    scores = queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[3])
    return functional.dropout(scores.softmax(3), dropout_p) @ values


class GatedMLP(nn.Module):
    """w2(LayerNorm(SiLU(w1 x) * w3 x))."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_ln = nn.LayerNorm(config.intermediate_size, eps=_INNER_NORM_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.w2(self.ffn_ln(functional.silu(self.w1(tokens)) * self.w3(tokens)))


class CrossOutput(nn.Module):
    """Adds the attention's output layer to the residual, then the feed-forward network's."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=_NORM_EPS)
        self.mlp = GatedMLP(config)

    def forward(self, attended: Tensor, residual: Tensor) -> Tensor:
        residual = residual + self.out_proj(attended)
        return residual + self.mlp(self.norm2(residual))


class CrossAttention(nn.Module):
    """Attention of the normalised queries over themselves and the normalised features."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.output = CrossOutput(config)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=_NORM_EPS)
        self.normk = nn.LayerNorm(config.hidden_size, eps=_NORM_EPS)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        queries = self.norm1(queries)
        context = torch.cat([queries, self.normk(features)], dim=1)
        # The residual is the normalised query, as published, so that the output does not depend on the query's scale.
        return self.output(self.attention(queries, context), queries)


class ResamplerLayer(nn.Module):
    """One layer, under Honeybee's name for what it holds."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.crossattention = CrossAttention(config)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        return self.crossattention(queries, features)


class ResamplerEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.depth))

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        for layer in self.layers:
            queries = layer(queries, features)
        return queries


@register_projector(
    "resampler",
    config=ResamplerConfig,
    summary="Honeybee's resampler: learned queries read the image and each other; a fixed number of tokens.",
    paper="https://arxiv.org/abs/2312.06742",
    token_formula="num_queries + num_eos_tokens",
)
class Resampler(Projector):
    """Linear to hidden_size, `depth` layers, Linear to the language model's width; submodule names are Honeybee's.

    A layer, with q the queries and x the features::

        q = LN(q);  q = q + out(attention(q; keys and values of q and LN(x)));  q = q + w2(LN(SiLU(w1 h) * w3 h))

    where h = LN(q). The residual starts from the normalised query, which is the architecture as published. Unlike the
    original it takes other grids than its own where it has positions, starts with different queries (`query_init`),
    and leaves the caller's features unchanged.

    Source: Honeybee `honeybee/projectors/resamplers.py` at 0621f14c0faafc47f48d44745504df150c523f69 (Apache-2.0).
    """

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__(config)
        num_positions = PatchGrid(*config.position_grid).num_patches if config.use_position_embedding else 0
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_size))
        self.vit_eos = learned_tokens(config.num_eos_tokens, config.text_hidden_size)
        self.pos_emb = learned_tokens(num_positions, config.fused_hidden_size)
        self.visual_input_fc = nn.Linear(config.fused_hidden_size, config.hidden_size)
        self.encoder = ResamplerEncoder(config)
        self.visual_output_fc = nn.Linear(config.hidden_size, config.text_hidden_size)
        self.reset_parameters()

    @property
    def zero_gradient_parameters(self) -> tuple[str, ...]:
        return ("*.key.bias",)  # it moves all scores alike, which a softmax does not see

    def reset_parameters(self) -> None:
        """Linear layers as in a run of Honeybee: N(0, 0.02**2) and zero biases; queries as `query_init` says.

        Learned positions and appended tokens are truncated normal, std 0.02.
        """
        self.apply(reset_module_normal)
        trunc_normal_(self.pos_emb)
        trunc_normal_(self.vit_eos)
        if self.config.query_init == "zeros":
            zeros_(self.query_tokens)
        else:
            normal_(self.query_tokens, _QUERY_STD)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        tokens = concatenate_layers(features)
        if self.pos_emb is not None:
            positions = resize_positions(self.pos_emb, PatchGrid(*self.config.position_grid), grid)
            tokens = tokens + positions.to(tokens.dtype)
        queries = self.query_tokens.expand(tokens.shape[0], -1, -1)
        output = self.visual_output_fc(self.encoder(queries, self.visual_input_fc(tokens)))
        if self.vit_eos is None:
            return output
        return torch.cat([output, self.vit_eos.expand(output.shape[0], -1, -1).to(output.dtype)], dim=1)

    def convert_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Old Honeybee checkpoints hold one more position, for the class token, in front: it is dropped."""
        return without_class_position(state_dict, "pos_emb", self.pos_emb)
