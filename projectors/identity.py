"""No projection at all: LLaVA's `identity`, for towers whose width is already the language model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ._base import PatchGrid, Projector, ProjectorConfig
from ._errors import ProjectorError
from ._registry import register_projector
from .layers import concatenate_layers


@dataclass(frozen=True, kw_only=True)
class IdentityConfig(ProjectorConfig):
    """Needs layers * vision_hidden_size == text_hidden_size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fused_hidden_size != self.text_hidden_size:
            raise ProjectorError(
                f"projector 'identity' changes no width: the vision features have {self.fused_hidden_size} channels, "
                f"the language model expects {self.text_hidden_size}. Use 'linear' to match them."
            )

    @property
    def reads_patch_map(self) -> bool:
        return False

    def num_output_tokens(self, grid: PatchGrid) -> int:
        return self.num_input_tokens(grid)

    def token_grid(self, grid: PatchGrid) -> PatchGrid | None:
        return None if self.keep_cls_token else grid


@register_projector(
    "identity",
    config=IdentityConfig,
    summary="Passes the vision features on unchanged; the two widths must be equal.",
    paper="https://arxiv.org/abs/2304.08485",
    token_formula="H * W + keep_cls_token",
)
class IdentityProjector(Projector):
    """Returns the features, several layers concatenated along the channels. Holds no parameters.

    Source: LLaVA `llava/model/multimodal_projector/builder.py` (Apache-2.0).
    """

    def reset_parameters(self) -> None:
        """There are none."""

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        return concatenate_layers(features)
