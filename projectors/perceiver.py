"""Flamingo's perceiver resampler (arXiv 2204.14198): learned latents that read the image and each other.

Two versions are in use and differ in where the width changes: LLaVA-NeXT's blocks have the vision tower's width and a
read-out follows, TinyLLaVA's blocks have the language model's and a Linear layer comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._base import PatchGrid, Projector, ProjectorConfig, refuse_small_grid
from ._errors import ProjectorError
from ._keys import exchange_prefixes, rename_modules
from ._options import option
from ._registry import ProjectorPreset, register_projector
from .layers import build_mlp, concatenate_layers, normal_, reset_module

_LATENT_STD = 1.0
_RESAMPLER, _READOUT = "vision_resampler.perceiver.", "mm_projector"


@dataclass(frozen=True, kw_only=True)
class PerceiverConfig(ProjectorConfig):
    """Any grid gives num_queries tokens. `num_heads * head_size` is independent of the width of the blocks."""

    num_queries: int = option(64, "learned latents, which is the number of tokens per image", minimum=1)
    depth: int = option(6, "layers of attention and feed-forward network", minimum=1, maximum=1000)
    num_heads: int = option(8, "attention heads", minimum=1)
    head_size: int = option(64, "channels of one attention head, whatever the width", minimum=1)
    feedforward_multiplier: int = option(
        4, "inner width of the feed-forward network over its outer", minimum=1, maximum=1000
    )
    projection: Literal["output", "input"] = option(
        "output",
        "where the width changes to the language model's: in a read-out after the blocks (LLaVA-NeXT), or in a Linear "
        "layer before them (TinyLLaVA)",
    )
    readout_depth: int = option(
        1, "Linear layers of the read-out of projection=output, with GELU between each two", minimum=1, maximum=1000
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection == "input" and self.readout_depth != 1:
            raise ProjectorError(
                f"PerceiverConfig: projection 'input' has no read-out, so readout_depth {self.readout_depth} means "
                "nothing; leave it at 1, or choose projection 'output'"
            )

    @property
    def reads_patch_map(self) -> bool:
        return False

    @property
    def block_width(self) -> int:
        """Channels of latents and image features inside the blocks."""
        return self.fused_hidden_size if self.projection == "output" else self.text_hidden_size

    def num_output_tokens(self, grid: PatchGrid) -> int:
        refuse_small_grid(grid)
        return self.num_queries

    @classmethod
    def tiny_options(cls) -> dict[str, Any]:
        return {"num_queries": 5, "depth": 2, "num_heads": 2, "head_size": 4}


class PerceiverAttention(nn.Module):
    """Attention of the normalised latents over the normalised image features and themselves; no bias anywhere."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        width, inner_width = config.block_width, config.num_heads * config.head_size
        self.num_heads = config.num_heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner_width, bias=False)
        self.to_out = nn.Linear(inner_width, width, bias=False)

    def forward(self, latents: Tensor, media: Tensor) -> Tensor:
        """(B, Q, width), (B, N, width) -> (B, Q, width), to be added to the latents."""
        latents, media = self.norm_latents(latents), self.norm_media(media)
        # Keys and values are put together behind the projection, where they are narrower than the features.
        keys_and_values = torch.cat([self.to_kv(media), self.to_kv(latents)], dim=1)
        # (2, B, heads, N + Q, head_size)
        keys, values = keys_and_values.unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        queries = self.to_q(latents).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(queries, keys, values)
        return self.to_out(attended.transpose(1, 2).flatten(2))


def build_feed_forward(width: int, multiplier: int) -> nn.Sequential:
    """LayerNorm, Linear, exact GELU, Linear; no bias in the Linear layers."""
    inner_width = multiplier * width
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, inner_width, bias=False),
        nn.GELU(),
        nn.Linear(inner_width, width, bias=False),
    )


@register_projector(
    "perceiver",
    config=PerceiverConfig,
    summary="Flamingo's perceiver resampler: learned latents read the image and each other; a fixed number of tokens.",
    paper="https://arxiv.org/abs/2204.14198",
    token_formula="num_queries",
    presets={
        "perceiver_llava_next": ProjectorPreset(
            {"projection": "output"},
            "LLaVA-NeXT's default size: 3 layers at the vision tower's width, 32 tokens.",
            defaults={"num_queries": 32, "depth": 3},
        ),
        "perceiver_tinyllava": ProjectorPreset(
            {"projection": "input"},
            "TinyLLaVA's resampler: 3 layers at the language model's width, 128 tokens.",
            defaults={"num_queries": 128, "depth": 3},
        ),
    },
)
class PerceiverResampler(Projector):
    """`depth` times attention and feed-forward network, each added to the latents, then a LayerNorm.

    The keys and values of a layer are those of the image and of the latents themselves. There is no position
    embedding: the order of the patches does not matter to it.

    Loads LLaVA-NeXT's keys (`vision_resampler.perceiver.*` beside `mm_projector.*`) and TinyLLaVA's
    (`_connector.{latents,linear,layers.*,norm}`); submodule names are theirs.

    Source: LLaVA-NeXT `llava/model/multimodal_resampler/perceiver.py` (Apache-2.0), after lucidrains' flamingo-pytorch
    (MIT); TinyLLaVA Factory `tinyllava/model/connector/resampler.py` at 0fd715495c925ea97986d2b4c04790408644d031
    (Apache-2.0).
    """

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__(config)
        width = config.block_width
        self.latents = nn.Parameter(torch.empty(config.num_queries, width))
        is_projected_first = config.projection == "input"
        self.linear = nn.Linear(config.fused_hidden_size, width) if is_projected_first else nn.Identity()
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(config), build_feed_forward(width, config.feedforward_multiplier)])
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)
        readout = build_mlp(width, config.text_hidden_size, config.readout_depth)
        self.readout = nn.Identity() if is_projected_first else readout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The originals': PyTorch's default, and latents from N(0, 1)."""
        self.apply(reset_module)
        normal_(self.latents, _LATENT_STD)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        media = self.linear(concatenate_layers(features))
        latents = self.latents.expand(media.shape[0], -1, -1)
        for attention, feed_forward in self.layers:
            latents = latents + attention(latents, media)
            latents = latents + feed_forward(latents)
        return self.readout(self.norm(latents))

    def convert_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a LLaVA-NeXT model the resampler and the read-out behind it, wherever they stand; TinyLLaVA's stays."""
        if not any(key.startswith(_RESAMPLER) for key in state_dict):
            return dict(state_dict)
        own = {key: state_dict[key] for key in state_dict if key.startswith((_RESAMPLER, f"{_READOUT}."))}
        # LLaVA-NeXT's mlp1x_gelu is its linear under another name.
        names = {theirs: ours for ours, theirs in self._readout_names().items()} | {f"{_READOUT}.0": "readout.0"}
        return exchange_prefixes(rename_modules(own, names), {_RESAMPLER: ""})

    def to_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """LLaVA-NeXT's keys, or with projection=input TinyLLaVA's, which are this module's."""
        if self.config.projection == "input":
            return dict(state_dict)
        renamed = rename_modules(state_dict, self._readout_names())
        return {key if key.startswith(f"{_READOUT}.") else _RESAMPLER + key: renamed[key] for key in renamed}

    def _readout_names(self) -> dict[str, str]:
        """Ours -> LLaVA-NeXT's `mm_projector`, a bare Linear or the Linear layers of an MLP."""
        if self.config.readout_depth == 1:
            return {"readout.0": _READOUT}
        return {f"readout.{2 * index}": f"{_READOUT}.{2 * index}" for index in range(self.config.readout_depth)}
