"""SAEP, the Spatial-Aware Efficient Projector (arXiv 2410.10319), reconstructed from the paper's abstract.

The abstract states two ingredients, multi-layer visual features and a modified separable depthwise convolution, and
75 % fewer visual tokens. Layers, order of the convolutions, norms, shortcut and read-out are not public: every one of
them is an option here, and the defaults are our choices, not the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._base import PatchGrid, Projector, ProjectorConfig, refuse_small_grid, same_relative_depths
from ._errors import ProjectorError
from ._options import option
from ._registry import ProjectorPreset, register_projector
from .layers import (
    DepthwiseConv2d,
    LayerNorm2d,
    LearnedPositions,
    PointwiseConv2d,
    SincosPositions,
    SqueezeExcite,
    build_mlp,
    concatenate_layers,
    map_to_tokens,
    pad_to_multiple,
    reset_module,
    reset_module_trunc_normal,
    tokens_to_map,
    zeros_,
)

_NORM_EPS = 1e-6
_SQUEEZE_RATIO = 4
_REFERENCE_LAYERS, _REFERENCE_DEPTH = (12, 16, 22, 23), 24


@dataclass(frozen=True, kw_only=True)
class SAEPConfig(ProjectorConfig):
    """Every free choice of the reconstruction, with the default that our experiments start from."""

    layer_presets: ClassVar[Mapping[str, tuple[int, ...]]] = {
        "token_packer": (12, 16, 22, 23),
        "sci": (7, 15, 23),
        "lsf": (3, 18, 23),
        "single": (-2,),
    }

    aggregation: Literal["concat", "sum", "softmax", "depthwise_concat"] = option(
        "concat",
        "how the layers meet: channel concatenation, sum, learned softmax-weighted sum, or concatenation after a "
        "depthwise convolution per layer",
    )
    order: Literal["pw_dw", "dw_pw", "pw_dw_pw", "pw"] = option(
        "pw_dw", "order of the pointwise (pw) and the depthwise (dw) convolution; pw leaves the depthwise one out"
    )
    mid_channels: int | None = option(
        None, "width between the convolutions and the read-out; none means vision_hidden_size", minimum=1
    )
    kernel_size: Literal[1, 2, 3, 5, 7] = option(3, "side of the depthwise filter; 1 sees no neighbours (ablation)")
    stride: Literal[1, 2, 3, 4] = option(2, "each side of the grid shrinks by this factor, rounded up")
    shortcut: Literal["none", "avgpool", "last_layer_avgpool"] = option(
        "avgpool", "what is added to the convolution: nothing, its average-pooled input, or the pooled last layer named"
    )
    norm: Literal["none", "ln2d"] = option("ln2d", "channel-wise LayerNorm after each convolution")
    input_norm: bool = option(False, "LayerNorm on each layer's features before they meet")
    squeeze_excite: bool = option(False, "squeeze-and-excitation after the depthwise convolution")
    positions: Literal["none", "learned", "sincos"] = option(
        "none", "position embedding added to each layer's features"
    )
    position_grid: tuple[int, int] = option(
        (24, 24), "height and width of the grid of learned positions; others are interpolated", minimum=1
    )
    readout_depth: int = option(2, "Linear layers of the read-out, with GELU between each two", minimum=1, maximum=1000)
    init: Literal["default", "trunc_normal", "zero_residual"] = option(
        "default",
        "PyTorch's default, truncated normal of std 0.02, or the default with the shortcut's residual branch at zero",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_cls_token()
        if self.shortcut == "last_layer_avgpool" and self.block_channels != self.vision_hidden_size:
            raise ProjectorError(
                f"SAEPConfig: shortcut 'last_layer_avgpool' adds features of {self.vision_hidden_size} channels to a "
                f"map of {self.block_channels}; leave mid_channels at none or choose shortcut 'avgpool'"
            )
        if self.order == "pw" and self.shortcut == "none":
            raise ProjectorError(
                "SAEPConfig: order 'pw' has no convolution that downsamples, so shortcut 'none' would pass nothing on; "
                "choose shortcut 'avgpool'"
            )
        if self.order == "pw" and self.squeeze_excite:
            raise ProjectorError(
                "SAEPConfig: squeeze_excite follows the depthwise convolution, which order 'pw' leaves out; choose one"
            )
        if self.init == "zero_residual" and self.shortcut == "none":
            raise ProjectorError(
                "SAEPConfig: init 'zero_residual' with shortcut 'none' would pass nothing on; choose a shortcut"
            )

    @property
    def block_channels(self) -> int:
        """Channels between the convolutions and the read-out."""
        return self.mid_channels if self.mid_channels is not None else self.vision_hidden_size

    @property
    def aggregated_channels(self) -> int:
        """Channels after the layers have met."""
        is_concatenated = self.aggregation in ("concat", "depthwise_concat")
        return self.fused_hidden_size if is_concatenated else self.vision_hidden_size

    @classmethod
    def default_vision_layers(
        cls, num_vision_layers: int | None = None, options: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[int, ...]:
        """Layers 12, 16, 22 and 23 of 24; on other towers the same relative depths, rounded up, each once."""
        return tuple(sorted(set(same_relative_depths(_REFERENCE_LAYERS, _REFERENCE_DEPTH, num_vision_layers))))

    @classmethod
    def tiny_options(cls) -> dict[str, Any]:
        return {"position_grid": [4, 4]}

    def num_output_tokens(self, grid: PatchGrid) -> int:
        return self.token_grid(grid).num_patches

    def token_grid(self, grid: PatchGrid) -> PatchGrid:
        refuse_small_grid(grid)
        return PatchGrid(*(-(-side // self.stride) for side in grid))


class NormedConv(nn.Module):
    """A convolution, then optionally LayerNorm over channels, GELU, and squeeze-and-excitation."""

    def __init__(self, conv: nn.Module, channels: int, config: SAEPConfig, activate: bool, excite: bool) -> None:
        super().__init__()
        self.conv = conv
        self.norm = LayerNorm2d(channels, eps=_NORM_EPS) if config.norm == "ln2d" else nn.Identity()
        self.activation = nn.GELU() if activate else nn.Identity()
        squeezed = max(channels // _SQUEEZE_RATIO, 1)
        self.squeeze_excite = SqueezeExcite(channels, squeezed) if excite else nn.Identity()

    def forward(self, feature_map: Tensor) -> Tensor:
        return self.squeeze_excite(self.activation(self.norm(self.conv(feature_map))))

    def zero_output(self) -> None:
        """Start as a map of zeros: through the norm's gain, or without a norm through the convolution itself."""
        scale = self.norm if isinstance(self.norm, LayerNorm2d) else self.conv
        zeros_(scale.weight)
        zeros_(scale.bias)


def pointwise(in_channels: int, config: SAEPConfig, activate: bool) -> NormedConv:
    """The 1x1 convolution to block_channels."""
    channels = config.block_channels
    return NormedConv(PointwiseConv2d(in_channels, channels), channels, config, activate, excite=False)


def depthwise(channels: int, config: SAEPConfig, stride: int, excite: bool = False) -> NormedConv:
    """The spatial filter, without an activation after it (the linear bottleneck of MobileNetV2)."""
    conv = DepthwiseConv2d(channels, config.kernel_size, stride)
    return NormedConv(conv, channels, config, activate=False, excite=excite)


class SpatialBlock(nn.Module):
    """Pointwise and depthwise convolutions in the configured order, with the shortcut.

    The `avgpool` shortcut bridges what follows the fusing pointwise convolution (pw_dw, pw_dw_pw) or, when the
    depthwise convolution comes first, that one; `last_layer_avgpool` bridges the whole block.
    """

    def __init__(self, config: SAEPConfig) -> None:
        super().__init__()
        self.config = config
        in_channels, channels = config.aggregated_channels, config.block_channels
        filtered_channels = in_channels if config.order == "dw_pw" else channels
        self.fuse = pointwise(in_channels, config, activate=True)
        if config.order != "pw":
            self.spatial = depthwise(filtered_channels, config, config.stride, config.squeeze_excite)
        self.project = pointwise(channels, config, activate=False) if config.order == "pw_dw_pw" else nn.Identity()

    def forward(self, feature_map: Tensor, last_layer: Tensor) -> Tensor:
        """(B, aggregated_channels, H, W) and the last layer's (B, vision_hidden_size, H, W) -> the smaller map.

        Padding comes as late as it can: what acts on each place alone gives the same before it, on fewer places and
        narrower maps.

        Returns:
            (B, block_channels, ceil(H / stride), ceil(W / stride))
        """
        stride = self.config.stride
        if self.config.order == "dw_pw":
            padded = pad_to_multiple(feature_map, stride)
            block = self.fuse(self._add_pooled(self.spatial(padded), padded))
        elif self.config.order == "pw":
            block = functional.avg_pool2d(pad_to_multiple(self.fuse(feature_map), stride), stride)
        else:
            fused = pad_to_multiple(self.fuse(feature_map), stride)
            block = self._add_pooled(self.project(self.spatial(fused)), fused)
        if self.config.shortcut == "last_layer_avgpool":
            block = block + functional.avg_pool2d(pad_to_multiple(last_layer, stride), stride)
        return block

    def _add_pooled(self, filtered: Tensor, unfiltered: Tensor) -> Tensor:
        if self.config.shortcut != "avgpool":
            return filtered
        return filtered + functional.avg_pool2d(unfiltered, self.config.stride)

    def zero_residual(self) -> None:
        """Make the branch beside the shortcut start at zero."""
        if self.config.order == "pw_dw_pw":
            self.project.zero_output()
        elif self.config.order in ("dw_pw", "pw") and self.config.shortcut == "last_layer_avgpool":
            self.fuse.zero_output()
        elif self.config.order != "pw":
            self.spatial.zero_output()


class LayerAggregation(nn.Module):
    """Brings the selected layers together: optional norm, positions and filter for each, then sum or concatenation."""

    def __init__(self, config: SAEPConfig) -> None:
        super().__init__()
        self.aggregation = config.aggregation
        channels, num_layers = config.vision_hidden_size, len(config.vision_layers)
        self.input_norms = nn.ModuleList(
            nn.LayerNorm(channels, eps=_NORM_EPS) for _ in range(num_layers if config.input_norm else 0)
        )
        if config.positions == "learned":
            self.positions: nn.Module | None = LearnedPositions(PatchGrid(*config.position_grid), channels)
        else:
            self.positions = SincosPositions() if config.positions == "sincos" else None
        self.layer_filters = nn.ModuleList(
            depthwise(channels, config, stride=1)
            for _ in range(num_layers if config.aggregation == "depthwise_concat" else 0)
        )
        self.layer_logits = nn.Parameter(torch.zeros(num_layers)) if config.aggregation == "softmax" else None

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> tuple[Tensor, Tensor]:
        """K tensors (B, H*W, C) -> the aggregated (B, aggregated_channels, H, W) map and the last layer's map."""
        layers = list(features)
        if self.input_norms:
            layers = [norm(tokens) for norm, tokens in zip(self.input_norms, layers, strict=True)]
        if self.positions is not None:
            layers = [self.positions(tokens, grid) for tokens in layers]
        last_layer = tokens_to_map(layers[-1], grid)
        if self.aggregation == "depthwise_concat":
            filtered = [
                layer_filter(tokens_to_map(tokens, grid))
                for layer_filter, tokens in zip(self.layer_filters, layers, strict=True)
            ]
            return torch.cat(filtered, dim=1), last_layer
        return tokens_to_map(self._combine(layers), grid), last_layer

    def _combine(self, layers: list[Tensor]) -> Tensor:
        if self.aggregation == "concat":
            return concatenate_layers(layers)
        stacked = torch.stack(layers)
        if self.layer_logits is None:
            return stacked.sum(0)
        weights = self.layer_logits.float().softmax(0).to(stacked.dtype)
        return torch.einsum("k,kbnc->bnc", weights, stacked)

    def reset_own_parameters(self) -> None:
        """Positions at their own scale; equal weight for every layer."""
        if isinstance(self.positions, LearnedPositions):
            self.positions.reset_parameters()
        zeros_(self.layer_logits)


_PRESETS = {
    "saep_single_layer": ProjectorPreset(
        {"vision_layers": [-2]}, "SAEP without its first ingredient: one layer instead of several."
    ),
    "saep_no_depthwise": ProjectorPreset(
        {"order": "pw"}, "SAEP without its second ingredient: the fused layers are average-pooled, nothing else."
    ),
    "saep_dw_pw": ProjectorPreset(
        {"order": "dw_pw"}, "SAEP with the textbook order of a separable convolution: depthwise, then pointwise."
    ),
    "saep_no_shortcut": ProjectorPreset(
        {"shortcut": "none"}, "SAEP without the average-pooled shortcut around the depthwise convolution."
    ),
}
"""Ablations that isolate what the abstract names, and the two choices of ours that matter most beside it."""


@register_projector(
    "saep",
    config=SAEPConfig,
    summary="SAEP, our reconstruction from the paper's abstract: multi-layer features and a separable depthwise "
    "convolution; a quarter of the tokens.",
    paper="https://arxiv.org/abs/2410.10319",
    presets=_PRESETS,
    token_formula="ceil(H / stride) * ceil(W / stride)",
)
class SAEP(Projector):
    """Our reconstruction of SAEP from its abstract; the paper's own method section and code were not available to us.

    Default (K layers of C channels, M = mid_channels or C, D = text_hidden_size)::

        x = GELU(LN2d(Conv1x1(K*C -> M)(concat_channels(X_1 .. X_K))))
        x = x with its last row and column repeated to multiples of the stride
        y = LN2d(DepthwiseConv3x3(M, stride 2)(x)) + AvgPool2x2(x)
        output = Linear(M -> D), GELU, Linear(D -> D)

    ceil(height / stride) * ceil(width / stride) tokens: 144 of 576 on a 24x24 grid, which is the abstract's 75 % fewer.
    """

    def __init__(self, config: SAEPConfig) -> None:
        super().__init__(config)
        self.aggregation = LayerAggregation(config)
        self.block = SpatialBlock(config)
        self.readout = build_mlp(config.block_channels, config.text_hidden_size, config.readout_depth)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the option `init` says."""
        reset = reset_module_trunc_normal if self.config.init == "trunc_normal" else reset_module
        self.apply(reset)
        self.aggregation.reset_own_parameters()
        if self.config.init == "zero_residual":
            self.block.zero_residual()

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        return self.readout(map_to_tokens(self.block(*self.aggregation(features, grid))))
