"""Honeybee's D-Abstractor (arXiv 2312.06742): queries on a grid that read the map by deformable attention.

Submodule names are Honeybee's (and Deformable DETR's), so its checkpoints load without renaming.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._base import PatchGrid, Projector, ProjectorConfig, refuse_small_grid
from ._errors import ProjectorError
from ._options import option
from ._registry import register_projector
from .layers import (
    DeformableAttention,
    concatenate_layers,
    copy_,
    learned_tokens,
    map_to_tokens,
    normal_,
    reset_module_normal,
    resize_positions,
    tokens_to_map,
    trunc_normal_,
)

_QUERY_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class DAbstractorConfig(ProjectorConfig):
    """A grid gives num_queries (+ num_eos_tokens) tokens; learned positions are interpolated to it.

    Where queries are pooled from the map it needs as many patches as num_queries says.

    Honeybee reads the last hidden state (`vision_layers=[-1]`); the default here is the package's.
    """

    num_queries: int = option(144, "tokens per image, a square number", minimum=1)
    hidden_size: int = option(1024, "width of the queries and of the map that they read", minimum=1)
    depth: int = option(6, "decoder layers", minimum=1, maximum=1000)
    num_heads: int = option(8, "attention heads; must divide hidden_size", minimum=1)
    num_points: int = option(4, "places that each head of each query reads", minimum=1)
    intermediate_size: int = option(1024, "inner width of the feed-forward network", minimum=1)
    dropout: float = option(0.1, "dropout of the residual branches in training", minimum=0, maximum=1)
    pooled_queries: Literal["query", "tgt", "none"] = option(
        "query",
        "which half of a query is the average-pooled map: query the position embedding, tgt the content (the other "
        "half is learned), none neither",
    )
    use_position_embedding: bool = option(True, "add a learned position embedding to the map")
    position_grid: tuple[int, int] = option(
        (24, 24),
        "height and width of the grid of learned positions (others are interpolated), on whose outermost patches the "
        "reference points of the outermost queries start",
        minimum=1,
    )
    num_eos_tokens: int = option(0, "learned tokens appended after the image", minimum=0)
    init: Literal["normal", "ring"] = option(
        "normal",
        "normal: everything from N(0, 0.02**2) with zero biases, as Honeybee trained; ring: the same, but the places "
        "start around the reference point as in Deformable DETR",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_cls_token()
        if math.isqrt(self.num_queries) ** 2 != self.num_queries:
            raise ProjectorError(f"DAbstractorConfig.num_queries: got {self.num_queries}, expected a square number")
        if self.hidden_size % self.num_heads:
            raise ProjectorError(
                f"DAbstractorConfig: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )

    @property
    def query_grid(self) -> PatchGrid:
        """The grid on which the queries start."""
        side = math.isqrt(self.num_queries)
        return PatchGrid(side, side)

    def check_grid(self, grid: PatchGrid) -> None:
        """Refuse an empty grid, or one that is too small to pool the queries from."""
        refuse_small_grid(grid, 1 if self.pooled_queries == "none" else self.num_queries)

    def num_output_tokens(self, grid: PatchGrid) -> int:
        self.check_grid(grid)
        return self.num_queries + self.num_eos_tokens

    def token_grid(self, grid: PatchGrid) -> PatchGrid | None:
        self.check_grid(grid)
        is_map = self.pooled_queries != "none" and not self.num_eos_tokens
        return self.query_grid if is_map else None

    @classmethod
    def tiny_options(cls) -> dict[str, Any]:
        sizes = {"num_queries": 4, "hidden_size": 24, "depth": 2, "num_heads": 4, "intermediate_size": 20}
        return sizes | {"position_grid": [4, 4]}


class SelfAttention(nn.Module):
    """Attention of the queries over each other; positions go into queries and keys, not into values."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        """(B, Q, hidden_size) twice -> (B, Q, hidden_size)."""
        placed = hidden_states + positions
        projected = (self.q_proj(placed), self.k_proj(placed), self.v_proj(hidden_states))
        heads = (tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for tokens in projected)
        return self.out_proj(functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Deformable DETR's post-norm layer: self-attention, deformable attention to the map, feed-forward with ReLU."""

    def __init__(self, config: DAbstractorConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = SelfAttention(width, config.num_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn = DeformableAttention(width, config.num_heads, config.num_points)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: Tensor, positions: Tensor, features: Tensor, grid: PatchGrid, reference_points: Tensor
    ) -> Tensor:
        """(B, Q, hidden_size) queries and positions, (B, N, hidden_size) map, (1, Q, 2) points -> new queries."""
        attended = self.self_attn(hidden_states, positions)
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attended))
        attended = self.encoder_attn(hidden_states + positions, features, grid, reference_points)
        hidden_states = self.encoder_attn_layer_norm(hidden_states + self.dropout(attended))
        transformed = self.fc2(functional.relu(self.fc1(hidden_states)))
        return self.final_layer_norm(hidden_states + self.dropout(transformed))


@register_projector(
    "d_abstractor",
    config=DAbstractorConfig,
    summary="Honeybee's D-Abstractor: queries on a grid with deformable attention; a fixed number of tokens.",
    paper="https://arxiv.org/abs/2312.06742",
    aliases=("d-abs",),
    token_formula="num_queries + num_eos_tokens",
)
class DAbstractor(Projector):
    """Linear to hidden_size where the widths differ, positions, decoder layers, Linear where the widths differ.

    The reference points are parameters, the same for every image and in every layer. Unlike the original it takes
    other grids than its own (positions are interpolated) and runs in bfloat16, with places and samples in float32.

    Source: Honeybee `honeybee/projectors/dabs.py` at 0621f14c0faafc47f48d44745504df150c523f69 (Apache-2.0), which
    builds on transformers `models/deformable_detr/modeling_deformable_detr.py` (Apache-2.0).
    """

    def __init__(self, config: DAbstractorConfig) -> None:
        super().__init__(config)
        channels, width = config.fused_hidden_size, config.hidden_size
        num_positions = PatchGrid(*config.position_grid).num_patches if config.use_position_embedding else 0
        # A list, because the original has one projection per scale; without one the features pass.
        self.input_proj = nn.Sequential(*([nn.Linear(channels, width)] if channels != width else []))
        self.v_pos_emb = learned_tokens(num_positions, width)
        self.reference_points = nn.Parameter(torch.empty(1, config.num_queries, 2))
        query_width = 2 * width if config.pooled_queries == "none" else width
        self.query_position_embeddings = nn.Embedding(config.num_queries, query_width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.depth))
        self.eos_tokens = learned_tokens(config.num_eos_tokens, width)
        is_widening = width != config.text_hidden_size
        self.output_proj = nn.Linear(width, config.text_hidden_size) if is_widening else nn.Identity()
        self.reset_parameters()

    @property
    def zero_gradient_parameters(self) -> tuple[str, ...]:
        # A softmax does not see what moves all scores alike, and over one entry it is 1.
        key_bias = ("layers.*.self_attn.k_proj.bias",)
        one_point = ("layers.*.encoder_attn.attention_weights.*",) if self.config.num_points == 1 else ()
        attends_to_itself = ("layers.*.self_attn.q_proj.*", "layers.*.self_attn.k_proj.*")
        return key_bias + one_point + (attends_to_itself if self.config.num_queries == 1 else ())

    def reset_parameters(self) -> None:
        """N(0, 0.02**2) and zero biases, truncated for positions and extra tokens; offsets as `init` says."""
        self.apply(reset_module_normal)
        normal_(self.query_position_embeddings.weight, _QUERY_STD)
        trunc_normal_(self.v_pos_emb)
        trunc_normal_(self.eos_tokens)
        copy_(self.reference_points, spread_points(self.config.query_grid, PatchGrid(*self.config.position_grid)))
        if self.config.init == "ring":
            for layer in self.layers:
                layer.encoder_attn.reset_offsets_to_rings()

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        self.config.check_grid(grid)
        tokens = self.input_proj(concatenate_layers(features))
        if self.v_pos_emb is not None:
            positions = resize_positions(self.v_pos_emb, PatchGrid(*self.config.position_grid), grid)
            tokens = tokens + positions.to(tokens.dtype)
        hidden_states, query_positions = self._queries(tokens, grid)
        for layer in self.layers:
            hidden_states = layer(hidden_states, query_positions, tokens, grid, self.reference_points)
        if self.eos_tokens is not None:
            eos_tokens = self.eos_tokens.expand(tokens.shape[0], -1, -1).to(hidden_states.dtype)
            hidden_states = torch.cat([hidden_states, eos_tokens], dim=1)
        return self.output_proj(hidden_states)

    def _queries(self, tokens: Tensor, grid: PatchGrid) -> tuple[Tensor, Tensor]:
        """Content and position embedding of the queries, each (B, Q, hidden_size)."""
        # Through the embedding's forward, and not its weight, so that ZeRO-3 knows to gather that.
        learned = self.query_position_embeddings(torch.arange(self.config.num_queries, device=tokens.device))
        learned = learned.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        if self.config.pooled_queries == "none":
            query_positions, contents = learned.chunk(2, dim=2)
            return contents, query_positions
        pooled = map_to_tokens(functional.adaptive_avg_pool2d(tokens_to_map(tokens, grid), self.config.query_grid))
        return (learned, pooled) if self.config.pooled_queries == "query" else (pooled, learned)


def spread_points(query_grid: PatchGrid, grid: PatchGrid) -> Tensor:
    """(1, queries, 2) points as x, y from 0 to 1, row-major, evenly from centre to centre of the outermost patches.

    Not the centres of the cells that the queries pool: Honeybee's start.
    """
    rows, columns = (
        torch.linspace(0.5, side - 0.5, num_queries) / side for side, num_queries in zip(grid, query_grid, strict=True)
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)[None]
