"""LLaVA-SP (arXiv 2507.00505): a few tokens that each see a map as a whole, in front of LLaVA's MLP tokens.

A spatial token is one convolution whose kernel covers its whole map, so its weights are dense: at CLIP-L/336 into 4096
channels they make nearly 800 million parameters.
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
from ._keys import rename_modules
from ._options import option
from ._registry import ProjectorPreset, register_projector
from .layers import build_mlp, concatenate_layers, reset_module, tokens_to_map

_ORIGINAL_PARTS = ("mm_projector.", "conv_", "query_projector.", "key_projector.", "value_projector.")


@dataclass(frozen=True, kw_only=True)
class LLaVASPConfig(ProjectorConfig):
    """One token per kernel size, then one per patch.

    The largest kernel sees the whole map and the others their share of it, so that 24x24, the original's only grid,
    is one case of any grid.
    """

    variant: Literal["pooling", "cropping"] = option(
        "pooling",
        "pooling: each kernel sees the whole map, averaged to the kernel's size; cropping: the centre of the map, with "
        "an attention to its details behind it",
    )
    kernel_sizes: tuple[int, ...] = option(
        (4, 8, 12, 16, 20, 24), "sides of the kernels in patches, one spatial token each", minimum=1
    )
    spatial_hidden_size: int = option(512, "channels of the spatial tokens before the read-out", minimum=1)
    depth: int = option(2, "Linear layers of the MLP per patch, with GELU between each two", minimum=1, maximum=1000)
    detail_kernel_size: int = option(
        16, "cropping: side of the convolution that makes the details; no side of the grid may be smaller", minimum=1
    )
    detail_stride: int = option(2, "cropping: stride of that convolution", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_cls_token()
        if not self.kernel_sizes or len(set(self.kernel_sizes)) < len(self.kernel_sizes):
            raise ProjectorError(
                f"LLaVASPConfig.kernel_sizes: got {list(self.kernel_sizes)}, expected at least one size and none twice"
            )

    @property
    def has_details(self) -> bool:
        """Whether the spatial tokens attend to the details of the map."""
        return self.variant == "cropping"

    def check_grid(self, grid: PatchGrid) -> None:
        """Refuse an empty grid, or one that the convolution of the details does not fit into."""
        refuse_small_grid(grid)
        if self.has_details and min(grid) < self.detail_kernel_size:
            raise ProjectorError(
                f"a {grid} grid is smaller than detail_kernel_size {self.detail_kernel_size}. Choose a "
                f"detail_kernel_size of at most {min(grid)}, variant=pooling, or larger images."
            )

    def num_output_tokens(self, grid: PatchGrid) -> int:
        self.check_grid(grid)
        return grid.num_patches + len(self.kernel_sizes)

    def crop_grid(self, grid: PatchGrid, kernel_size: int) -> PatchGrid:
        """The part of the map that a kernel sees: the same share of both sides, rounded, at least one patch."""
        if self.variant == "pooling":
            return grid
        largest = max(self.kernel_sizes)
        return PatchGrid(*(max(1, (2 * side * kernel_size + largest) // (2 * largest)) for side in grid))

    @classmethod
    def tiny_options(cls) -> dict[str, Any]:
        return {"kernel_sizes": [1, 2, 4], "spatial_hidden_size": 12, "detail_kernel_size": 2, "detail_stride": 1}


class WholeMapConv2d(nn.Conv2d):
    """A convolution whose kernel is as large as the map, as the one matrix product that it is."""

    def forward(self, feature_map: Tensor) -> Tensor:
        """(B, C, kernel_size, kernel_size) -> (B, out_channels)."""
        return functional.linear(feature_map.flatten(1), self.weight.flatten(1), self.bias)


class DetailAttention(nn.Module):
    """Detail feature integrator: spatial tokens attend, with one head, to a convolution of the map at a stride."""

    def __init__(self, config: LLaVASPConfig) -> None:
        super().__init__()
        width = config.spatial_hidden_size
        self.conv = nn.Conv2d(
            config.fused_hidden_size, width, config.detail_kernel_size, config.detail_stride, bias=False
        )
        self.query, self.key, self.value = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(3)
        )

    def forward(self, spatial_tokens: Tensor, feature_map: Tensor) -> Tensor:
        """(B, K, width), (B, C, H, W) -> (B, K, width)."""
        # Contiguous, because a channels-last map would have the convolution copy its large kernel to that layout.
        details = self.conv(feature_map.contiguous()).flatten(2).transpose(1, 2)
        return functional.scaled_dot_product_attention(
            self.query(spatial_tokens), self.key(details), self.value(details)
        )


@register_projector(
    "llava_sp",
    config=LLaVASPConfig,
    summary="LLaVA-SP: six tokens from convolutions over the whole map in front of mlp2x_gelu's; keeps every token.",
    paper="https://arxiv.org/abs/2507.00505",
    token_formula="H * W + len(kernel_sizes)",
    presets={
        "llava_sp_pooling": ProjectorPreset(
            {"variant": "pooling"}, "LLaVA-SP, from the whole map at six resolutions (the released default)."
        ),
        "llava_sp_cropping": ProjectorPreset(
            {"variant": "cropping"}, "LLaVA-SP, from six centre crops with attention to the details of the map."
        ),
    },
)
class LLaVASP(Projector):
    """K spatial tokens s from K kernels, then N tokens of an MLP; C channels into D::

        pooling:   s = Conv_k(average to k x k of the map), k x k kernel, C -> 512, no bias
                   GELU, Linear(512 -> D, no bias)
        cropping:  s = Conv_k(centre of k / largest k of both sides, averaged to k x k where it is not of that size)
                   a = attention of s to Conv(map, 16x16, stride 2), queries, keys and values by LayerNorm and Linear
                   GELU of [s, a], Linear(1024 -> D)

    On 24x24 patches this is the original. It replaced NaN by zero on the way, which only hid them; that is left out.

    Source: LLaVA-SP `llava/model/llava_arch.py` and `llava/model/multimodal_encoder/clip_encoder.py` (Apache-2.0),
    whose keys are `conv_{k}.1` or `conv_{k}`, `conv_CM`, `{query,key,value}_projector.{0,1}`, `conv_linear.1` and
    `mm_projector.{0,2}`.
    """

    def __init__(self, config: LLaVASPConfig) -> None:
        super().__init__(config)
        channels, width = config.fused_hidden_size, config.spatial_hidden_size
        self.spatial = nn.ModuleDict(
            {str(size): WholeMapConv2d(channels, width, size, bias=False) for size in config.kernel_sizes}
        )
        self.detail = DetailAttention(config) if config.has_details else None
        readout_width = 2 * width if config.has_details else width
        self.readout = nn.Sequential(
            nn.GELU(), nn.Linear(readout_width, config.text_hidden_size, bias=config.has_details)
        )
        self.mlp = build_mlp(channels, config.text_hidden_size, config.depth)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default, as in LLaVA-SP."""
        self.apply(reset_module)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        self.config.check_grid(grid)
        tokens = concatenate_layers(features)
        feature_map = tokens_to_map(tokens, grid)
        spatial_tokens = torch.stack([self._spatial_token(feature_map, size) for size in self.config.kernel_sizes], 1)
        if self.detail is not None:
            spatial_tokens = torch.cat([spatial_tokens, self.detail(spatial_tokens, feature_map)], dim=2)
        return torch.cat([self.readout(spatial_tokens), self.mlp(tokens)], dim=1)

    def _spatial_token(self, feature_map: Tensor, kernel_size: int) -> Tensor:
        """(B, C, H, W) -> (B, spatial_hidden_size)."""
        crop = self.config.crop_grid(PatchGrid(*feature_map.shape[2:]), kernel_size)
        cropped = crop_centre(feature_map, crop)
        if crop != (kernel_size, kernel_size):
            cropped = functional.adaptive_avg_pool2d(cropped, kernel_size)
        return self.spatial[str(kernel_size)](cropped)

    def convert_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """LLaVA-SP's modules, which lie side by side in the whole model; its other parts are dropped."""
        parts = {key: tensor for key, tensor in state_dict.items() if key.startswith(_ORIGINAL_PARTS)}
        return rename_modules(parts, {theirs: ours for ours, theirs in self._original_names().items()})

    def to_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename_modules(state_dict, self._original_names())

    def _original_names(self) -> dict[str, str]:
        """Our modules -> LLaVA-SP's."""
        names = {"readout.1": "conv_linear.1", "detail.conv": "conv_CM"}
        names |= {f"mlp.{2 * index}": f"mm_projector.{2 * index}" for index in range(self.config.depth)}
        names |= {
            f"detail.{k}.{index}": f"{k}_projector.{index}" for k in ("query", "key", "value") for index in (0, 1)
        }
        for size in self.config.kernel_sizes:
            # There a pooling sits in front of each convolution but the largest, whose map needs none.
            is_pooled = self.config.variant == "pooling" and size < max(self.config.kernel_sizes)
            names[f"spatial.{size}"] = f"conv_{size}.1" if is_pooled else f"conv_{size}"
        return names


def crop_centre(feature_map: Tensor, crop: PatchGrid) -> Tensor:
    """The middle of a (B, C, H, W) map, a view; half a patch towards the upper left where there is no middle."""
    top, left = (feature_map.shape[2] - crop.height) // 2, (feature_map.shape[3] - crop.width) // 2
    return feature_map[:, :, top : top + crop.height, left : left + crop.width]
