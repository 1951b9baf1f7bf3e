"""BLIP-2's Q-Former (arXiv 2301.12597): learned queries that read the image through cross-attention.

Our own module with the topology of BERT's encoder; submodule names are those of transformers' Blip2QFormerModel, so
BLIP-2 weights load without renaming. TinyLLaVA's connector, which is the same network, is renamed on loading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._base import PatchGrid, Projector, ProjectorConfig, refuse_small_grid
from ._errors import ProjectorError
from ._options import option
from ._registry import register_projector
from .layers import normal_, reset_module, reset_module_normal

_QUERY_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class QFormerConfig(ProjectorConfig):
    """Sizes of BERT-base, as BLIP-2 has them; any grid gives num_queries tokens."""

    num_queries: int = option(32, "learned queries, which is the number of tokens per image", minimum=1)
    hidden_size: int = option(768, "width of the queries", minimum=1)
    num_hidden_layers: int = option(12, "transformer layers", minimum=1)
    num_attention_heads: int = option(12, "attention heads; must divide hidden_size", minimum=1)
    intermediate_size: int = option(3072, "inner width of the feed-forward network", minimum=1)
    cross_attention_frequency: int = option(2, "every how many layers the image is attended to", minimum=1)
    dropout: float = option(
        0.1, "dropout of queries, attention and residual branches in training", minimum=0, maximum=1
    )
    layer_norm_eps: float = option(1e-12, "epsilon of the layer norms", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise ProjectorError(
                f"QFormerConfig: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )

    @property
    def reads_patch_map(self) -> bool:
        return False

    def num_output_tokens(self, grid: PatchGrid) -> int:
        refuse_small_grid(grid)
        return self.num_queries

    @classmethod
    def tiny_options(cls) -> dict[str, Any]:
        return {
            "num_queries": 5,
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 32,
        }


class Attention(nn.Module):
    """Multi-head attention of queries over themselves or over image features of another width."""

    def __init__(self, config: QFormerConfig, key_size: int) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_attention_heads, config.dropout
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(key_size, config.hidden_size)
        self.value = nn.Linear(key_size, config.hidden_size)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """(B, Q, hidden_size), (B, N, key_size) -> (B, Q, hidden_size)."""
        heads = (self._split(self.query(queries)), self._split(self.key(context)), self._split(self.value(context)))
        dropout = self.dropout if self.training else 0.0
        return functional.scaled_dot_product_attention(*heads, dropout_p=dropout).transpose(1, 2).flatten(2)

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class ResidualOutput(nn.Module):
    """BERT's post-norm ending of a branch: Linear, dropout, add the residual, LayerNorm."""

    def __init__(self, config: QFormerConfig, in_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, branch: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(branch)) + residual)


class AttentionBlock(nn.Module):
    """Attention with its post-norm residual."""

    def __init__(self, config: QFormerConfig, key_size: int) -> None:
        super().__init__()
        self.attention = Attention(config, key_size)
        self.output = ResidualOutput(config, config.hidden_size)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        return self.output(self.attention(queries, context), queries)


class Intermediate(nn.Module):
    """First half of the feed-forward network: Linear and exact GELU."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, queries: Tensor) -> Tensor:
        return functional.gelu(self.dense(queries))


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention to the image in every cross_attention_frequency-th layer, feed-forward."""

    def __init__(self, config: QFormerConfig, index: int) -> None:
        super().__init__()
        self.attention = AttentionBlock(config, config.hidden_size)
        reads_image = index % config.cross_attention_frequency == 0
        self.crossattention = AttentionBlock(config, config.fused_hidden_size) if reads_image else None
        self.intermediate_query = Intermediate(config)
        self.output_query = ResidualOutput(config, config.intermediate_size)

    def forward(self, queries: Tensor, image_features: Tensor) -> Tensor:
        queries = self.attention(queries, queries)
        if self.crossattention is not None:
            queries = self.crossattention(queries, image_features)
        return self.output_query(self.intermediate_query(queries), queries)


class QFormerEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(QFormerLayer(config, index) for index in range(config.num_hidden_layers))

    def forward(self, queries: Tensor, image_features: Tensor) -> Tensor:
        for layer in self.layer:
            queries = layer(queries, image_features)
        return queries


class QFormerModel(nn.Module):
    """LayerNorm and dropout on the queries, then the encoder."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = QFormerEncoder(config)

    def forward(self, queries: Tensor, image_features: Tensor) -> Tensor:
        return self.encoder(self.dropout(self.layernorm(queries)), image_features)


@register_projector(
    "qformer",
    config=QFormerConfig,
    summary="BLIP-2's Q-Former: learned queries with cross-attention to the image; a fixed number of tokens.",
    paper="https://arxiv.org/abs/2301.12597",
    token_formula="num_queries",
)
class QFormer(Projector):
    """Queries through a BERT-like post-norm encoder, then a Linear layer to the language model's width.

    No position embedding: the order of the patches does not matter to it. Unlike transformers, which starts the
    queries at zero (all alike), they are drawn from N(0, 0.02**2).

    Sources: transformers `models/blip_2/modeling_blip_2.py` (Apache-2.0), TinyLLaVA Factory
    `tinyllava/model/connector/qformer.py` at 0fd715495c925ea97986d2b4c04790408644d031 (Apache-2.0).
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__(config)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_size))
        self.qformer = QFormerModel(config)
        self.language_projection = nn.Linear(config.hidden_size, config.text_hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """BERT's N(0, 0.02**2) in the Q-Former and the queries; PyTorch's default in the output layer."""
        self.qformer.apply(partial(reset_module_normal, std=_QUERY_STD))
        reset_module(self.language_projection)
        normal_(self.query_tokens, _QUERY_STD)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        image_features = torch.cat(tuple(features), dim=2)
        queries = self.query_tokens.expand(image_features.shape[0], -1, -1)
        return self.language_projection(self.qformer(queries, image_features))

    def convert_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From a whole BLIP-2 model (tower and language model dropped) or TinyLLaVA's connector."""
        if any(key.startswith("bert.encoder.") for key in state_dict):
            return self._convert_tinyllava(state_dict)
        other_parts = ("vision_model.", "language_model.")
        return {key: tensor for key, tensor in state_dict.items() if not key.startswith(other_parts)}

    def _convert_tinyllava(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converted = {}
        for key, tensor in state_dict.items():
            # BERT's index buffer; it has no counterpart because text is not embedded here.
            if key == "bert.embeddings.position_ids":
                continue
            key = key.replace("bert.encoder.", "qformer.encoder.").replace("attention.self.", "attention.attention.")
            converted[key.replace("projector.", "language_projection.")] = tensor
        # TinyLLaVA's LayerNorm on the queries has neither gain nor bias.
        norm = self.qformer.layernorm
        converted["qformer.layernorm.weight"] = torch.ones(norm.normalized_shape)
        converted["qformer.layernorm.bias"] = torch.zeros(norm.normalized_shape)
        return converted
