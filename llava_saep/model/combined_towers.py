"""Several vision towers side by side, seen from outside as one whose features are all of theirs (MoF, Prismatic).

All look at the same pixels: images are prepared once, for the first tower, and each other one gets them normalised its
own way. So they must cut an image into the same patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from llava_saep.errors import UserError

RESIZABLE_TOWERS = ("dinov2", "dinov2_with_registers", "dinov3_vit")
"""Towers that fit their position embeddings to whatever image comes."""


def split_tower_names(names: str) -> list[str]:
    """Split what `--vision_tower` names at commas; a folder whose name has one stays whole."""
    return [names] if Path(names).exists() else [name.strip() for name in names.split(",")]


@strict
class CombinedVisionConfig(PreTrainedConfig):
    """The towers' configs, and how each wants its pixels.

    Args:
        towers: the configs as dictionaries with their model_type, in the order of their channels.
        image_means, image_stds: per tower, three numbers; the first tower's are those of the pixel values.
    """

    model_type = "combined_vision_towers"

    towers: list[dict[str, Any]] | None = None
    image_means: list[list[float]] | None = None
    image_stds: list[list[float]] | None = None

    @property
    def tower_configs(self) -> list[PreTrainedConfig]:
        """The towers' own configs."""
        return [AutoConfig.for_model(**tower) for tower in self.towers or []]

    @property
    def hidden_size(self) -> int:
        """Channels of all towers together."""
        return sum(config.hidden_size for config in self.tower_configs)

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of the shallowest; a layer counted from the end is counted so in each tower."""
        return min(config.num_hidden_layers for config in self.tower_configs)

    @property
    def patch_size(self) -> int:
        """The side of a patch in pixels, the same in all."""
        return self.tower_configs[0].patch_size

    @property
    def image_size(self) -> int:
        """The side in pixels of the images that the first tower was trained on."""
        return self.tower_configs[0].image_size


def combine_vision_configs(
    names: Sequence[str], configs: Sequence[PreTrainedConfig], image_processors: Sequence[Any], side: int
) -> CombinedVisionConfig:
    """Put towers side by side.

    Args:
        names: what the user calls them, for messages.
        side: of the images that the first tower's processor makes, in pixels.
    Raises:
        UserError: their patches are not the same parts of an image.
    """
    for name, config in zip(names, configs, strict=True):
        if config.patch_size != configs[0].patch_size:
            raise UserError(
                f"--vision_tower: {names[0]} has patches of {configs[0].patch_size} pixels and {name} of "
                f"{config.patch_size}; towers side by side need the same"
            )
        if config.model_type not in RESIZABLE_TOWERS and config.image_size != side:
            raise UserError(
                f"--vision_tower: {name} takes images of {config.image_size} pixels only, but those that {names[0]} "
                f"gets have {side}; put the tower with the fixed size first, or choose towers of one size"
            )
    return CombinedVisionConfig(
        towers=[config.to_dict() for config in configs],
        image_means=[list(map(float, processor.image_mean)) for processor in image_processors],
        image_stds=[list(map(float, processor.image_std)) for processor in image_processors],
    )


class CombinedVisionTowers(PreTrainedModel):
    """The towers' modules; `llava_saep.model.vision_tower` reads them one by one."""

    config: CombinedVisionConfig
    config_class = CombinedVisionConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: CombinedVisionConfig):
        super().__init__(config)
        self.towers = nn.ModuleList(AutoModel.from_config(tower) for tower in config.tower_configs)
        self.post_init()

    def inputs_of_towers(self, pixel_values: Tensor) -> list[Tensor]:
        """Normalise pixel values (images, 3, height, width), which are so for the first tower, for each of them."""
        means = torch.tensor(self.config.image_means, device=pixel_values.device)[:, None, :, None, None]
        stds = torch.tensor(self.config.image_stds, device=pixel_values.device)[:, None, :, None, None]
        # In float32: bfloat16 would round once more.
        others = (pixel_values.float() * stds[0] + means[0] - means[1:]) / stds[1:]
        return [pixel_values, *others]
