"""What differs between vision towers: prefix tokens, where the layers live, and how deep they must run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llava_saep.data.images import ImageSize
from llava_saep.errors import UserError
from llava_saep.model.combined_towers import CombinedVisionConfig, CombinedVisionTowers

PREFIX_TOKENS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "siglip": 0,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "vit": 1,
}
"""Class tokens that a tower puts before its patches; registers come on top (`num_register_tokens`)."""


class VisionFeatures(NamedTuple):
    """What a tower sees in the images of a batch, all crops of all images in one run.

    Attributes:
        layers: one (crops, patches, channels) tensor per layer that the projector reads.
        crop_counts: crops of each image; None where images are not cut, one crop being one image.
        view: size of a crop in pixels.
    """

    layers: tuple[Tensor, ...]
    crop_counts: tuple[int, ...] | None
    view: ImageSize


def num_prefix_tokens(vision_config: PreTrainedConfig) -> int:
    """Count the tokens before the first patch: CLIP 1, SigLIP 0, DINOv2 1, DINOv2 with registers 1 + 4.

    Of several towers side by side, the fewest of any.

    Raises:
        UserError: the tower's model type is not known here.
    """
    if isinstance(vision_config, CombinedVisionConfig):
        return min(num_prefix_tokens(config) for config in vision_config.tower_configs)
    if vision_config.model_type not in PREFIX_TOKENS:
        known = ", ".join(sorted(PREFIX_TOKENS))
        raise UserError(f"vision tower of type {vision_config.model_type!r} is not supported; supported: {known}")
    return PREFIX_TOKENS[vision_config.model_type] + getattr(vision_config, "num_register_tokens", 0)


def has_class_token(vision_config: PreTrainedConfig) -> bool:
    """Say whether the tower's first token summarises the image (CLIP, DINOv2: yes; SigLIP: no)."""
    return num_prefix_tokens(vision_config) > 0


def resolve_layer(layer: int, num_layers: int) -> int:
    """Turn an index into hidden_states (num_layers + 1 entries, 0 = embeddings) into a non-negative one."""
    return layer if layer >= 0 else num_layers + 1 + layer


def resolve_layers(vision_config: PreTrainedConfig, layers: Sequence[int]) -> list[list[int]]:
    """Turn indices into hidden_states into non-negative ones, for each of the towers."""
    is_combined = isinstance(vision_config, CombinedVisionConfig)
    configs = vision_config.tower_configs if is_combined else [vision_config]
    return [[resolve_layer(layer, config.num_hidden_layers) for layer in layers] for config in configs]


def find_layers(tower: nn.Module, num_layers: int) -> tuple[nn.Module, str] | None:
    """Find the module list that holds the transformer blocks, as (owner, attribute name)."""
    for owner in tower.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == num_layers:
                return owner, name
    return None


@contextmanager
def run_only_to(tower: PreTrainedModel, depth: int) -> Iterator[None]:
    """Inside the block the tower runs its first `depth` blocks and skips the rest; weights stay where they are."""
    found = find_layers(tower, tower.config.num_hidden_layers)
    if found is None or depth >= tower.config.num_hidden_layers:
        yield
        return
    owner, name = found
    layers = owner._modules[name]
    owner._modules[name] = layers[: max(depth, 1)]  # hidden_states[0] is recorded by the first block
    try:
        yield
    finally:
        owner._modules[name] = layers


def is_frozen(module: nn.Module) -> bool:
    """True when no parameter of the module wants a gradient."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def unused_tower_parameters(tower: PreTrainedModel, layers: Sequence[int]) -> Iterator[nn.Parameter]:
    """Yield the parameters that take no part when only `layers` are read: deeper blocks and the final norm and head."""
    if isinstance(tower, CombinedVisionTowers):
        for single in tower.towers:
            yield from unused_tower_parameters(single, layers)
        return
    num_layers = tower.config.num_hidden_layers
    depth = max(resolve_layer(layer, num_layers) for layer in layers)
    found = find_layers(tower, num_layers)
    if found is None:
        return
    for block in found[0]._modules[found[1]][depth:]:
        yield from block.parameters()
    for name in ("post_layernorm", "layernorm", "norm", "head"):
        if isinstance(getattr(tower, name, None), nn.Module):
            yield from getattr(tower, name).parameters()


def read_patch_features(
    tower: PreTrainedModel, pixel_values: Tensor, layers: Sequence[int], keep_cls_token: bool
) -> list[Tensor]:
    """Run the tower as deep as the deepest layer asked for and return those layers' patch tokens.

    Args:
        tower: a vision model of transformers; runs under no_grad when every parameter is frozen. Of several towers
            side by side, each reads the layers in its own numbering, and their channels are joined.
        pixel_values: (images, 3, height, width).
        layers: indices into hidden_states, negative ones counted from the end.
        keep_cls_token: put the class token in front of the patches.
    Returns:
        one (images, patches (+1), channels) tensor per entry of `layers`.
    """
    if isinstance(tower, CombinedVisionTowers):
        inputs = zip(tower.towers, tower.inputs_of_towers(pixel_values), strict=True)
        parts = [read_patch_features(single, pixels, layers, keep_cls_token) for single, pixels in inputs]
        return [torch.cat(features, dim=2) for features in zip(*parts, strict=True)]
    num_layers = tower.config.num_hidden_layers
    absolute = [resolve_layer(layer, num_layers) for layer in layers]
    pixel_values = pixel_values.to(tower.dtype)
    with run_only_to(tower, max(absolute)), torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(tower)):
        hidden_states = tower(pixel_values, output_hidden_states=sorted(set(absolute))).hidden_states
    prefix = num_prefix_tokens(tower.config)
    features = []
    for layer in absolute:
        patches = hidden_states[layer][:, prefix:]
        if keep_cls_token:
            patches = torch.cat([hidden_states[layer][:, :1], patches], dim=1)
        features.append(patches)
    return features
