"""Qwen2-VL's patch merger (arXiv 2409.12191): normalise each patch, then an MLP over each window of patches.

The original receives its patches window by window, because its image processor cuts the image in that order. The vision
towers here deliver them row by row like every other projector's input, and the merger gathers the windows itself:
weights and values are the original's, only the order of the input differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ._base import PatchGrid, Projector
from ._options import option
from ._registry import ProjectorPreset, register_projector
from ._windows import WindowedProjectorConfig
from .layers import concatenate_layers, fold_windows, ones_, pad_to_windows, reset_module

_NORM_EPS = 1e-6
_NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


@dataclass(frozen=True, kw_only=True)
class PatchMergerConfig(WindowedProjectorConfig):
    """`factor` is the original's `spatial_merge_size`; it reads the last block of its own tower."""

    norm: Literal["layernorm", "rmsnorm"] = option(
        "layernorm", "norm over the channels of each patch: as in Qwen2-VL, or without mean and bias as in Qwen2.5-VL"
    )


@register_projector(
    "patch_merger",
    config=PatchMergerConfig,
    summary="Qwen2-VL's merger: a norm per patch, then an MLP over each 2x2 window; a quarter of the tokens.",
    paper="https://arxiv.org/abs/2409.12191",
    token_formula="ceil(H / factor) * ceil(W / factor)",
    presets={
        "patch_merger_qwen2_vl": ProjectorPreset({"norm": "layernorm"}, "The merger of Qwen2-VL: LayerNorm."),
        "patch_merger_qwen2_5_vl": ProjectorPreset({"norm": "rmsnorm"}, "The merger of Qwen2.5-VL: RMSNorm."),
    },
)
class PatchMerger(Projector):
    """Norm of each patch (eps 1e-6), then Linear, exact GELU and Linear on the channels of a whole window.

    The first Linear keeps the width of a window (channels * factor**2). Features come row by row; the original's
    flat input is `split_windows(tokens, grid, factor).flatten(1, 2)`. Submodule names are the original's.

    Source: transformers `models/qwen2_vl/modeling_qwen2_vl.py` and `models/qwen2_5_vl/modeling_qwen2_5_vl.py`
    (Apache-2.0).
    """

    def __init__(self, config: PatchMergerConfig) -> None:
        super().__init__(config)
        window_width = config.fused_hidden_size * config.factor**2
        self.ln_q = _NORMS[config.norm](config.fused_hidden_size, eps=_NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(window_width, window_width), nn.GELU(), nn.Linear(window_width, config.text_hidden_size)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default."""
        self.apply(reset_module)
        ones_(self.ln_q.weight)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        padded_grid, factor = self.config.padded_grid(grid), self.config.factor
        tokens = pad_to_windows(self.ln_q(concatenate_layers(features)), grid, factor)
        return self.mlp(fold_windows(tokens, padded_grid, factor))
