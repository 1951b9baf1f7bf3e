"""BLIP-2's Q-Former (arXiv 2301.12597): learned queries that read the image through cross-attention.

Our own module with the topology of BERT's encoder; submodule names are those of transformers' Blip2QFormerModel, so
BLIP-2 weights load without renaming. LAVIS (where BLIP-2 comes from), LLaVA-NeXT and TinyLLaVA hold the same network
under BERT's older names; they are renamed on loading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._base import PatchGrid, Projector, ProjectorConfig, refuse_small_grid
from ._errors import ProjectorError
from ._keys import exchange_prefixes, rename_modules
from ._options import option
from ._registry import ProjectorPreset, register_projector
from .layers import build_mlp, concatenate_layers, normal_, reset_module, reset_module_normal

_QUERY_STD = 0.02
_INPUT_NORM_EPS = 1e-5

_RESAMPLER, _READOUT = "vision_resampler.", "mm_projector"  # LLaVA-NeXT's two parts
_LAVIS_MODEL, _LAVIS_NORM = "Qformer.", "ln_vision."
_LAVIS_READOUTS = ("opt_proj", "t5_proj", "llm_proj", "llama_proj")
_BERT_PREFIXES = {"qformer.encoder.": "bert.encoder.", "qformer.layernorm.": "bert.embeddings.LayerNorm."}
_TEXT_PARTS = re.compile(r"bert\.embeddings\.(word|position)_|bert\.encoder\.layer\.\d+\.(intermediate|output)\.|cls\.")
"""What BERT has for text alone: embeddings (and their index buffer), feed-forward networks, the head."""


@dataclass(frozen=True, kw_only=True)
class QFormerConfig(ProjectorConfig):
    """Sizes of BERT-base, as BLIP-2 has them; any grid gives num_queries tokens."""

    num_queries: int = option(32, "learned queries, which is the number of tokens per image", minimum=1)
    hidden_size: int = option(768, "width of the queries", minimum=1)
    num_hidden_layers: int = option(12, "transformer layers", minimum=1, maximum=1000)
    num_attention_heads: int = option(12, "attention heads; must divide hidden_size", minimum=1)
    intermediate_size: int = option(3072, "inner width of the feed-forward network", minimum=1)
    cross_attention_frequency: int = option(2, "every how many layers the image is attended to", minimum=1)
    dropout: float = option(
        0.1, "dropout of queries, attention and residual branches in training", minimum=0, maximum=1
    )
    layer_norm_eps: float = option(1e-12, "epsilon of the layer norms", minimum=0)
    affine_query_norm: bool = option(True, "gain and bias in the LayerNorm on the queries; TinyLLaVA has neither")
    input_norm: bool = option(
        False,
        "LayerNorm (epsilon 1e-5) on the image features, LAVIS's and LLaVA-NeXT's ln_vision; transformers' BLIP-2 has "
        "it in the vision tower, as post_layernorm",
    )
    readout_depth: int = option(1, "Linear layers of the read-out, with GELU between each two", minimum=1, maximum=1000)

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
        self.layernorm = nn.LayerNorm(
            config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=config.affine_query_norm
        )
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
    presets={
        "qformer_llava_next": ProjectorPreset(
            {"input_norm": True},
            "LLaVA-NeXT's Q-Former: a norm on the features, the image in every third layer.",
            # What LLaVA-NeXT calls mm_qformer_depth, 3 by default, is the frequency; its depth is always 12.
            defaults={"cross_attention_frequency": 3, "num_queries": 32},
        ),
        "qformer_tinyllava": ProjectorPreset(
            {"affine_query_norm": False},
            "TinyLLaVA's Q-Former: a norm on the queries without weights, 128 tokens.",
            defaults={"num_queries": 128},
        ),
    },
)
class QFormer(Projector):
    """Queries through a BERT-like post-norm encoder, then `readout_depth` Linear layers, GELU between each two.

    No position embedding: the order of the patches does not matter to it. Unlike transformers, which starts the
    queries at zero (all alike), they are drawn from N(0, 0.02**2), as in LAVIS, LLaVA-NeXT and TinyLLaVA.

    Loads the keys of transformers' BLIP-2, of LAVIS's (`Qformer.bert.*` beside `opt_proj`, `t5_proj` or `llm_proj`), of
    LLaVA-NeXT (`vision_resampler.*` beside `mm_projector.*`) and of TinyLLaVA; what they hold for text is left out.
    Writes LLaVA-NeXT's with `input_norm`, else TinyLLaVA's without `affine_query_norm`, else transformers'.

    Sources: transformers `models/blip_2/modeling_blip_2.py` (Apache-2.0), LAVIS `lavis/models/blip2_models/blip2.py`
    (BSD-3-Clause), LLaVA-NeXT `llava/model/multimodal_resampler/qformer.py` (Apache-2.0), TinyLLaVA Factory
    `tinyllava/model/connector/qformer.py` at 0fd715495c925ea97986d2b4c04790408644d031 (Apache-2.0).
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__(config)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_size))
        input_norm = nn.LayerNorm(config.fused_hidden_size, eps=_INPUT_NORM_EPS)
        self.input_norm = input_norm if config.input_norm else nn.Identity()
        self.qformer = QFormerModel(config)
        readout = build_mlp(config.hidden_size, config.text_hidden_size, config.readout_depth)
        self.language_projection = readout if config.readout_depth > 1 else readout[0]
        self.reset_parameters()

    @property
    def zero_gradient_parameters(self) -> tuple[str, ...]:
        # A softmax does not see what moves all scores alike, and over one query it is 1.
        key_biases, self_attention = ("*.key.bias",), "qformer.encoder.layer.*.attention.attention."
        over_one = (f"{self_attention}query.*", f"{self_attention}key.*") if self.config.num_queries == 1 else ()
        return key_biases + over_one

    def reset_parameters(self) -> None:
        """BERT's N(0, 0.02**2) in the Q-Former and the queries; PyTorch's default in the read-out."""
        reset_module(self.input_norm)
        self.qformer.apply(partial(reset_module_normal, std=_QUERY_STD))
        self.language_projection.apply(reset_module)
        normal_(self.query_tokens, _QUERY_STD)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        image_features = self.input_norm(concatenate_layers(features))
        queries = self.query_tokens.expand(image_features.shape[0], -1, -1)
        return self.language_projection(self.qformer(queries, image_features))

    def convert_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of whole models of any of the originals the Q-Former, its queries and its read-out."""
        if any(key.startswith(_RESAMPLER) for key in state_dict):
            own = _only(state_dict, (_RESAMPLER, f"{_READOUT}."))
            return self._convert_lavis(exchange_prefixes(own, {_RESAMPLER: ""}), (_READOUT,))
        if any(key.startswith(_LAVIS_MODEL) for key in state_dict):
            readouts = tuple(f"{name}." for name in _LAVIS_READOUTS)
            own = _only(state_dict, ("query_tokens", _LAVIS_NORM, _LAVIS_MODEL, *readouts))
            return self._convert_lavis(own, _LAVIS_READOUTS)
        if any(key.startswith("bert.encoder.") for key in state_dict):
            return self._query_norm_weights() | self._convert_bert(state_dict, ("projector",))
        return self._convert_transformers(state_dict)

    def _query_norm_weights(self) -> dict[str, Tensor]:
        """TinyLLaVA's norm on the queries has neither gain nor bias; here it may have both, of no effect."""
        norm = nn.LayerNorm(self.config.hidden_size, elementwise_affine=self.config.affine_query_norm)
        return {f"qformer.layernorm.{name}": tensor for name, tensor in norm.state_dict().items()}

    def _convert_transformers(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """BLIP-2 keeps the norm on the features in the vision tower, as its last module."""
        norm = {"vision_model.post_layernorm": "input_norm"} if self.config.input_norm else {}
        renamed = rename_modules(state_dict, norm)
        other_parts = ("vision_model.", "language_model.")
        return {key: renamed[key] for key in renamed if not key.startswith(other_parts)}

    def _convert_lavis(self, state_dict: Mapping[str, Tensor], readouts: tuple[str, ...]) -> dict[str, Tensor]:
        """From `Qformer.bert.*`, `query_tokens`, `ln_vision` and a read-out."""
        if self.config.input_norm:
            state_dict = exchange_prefixes(state_dict, {_LAVIS_NORM: "input_norm."})
        else:
            # The refusal will name these keys, and so say what to do.
            hint = " (needs the option input_norm=true)"
            state_dict = {key + hint * key.startswith(_LAVIS_NORM): state_dict[key] for key in state_dict}
        return self._convert_bert(exchange_prefixes(state_dict, {_LAVIS_MODEL: ""}), readouts)

    def _convert_bert(self, state_dict: Mapping[str, Tensor], readouts: tuple[str, ...]) -> dict[str, Tensor]:
        """BERT's names and a read-out's name -> ours, without what is there for text."""
        prefixes = {theirs: ours for ours, theirs in _BERT_PREFIXES.items()}
        if self.config.readout_depth == 1:
            # LLaVA-NeXT's mlp1x_gelu is its linear under another name.
            prefixes |= {f"{name}.0.": "language_projection." for name in readouts}
        prefixes |= {f"{name}.": "language_projection." for name in readouts}
        own = {key: state_dict[key] for key in state_dict if not _TEXT_PARTS.match(key)}
        renamed = exchange_prefixes(own, prefixes)
        return {key.replace("attention.self.", "attention.attention."): renamed[key] for key in renamed}

    def to_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """LLaVA-NeXT's keys with `input_norm`, else TinyLLaVA's without `affine_query_norm`, else transformers'."""
        if not self.config.input_norm and self.config.affine_query_norm:
            return dict(state_dict)
        prefixes = _BERT_PREFIXES | {"language_projection.": "projector."}
        if self.config.input_norm:
            bert = {ours: f"{_RESAMPLER}{_LAVIS_MODEL}{theirs}" for ours, theirs in _BERT_PREFIXES.items()}
            prefixes = bert | {"language_projection.": f"{_READOUT}.", "input_norm.": f"{_RESAMPLER}{_LAVIS_NORM}"}
            prefixes |= {"query_tokens": f"{_RESAMPLER}query_tokens"}
        renamed = exchange_prefixes(state_dict, prefixes)
        return {key.replace("attention.attention.", "attention.self."): renamed[key] for key in renamed}


def _only(state_dict: Mapping[str, Tensor], beginnings: tuple[str, ...]) -> dict[str, Tensor]:
    return {key: state_dict[key] for key in state_dict if key.startswith(beginnings)}
