"""Patch features: the right layers, without prefix tokens, and no deeper than needed."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_saep.errors import UserError
from llava_saep.model.vision_tower import find_layers, num_prefix_tokens, read_patch_features, unused_tower_parameters

SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 24, "patch_size": 6}
TOWERS = {
    "clip": (CLIPVisionModel, CLIPVisionConfig(**SIZES, intermediate_size=32), 1),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**SIZES, intermediate_size=32), 0),
    "dinov2": (Dinov2Model, Dinov2Config(**SIZES, mlp_ratio=2), 1),
    "dinov2_registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2), 5),
}


def make_tower(name):
    torch.manual_seed(0)
    tower_class, config, prefix = TOWERS[name]
    return tower_class(config).eval(), prefix


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("layers", [(-2,), (1, 3), (-1,), (0, 2), (4, 1)])
def test_features_equal_those_of_the_whole_tower(name, layers):
    tower, prefix = make_tower(name)
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states
    features = read_patch_features(tower, pixels, layers, keep_cls_token=False)
    for layer, feature in zip(layers, features, strict=True):
        # The same operations on the same numbers: no tolerance.
        assert torch.equal(feature, expected[layer][:, prefix:])
        assert feature.shape == (2, 16, 16)


def test_class_token_leads_and_registers_are_dropped():
    tower, _ = make_tower("dinov2_registers")
    pixels = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[2]
    (feature,) = read_patch_features(tower, pixels, (2,), keep_cls_token=True)
    assert torch.equal(feature, torch.cat([hidden[:, :1], hidden[:, 5:]], dim=1))


def test_layers_beyond_the_deepest_one_read_do_not_run():
    tower, _ = make_tower("clip")
    owner, name = find_layers(tower, 4)
    calls = []
    for index, block in enumerate(getattr(owner, name)):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    read_patch_features(tower, torch.randn(1, 3, 24, 24), (1, 2), keep_cls_token=False)
    assert calls == [0, 1]
    assert len(getattr(owner, name)) == 4


def test_frozen_tower_builds_no_graph_and_a_trainable_one_does():
    tower, _ = make_tower("clip")
    (feature,) = read_patch_features(tower, torch.randn(1, 3, 24, 24), (-2,), keep_cls_token=False)
    assert feature.requires_grad
    tower.requires_grad_(False)
    (feature,) = read_patch_features(tower, torch.randn(1, 3, 24, 24), (-2,), keep_cls_token=False)
    assert not feature.requires_grad


def test_unused_parameters_are_exactly_those_without_gradient():
    tower, _ = make_tower("clip")
    features = read_patch_features(tower, torch.randn(1, 3, 24, 24), (1, -2), keep_cls_token=False)
    sum(feature.sum() for feature in features).backward()
    without_gradient = {id(p) for p in tower.parameters() if p.grad is None}
    assert {id(p) for p in unused_tower_parameters(tower, (1, -2))} == without_gradient


def test_unknown_tower_is_refused_with_the_list():
    config = CLIPVisionConfig()
    config.model_type = "strange"
    with pytest.raises(UserError, match="'strange' is not supported; supported: clip_vision_model"):
        num_prefix_tokens(config)
