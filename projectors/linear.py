"""One Linear layer per token: LLaVA's `linear` projector (arXiv 2304.08485)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ._base import PatchGrid, Projector, ProjectorConfig
from ._registry import register_projector
from .layers import concatenate_layers, reset_module


@dataclass(frozen=True, kw_only=True)
class LinearConfig(ProjectorConfig):
    """No options of its own; several layers are concatenated along the channels."""

    @property
    def reads_patch_map(self) -> bool:
        return False

    def num_output_tokens(self, grid: PatchGrid) -> int:
        return self.num_input_tokens(grid)

    def token_grid(self, grid: PatchGrid) -> PatchGrid | None:
        return None if self.keep_cls_token else grid


@register_projector(
    "linear",
    config=LinearConfig,
    summary="One Linear layer per token; keeps every token.",
    paper="https://arxiv.org/abs/2304.08485",
    token_formula="H * W + keep_cls_token",
)
class LinearProjector(Projector):
    """Linear(layers * vision_hidden_size -> text_hidden_size) with bias, on each token alone.

    Source: LLaVA `llava/model/multimodal_projector/builder.py` (Apache-2.0).
    """

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.fused_hidden_size, config.text_hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default, as in LLaVA."""
        reset_module(self.linear)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        return self.linear(concatenate_layers(features))

    def convert_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """LLaVA keeps a bare Linear: `weight`, `bias`."""
        return {f"linear.{key}": tensor for key, tensor in state_dict.items()}

    def to_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix("linear."): tensor for key, tensor in state_dict.items()}
