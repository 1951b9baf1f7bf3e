"""MobileVLM V2's LDPv2 (arXiv 2402.03766): an MLP, average pooling, and a depthwise convolution for the positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from ._base import PatchGrid, Projector, ProjectorConfig, refuse_small_grid
from ._keys import exchange_prefixes
from ._options import option
from ._registry import register_projector
from .layers import DepthwiseConv2d, build_mlp, concatenate_layers, map_to_tokens, reset_module, tokens_to_map

_ORIGINAL_PREFIXES = {"mlp.": "mlp.mlp.", "peg.": "peg.peg.0."}


@dataclass(frozen=True, kw_only=True)
class LDPv2Config(ProjectorConfig):
    """The original pools every square grid to 12x12; the default here keeps the grid's shape."""

    output_grid: tuple[int, int] | None = option(
        None,
        "height and width to pool to, for any input (smaller ones are enlarged); none halves each side, rounded up. "
        "12|12 is the original's",
        minimum=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_cls_token()

    def pooled_grid(self, grid: PatchGrid) -> PatchGrid:
        """The grid of the tokens that this grid gives.

        Raises:
            ProjectorError: the grid holds no patch.
        """
        refuse_small_grid(grid)
        return PatchGrid(*(self.output_grid or (-(-side // 2) for side in grid)))

    def num_output_tokens(self, grid: PatchGrid) -> int:
        return self.pooled_grid(grid).num_patches

    def token_grid(self, grid: PatchGrid) -> PatchGrid:
        return self.pooled_grid(grid)


def average_to_grid(feature_map: Tensor, grid: PatchGrid) -> Tensor:
    """Adaptive average pooling of a (B, C, H, W) map, whose windows overlap where `grid` does not divide H and W."""
    kernel = tuple(side // target for side, target in zip(feature_map.shape[2:], grid, strict=True))
    if (kernel[0] * grid.height, kernel[1] * grid.width) == tuple(feature_map.shape[2:]):
        # The same averages; unlike adaptive pooling, the backward of this one is deterministic on CUDA.
        return functional.avg_pool2d(feature_map, kernel)
    return functional.adaptive_avg_pool2d(feature_map, tuple(grid))


@register_projector(
    "ldpv2",
    config=LDPv2Config,
    summary="MobileVLM V2's LDPv2: an MLP, average pooling to a quarter of the tokens, a depthwise convolution added.",
    paper="https://arxiv.org/abs/2402.03766",
    aliases=("ldpnetv2",),
    token_formula="output_grid[0] * output_grid[1] if output_grid else ceil(H / 2) * ceil(W / 2)",
)
class LDPv2(Projector):
    """Linear, exact GELU, average pooling, Linear, and a depthwise 3x3 convolution (PEG) added to its input.

    The original pools after the second Linear. An average commutes with a linear map, so the values are the same to
    rounding while the widest product runs on a quarter of the tokens.

    Source: MobileVLM `mobilevlm/model/vision_projector.py` (Apache-2.0); the position encoding generator is from
    arXiv 2102.10882.
    """

    def __init__(self, config: LDPv2Config) -> None:
        super().__init__(config)
        self.mlp = build_mlp(config.fused_hidden_size, config.text_hidden_size, depth=2)
        self.peg = DepthwiseConv2d(config.text_hidden_size, 3)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default, as in MobileVLM."""
        self.apply(reset_module)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        first_linear, activation, last_linear = self.mlp
        hidden = activation(first_linear(concatenate_layers(features)))
        pooled_grid = self.config.pooled_grid(grid)
        pooled = map_to_tokens(average_to_grid(tokens_to_map(hidden, grid), pooled_grid))
        feature_map = tokens_to_map(last_linear(pooled), pooled_grid)
        return map_to_tokens(feature_map + self.peg(feature_map))

    def convert_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """MobileVLM's `mlp.mlp.{0,2}` and `peg.peg.0` -> `mlp.{0,2}` and `peg`."""
        return exchange_prefixes(state_dict, {theirs: ours for ours, theirs in _ORIGINAL_PREFIXES.items()})

    def to_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return exchange_prefixes(state_dict, _ORIGINAL_PREFIXES)
