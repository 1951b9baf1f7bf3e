"""A projector of one's own in one file: each patch is averaged with its neighbours, then projected."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from projectors import PatchGrid, Projector, ProjectorConfig, ProjectorError, option, register_projector
from projectors.layers import map_to_tokens, reset_module, tokens_to_map


@dataclass(frozen=True, kw_only=True)
class BlurConfig(ProjectorConfig):
    """Each field is an option: --mm_projector_options window=5"""

    window: int = option(3, "side of the neighbourhood that is averaged, in patches; odd", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_cls_token()  # a class token has no place on a map
        if self.window % 2 == 0:
            raise ProjectorError(f"BlurConfig.window: got {self.window}, expected an odd number")

    def num_output_tokens(self, grid: PatchGrid) -> int:
        return grid.num_patches


@register_projector(
    "blur",
    config=BlurConfig,
    summary="Average each patch with its neighbours, then project it.",
    token_formula="H * W",
)
class BlurProjector(Projector):
    """Average over window x window patches, then a Linear layer to the language model's width."""

    def __init__(self, config: BlurConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.fused_hidden_size, config.text_hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_module(self.linear)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        patches = tokens_to_map(torch.cat(tuple(features), dim=2), grid)
        window = self.config.window
        blurred = functional.avg_pool2d(patches, window, stride=1, padding=window // 2, count_include_pad=False)
        return self.linear(map_to_tokens(blurred))
