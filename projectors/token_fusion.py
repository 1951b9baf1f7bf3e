"""LLaVA-STF (arXiv 2506.07138): many layers fused per patch, then windows of patches fused into one token each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from ._base import PatchGrid, Projector, same_relative_depths
from ._keys import exchange_prefixes
from ._options import option
from ._registry import register_projector
from ._windows import WindowedProjectorConfig
from .layers import concatenate_layers, fold_windows, pad_to_windows, reset_module

# Behind the selected layer, which comes first; deep to shallow, as the weights expect their channels.
_REFERENCE_LAYERS, _REFERENCE_DEPTH = (21, 18, 15, 12, 9, 6, 3), 24

_ORIGINAL_PREFIXES = {"fusion.": "mm_projector_crosslayer.", "readout.": "mm_projector."}


@dataclass(frozen=True, kw_only=True)
class TokenFusionConfig(WindowedProjectorConfig):
    """The original reads hidden states 23, 21, 18, 15, 12, 9, 6 and 3 of 24 blocks, concatenated in this order.

    On another tower: the layer before the last, then the same relative depths, each layer once; a shallow tower gives
    fewer than eight.
    """

    fusion_hidden_multiplier: int = option(
        4, "inner width of the MLP that fuses the layers, in widths of the vision tower", minimum=1, maximum=1000
    )
    readout_hidden_multiplier: int = option(
        16, "inner width of the MLP that fuses a window, in widths of the vision tower", minimum=1, maximum=1000
    )

    @classmethod
    def default_vision_layers(
        cls, num_vision_layers: int | None = None, options: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[int, ...]:
        selected = (num_vision_layers or _REFERENCE_DEPTH) - 1
        others = same_relative_depths(_REFERENCE_LAYERS, _REFERENCE_DEPTH, num_vision_layers)
        # Depths are rounded up, so on a shallow tower some meet each other or the selected layer, or pass it.
        return (selected, *dict.fromkeys(layer for layer in others if layer < selected))

    @classmethod
    def tiny_options(cls) -> dict[str, Any]:
        return {"fusion_hidden_multiplier": 2, "readout_hidden_multiplier": 3}


@register_projector(
    "token_fusion",
    config=TokenFusionConfig,
    summary="LLaVA-STF: an MLP over eight layers of each patch, then an MLP over 2x2 patches; a quarter of the tokens.",
    paper="https://arxiv.org/abs/2506.07138",
    aliases=("llava_stf",),
    token_formula="ceil(H / factor) * ceil(W / factor)",
)
class TokenFusion(Projector):
    """For K layers of C channels into D channels, with exact GELU::

        per patch:   Linear(K C -> 4 C), GELU, Linear(4 C -> C)
        per window:  factor**2 C channels, the channel outside and the patch inside
                     Linear(-> 16 C), GELU, Linear(16 C -> D)

    Source: LLaVA-STF `llava/model/llava_arch.py` and `llava/model/multimodal_projector/builder.py` at
    57dee2e1d49d9a5f93348f39d9cf363dbd8b7391 (Apache-2.0), whose keys are `mm_projector_crosslayer.{0,2}` and
    `mm_projector.{0,2}`.
    """

    def __init__(self, config: TokenFusionConfig) -> None:
        super().__init__(config)
        channels = config.vision_hidden_size
        self.fusion = _two_layers(config.fused_hidden_size, config.fusion_hidden_multiplier * channels, channels)
        self.readout = _two_layers(
            channels * config.factor**2, config.readout_hidden_multiplier * channels, config.text_hidden_size
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default, as in LLaVA-STF."""
        self.apply(reset_module)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        padded_grid, factor = self.config.padded_grid(grid), self.config.factor
        fused = pad_to_windows(self.fusion(concatenate_layers(features)), grid, factor)
        # Channel-major, as torch's unfold lays windows out.
        return self.readout(fold_windows(fused, padded_grid, factor, channel_major=True))

    def convert_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """LLaVA-STF's two MLPs, which lie side by side in the whole model; its other parts are dropped."""
        ours_of = {theirs: ours for ours, theirs in _ORIGINAL_PREFIXES.items()}
        parts = {key: tensor for key, tensor in state_dict.items() if key.startswith(tuple(ours_of))}
        return exchange_prefixes(parts, ours_of)

    def to_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return exchange_prefixes(state_dict, _ORIGINAL_PREFIXES)


def _two_layers(in_features: int, hidden_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, hidden_features), nn.GELU(), nn.Linear(hidden_features, out_features))
