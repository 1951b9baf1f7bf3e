"""MobileVLM's Lightweight Downsample Projector, LDP (arXiv 2312.16886): an MLP and two MobileNet blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from ._base import PatchGrid, Projector, ProjectorConfig, refuse_small_grid
from ._keys import rename_modules
from ._registry import register_projector
from .layers import (
    DepthwiseConv2d,
    LayerNorm2d,
    PointwiseConv2d,
    SqueezeExcite,
    build_mlp,
    concatenate_layers,
    map_to_tokens,
    reset_module,
    tokens_to_map,
)

_NORM_EPS = 1e-5
_STRIDES = (1, 2)
_SQUEEZE_RATIO, _SQUEEZE_MULTIPLE = 4, 8

_ORIGINAL_MLP_NAMES = {"mlp.0": "model.mlp.1", "mlp.2": "model.mlp.3"}
# Within one block; the original counts its blocks from 1.
_ORIGINAL_BLOCK_NAMES = {
    "depthwise": "block.0.0",
    "depthwise_norm": "block.0.1",
    "squeeze_excite.fc1": "block.1.fc1",
    "squeeze_excite.fc2": "block.1.fc2",
    "pointwise": "block.2.0",
    "pointwise_norm": "block.2.1",
}


@dataclass(frozen=True, kw_only=True)
class LDPConfig(ProjectorConfig):
    """Each side of the grid is halved and rounded up; the original takes square grids only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_cls_token()

    def num_output_tokens(self, grid: PatchGrid) -> int:
        return self.token_grid(grid).num_patches

    def token_grid(self, grid: PatchGrid) -> PatchGrid:
        refuse_small_grid(grid)
        return PatchGrid(*(-(-side // 2) for side in grid))


def squeezed_width(channels: int) -> int:
    """MobileNet's width of a squeeze: a quarter, rounded to a multiple of 8 that is not more than a tenth below it."""
    quarter = channels // _SQUEEZE_RATIO
    rounded = max(_SQUEEZE_MULTIPLE, (quarter + _SQUEEZE_MULTIPLE // 2) // _SQUEEZE_MULTIPLE * _SQUEEZE_MULTIPLE)
    return rounded + _SQUEEZE_MULTIPLE if rounded < 0.9 * quarter else rounded


class SeparableBlock(nn.Module):
    """MobileNetV3's block without expansion: depthwise 3x3, squeeze-and-excitation, 1x1; residual at stride 1.

    Hardswish after the depthwise convolution's norm, ReLU and a Hardsigmoid gate inside the excitation, nothing at the
    end. No convolution has a bias but the excitation's.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.has_residual = stride == 1
        self.depthwise = DepthwiseConv2d(channels, 3, stride, bias=False)
        self.depthwise_norm = LayerNorm2d(channels, eps=_NORM_EPS)
        self.squeeze_excite = SqueezeExcite(
            channels, squeezed_width(channels), activation=functional.relu, gate=functional.hardsigmoid
        )
        self.pointwise = PointwiseConv2d(channels, channels, bias=False)
        self.pointwise_norm = LayerNorm2d(channels, eps=_NORM_EPS)

    def forward(self, feature_map: Tensor) -> Tensor:
        filtered = functional.hardswish(self.depthwise_norm(self.depthwise(feature_map)))
        output = self.pointwise_norm(self.pointwise(self.squeeze_excite(filtered)))
        return feature_map + output if self.has_residual else output


@register_projector(
    "ldp",
    config=LDPConfig,
    summary="MobileVLM's LDP: an MLP and two depthwise separable blocks, the second of stride 2; a quarter of the "
    "tokens.",
    paper="https://arxiv.org/abs/2312.16886",
    aliases=("ldpnet",),
    token_formula="ceil(H / 2) * ceil(W / 2)",
)
class LDP(Projector):
    """mlp2x_gelu per token, then a separable block that keeps the map and one that halves it.

    The output ends in a LayerNorm. Where the original stores a 1x1 convolution, the Linear layer here holds the same
    numbers.

    Source: MobileVLM `mobilevlm/model/vision_projector.py` (Apache-2.0), whose blocks are torchvision's
    InvertedResidual (BSD-3-Clause).
    """

    def __init__(self, config: LDPConfig) -> None:
        super().__init__(config)
        self.mlp = build_mlp(config.fused_hidden_size, config.text_hidden_size, depth=2)
        self.blocks = nn.Sequential(*(SeparableBlock(config.text_hidden_size, stride) for stride in _STRIDES))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default, as in MobileVLM."""
        self.apply(reset_module)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        tokens = self.mlp(concatenate_layers(features))
        return map_to_tokens(self.blocks(tokens_to_map(tokens, grid)))

    def convert_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """MobileVLM's `model.mlp.1`, `model.mb_block.1.block.0.0`, ...; 1x1 kernels become matrices."""
        ours_of = {theirs: ours for ours, theirs in _original_names().items()}
        return {
            ours: tensor.flatten(1) if ".pointwise." in ours and tensor.dim() == 4 else tensor
            for ours, tensor in rename_modules(state_dict, ours_of).items()
        }

    def to_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kernels = {
            ours: tensor[:, :, None, None] if ".pointwise." in ours else tensor for ours, tensor in state_dict.items()
        }
        return rename_modules(kernels, _original_names())


def _original_names() -> dict[str, str]:
    """Our modules -> MobileVLM's."""
    names = dict(_ORIGINAL_MLP_NAMES)
    for block in range(len(_STRIDES)):
        for ours, theirs in _ORIGINAL_BLOCK_NAMES.items():
            names[f"blocks.{block}.{ours}"] = f"model.mb_block.{block + 1}.{theirs}"
    return names
