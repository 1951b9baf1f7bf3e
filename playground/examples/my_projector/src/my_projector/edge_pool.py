"""Edge-weighted pooling with coordinates: two layers of the tower with two different roles.

Of the patches in a window, those that differ from their surroundings count most, and the token says where they are. The
module imports only what `projectors` exports, so it works installed, on PYTHONPATH and as a single file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from projectors import (
    PatchGrid,
    Projector,
    ProjectorConfig,
    ProjectorError,
    ProjectorPreset,
    option,
    register_projector,
)
from projectors.layers import (
    build_mlp,
    map_to_tokens,
    ones_,
    pad_to_windows,
    reset_module,
    split_windows,
    tokens_to_map,
)

_CLIP_L_DEPTH = 24
_NO_CONTRAST = 1e-6


@dataclass(frozen=True, kw_only=True)
class EdgePoolConfig(ProjectorConfig):
    """Each field is an option: --mm_projector_options factor=3,pooling=average

    vision_layers are exactly two: a shallow one, which still sees edges, and a deep one, which knows what they are.
    """

    factor: int = option(2, "side of the window of patches that becomes one token", minimum=1)
    pooling: Literal["edges", "average"] = option(
        "edges", "how the patches of a window are weighed: by the shallow layer's contrast, or all alike"
    )
    coordinates: bool = option(True, "append the row and column of what was pooled, from -1 to 1")
    depth: int = option(2, "Linear layers of the read-out, with GELU between each two", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_cls_token()
        if len(self.vision_layers) != 2:
            raise ProjectorError(
                f"EdgePoolConfig.vision_layers: got {len(self.vision_layers)} ({self.vision_layers}), expected 2: a "
                "shallow layer for the edges, then a deep one"
            )

    @classmethod
    def default_vision_layers(
        cls, num_vision_layers: int | None = None, options: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[int, ...]:
        """The middle of the tower and the layer before the last: 12 and 23 of CLIP-L's 24."""
        depth = _CLIP_L_DEPTH if num_vision_layers is None else num_vision_layers
        return depth // 2, depth - 1

    def padded_grid(self, grid: PatchGrid) -> PatchGrid:
        """The grid with both sides rounded up to whole windows."""
        self.num_input_tokens(grid)  # refuses an empty grid
        return PatchGrid(*(-(-side // self.factor) * self.factor for side in grid))

    def token_grid(self, grid: PatchGrid) -> PatchGrid:
        """The tokens form a map, so that images shown in several crops can be put together again."""
        padded = self.padded_grid(grid)
        return PatchGrid(padded.height // self.factor, padded.width // self.factor)

    def num_output_tokens(self, grid: PatchGrid) -> int:
        return self.token_grid(grid).num_patches


@register_projector(
    "edge_pool",
    config=EdgePoolConfig,
    summary="Pools windows of patches weighted by the contrast of a shallower layer, and tells each token where it is.",
    paper="https://arxiv.org/abs/1807.03247",
    token_formula="ceil(H / factor) * ceil(W / factor)",
    presets={
        "edge_pool_average": ProjectorPreset({"pooling": "average"}, "Ablation: all patches of a window count alike."),
        # `factor` is what the name means; the deeper read-out is only where one starts from.
        "edge_pool_coarse": ProjectorPreset({"factor": 4}, "One token for 4 x 4 patches.", defaults={"depth": 3}),
    },
)
class EdgePool(Projector):
    """Two layers -> windows -> weighted means -> an MLP::

        contrast = mean over channels of (shallow - mean of its 3x3 neighbourhood)^2, relative to the image's mean
        weights  = softmax(sharpness * contrast) within each window; sharpness is learned and begins at 1
        token    = MLP(sum of weights * [shallow, deep, row, column])

    As the coordinates are weighed like the features, they say where inside the window the edge is. The idea of
    coordinates as channels is CoordConv's (arXiv 1807.03247).
    """

    def __init__(self, config: EdgePoolConfig) -> None:
        super().__init__(config)
        # Made only where it is used: a parameter without a gradient would stall distributed training.
        # Of shape (1,): DeepSpeed cannot broadcast a parameter without dimensions.
        self.sharpness = nn.Parameter(torch.empty(1)) if config.pooling == "edges" else None
        channels = config.fused_hidden_size + (2 if config.coordinates else 0)
        self.readout = build_mlp(channels, config.text_hidden_size, config.depth)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sharpness 1; PyTorch's default for the read-out. Every parameter, since no checkpoint has them at first."""
        ones_(self.sharpness)
        self.readout.apply(reset_module)

    def forward(self, features: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        self.check_features(features, grid)
        shallow, deep = features
        parts = [shallow, deep]
        if self.config.coordinates:
            parts.append(patch_coordinates(grid, deep).expand(deep.shape[0], -1, -1))
        if self.sharpness is None:
            return self.readout(self._windows(torch.cat(parts, dim=2), grid).mean(dim=2))
        # The contrast travels as one more channel, so that it is cut into the same windows.
        windows = self._windows(torch.cat([*parts, relative_contrast(shallow, grid)], dim=2), grid)
        weights = (self.sharpness * windows[..., -1:]).softmax(dim=2)
        return self.readout((weights * windows[..., :-1]).sum(dim=2))

    def _windows(self, tokens: Tensor, grid: PatchGrid) -> Tensor:
        """(B, H*W, channels) -> (B, windows, factor**2, channels); the last row and column fill the last windows."""
        factor = self.config.factor
        return split_windows(pad_to_windows(tokens, grid, factor), self.config.padded_grid(grid), factor)

    def convert_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keys of an earlier program, fc1, fc2, ... and edge_gain -> readout.0, readout.2, ... and sharpness.

        Sharpness may be stored as a scalar, which it once was here too.
        """

        def renamed(key: str) -> str:
            key = re.sub(r"^fc(\d+)\.", lambda match: f"readout.{2 * (int(match[1]) - 1)}.", key)
            return "sharpness" if key == "edge_gain" else key

        converted = {renamed(key): tensor for key, tensor in state_dict.items()}
        if "sharpness" in converted:
            converted["sharpness"] = converted["sharpness"].reshape(1)
        return converted

    def to_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        def renamed(key: str) -> str:
            key = re.sub(r"^readout\.(\d+)\.", lambda match: f"fc{int(match[1]) // 2 + 1}.", key)
            return "edge_gain" if key == "sharpness" else key

        return {renamed(key): tensor for key, tensor in state_dict.items()}


def patch_coordinates(grid: PatchGrid, like: Tensor) -> Tensor:
    """Row and column of each patch's centre, (1, H*W, 2), from -1 (first edge) to 1 (last edge) of the image."""
    rows, columns = (
        (torch.arange(side, device=like.device, dtype=torch.float32) + 0.5) * (2 / side) - 1 for side in grid
    )
    coordinates = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=2)
    return coordinates.flatten(0, 1)[None].to(like.dtype)


def relative_contrast(tokens: Tensor, grid: PatchGrid) -> Tensor:
    """How much each patch differs from its neighbourhood, (B, H*W, 1), with mean 1; all 0 on a flat image."""
    patches = tokens_to_map(tokens, grid)
    around = functional.avg_pool2d(patches, 3, stride=1, padding=1, count_include_pad=False)
    contrast = map_to_tokens((patches - around).square()).mean(dim=2, keepdim=True)
    return contrast / (contrast.mean(dim=1, keepdim=True) + _NO_CONTRAST)
