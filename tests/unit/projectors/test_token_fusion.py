"""LLaVA-STF's fusion against torch's unfold on the original's keys."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from projectors import PatchGrid, ProjectorError, load_projector_state_dict, projector_spec, select_projector
from projectors.conformance import check_projector


def build(seed=0, num_vision_layers=24, **options):
    selection = select_projector("token_fusion", {"fusion_hidden_multiplier": 2} | options)
    torch.manual_seed(seed)
    return selection.build(
        selection.build_config(vision_hidden_size=6, text_hidden_size=10, num_vision_layers=num_vision_layers)
    ).eval()


def default_layers(num_vision_layers):
    config_class = projector_spec("token_fusion").config_class
    return config_class.default_vision_layers(num_vision_layers)


def mlp(weights, name, tokens):
    hidden = functional.gelu(functional.linear(tokens, weights[f"{name}.0.weight"], weights[f"{name}.0.bias"]))
    return functional.linear(hidden, weights[f"{name}.2.weight"], weights[f"{name}.2.bias"])


def llava_stf(weights, features, grid, factor):
    fused = mlp(weights, "mm_projector_crosslayer", torch.cat(features, dim=2))
    feature_map = fused.transpose(1, 2).reshape(len(fused), -1, grid.height, grid.width)
    windows = functional.unfold(feature_map, factor, stride=factor).transpose(1, 2)
    return mlp(weights, "mm_projector", windows)


@pytest.mark.parametrize(
    "grid, factor", [(PatchGrid(4, 4), 2), (PatchGrid(2, 6), 2), (PatchGrid(6, 3), 3), (PatchGrid(2, 3), 1)]
)
def test_output_is_llava_stfs(grid, factor):
    projector = build(factor=factor)
    features = [torch.randn(2, grid.num_patches, 6) for _ in range(8)]
    weights = projector.to_original_state_dict(projector.state_dict())
    # Unit scale in float32, the same products in the same order.
    expected = llava_stf(weights, features, grid, factor)
    torch.testing.assert_close(projector(features, grid), expected, rtol=0, atol=1e-5)


def test_padding_repeats_the_last_row_and_column():
    projector = build(pad_grid=True)
    features = [torch.randn(1, 15, 6) for _ in range(8)]
    maps = [tokens.transpose(1, 2).reshape(1, 6, 3, 5) for tokens in features]
    padded = [functional.pad(each, (0, 1, 0, 1), mode="replicate").flatten(2).transpose(1, 2) for each in maps]
    weights = projector.to_original_state_dict(projector.state_dict())
    expected = llava_stf(weights, padded, PatchGrid(4, 6), 2)
    torch.testing.assert_close(projector(features, PatchGrid(3, 5)), expected, rtol=0, atol=1e-5)
    with pytest.raises(ProjectorError, match="3x5 grid cannot be cut into windows of 2x2"):
        build()(features, PatchGrid(3, 5))


def test_inner_widths_are_multiples_of_the_towers():
    projector = build(fusion_hidden_multiplier=3, readout_hidden_multiplier=5, factor=3)
    shapes = [tuple(part[index].weight.shape) for part in (projector.fusion, projector.readout) for index in (0, 2)]
    assert shapes == [(18, 48), (6, 18), (30, 54), (10, 30)]


@pytest.mark.parametrize(
    "num_vision_layers, layers",
    [
        (24, (23, 21, 18, 15, 12, 9, 6, 3)),
        (None, (23, 21, 18, 15, 12, 9, 6, 3)),
        (48, (47, 42, 36, 30, 24, 18, 12, 6)),
        (27, (26, 24, 21, 17, 14, 11, 7, 4)),
        (12, (11, 9, 8, 6, 5, 3, 2)),  # 21/24 of 12 is 10.5, rounded up the selected layer itself
        (6, (5, 4, 3, 2, 1)),
        (1, (0,)),
    ],
)
def test_other_towers_are_read_at_the_same_relative_depths_each_layer_once(num_vision_layers, layers):
    assert default_layers(num_vision_layers) == layers


def test_layers_of_any_tower_run_from_deep_to_shallow_without_repeats():
    for num_vision_layers in range(1, 60):
        layers = default_layers(num_vision_layers)
        assert list(layers) == sorted(set(layers), reverse=True)
        assert layers[0] == num_vision_layers - 1 and len(layers) <= 8
        assert num_vision_layers < 16 or len(layers) == 8


def test_layers_the_user_names_are_read_instead():
    projector = build(vision_layers=[-2, 2])
    assert projector.fusion[0].in_features == 12
    assert projector([torch.randn(1, 4, 6)] * 2, PatchGrid(2, 2)).shape == (1, 1, 10)


@pytest.mark.parametrize("prefix", ["model.", "base_model.model.model.", ""])
def test_both_parts_load_from_a_whole_models_state_dict(prefix):
    source, target = build(), build(seed=1)
    theirs = {prefix + key: value for key, value in source.to_original_state_dict(source.state_dict()).items()}
    assert {key.removeprefix(prefix).split(".")[0] for key in theirs} == {"mm_projector_crosslayer", "mm_projector"}
    others = {f"{prefix}layers.0.mlp.up_proj.weight": torch.zeros(3), f"{prefix}embed_tokens.weight": torch.zeros(3)}
    load_projector_state_dict(target, theirs | others)
    assert all(torch.equal(target.state_dict()[key], tensor) for key, tensor in source.state_dict().items())


def test_weights_of_another_projector_are_refused():
    source = build()
    theirs = source.to_original_state_dict(source.state_dict())
    without_fusion = {f"model.{key}": value for key, value in theirs.items() if "crosslayer" not in key}
    with pytest.raises(ProjectorError, match="Missing: fusion"):
        load_projector_state_dict(build(), without_fusion)
    with pytest.raises(ProjectorError, match="Unexpected: readout.4"):
        load_projector_state_dict(build(), theirs | {"mm_projector.4.weight": torch.zeros(3)})


def test_the_papers_name_is_an_alias():
    assert projector_spec("llava_stf").name == "token_fusion"


@pytest.mark.parametrize("options", [{"factor": 1}, {"pad_grid": True, "factor": 4}, {"vision_layers": [-2]}], ids=str)
def test_options_keep_the_contract(options):
    check_projector("token_fusion", options).raise_if_failed()
