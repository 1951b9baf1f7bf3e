"""LDP against MobileVLM's formula, written with torch's functions on the original's keys."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from projectors import PatchGrid, load_projector_state_dict, projector_spec, select_projector
from projectors.conformance import check_projector
from projectors.ldp import squeezed_width


def build(vision_hidden_size=6, text_hidden_size=10, **options):
    """With every parameter random, scaled so that the gates leave their flat ends."""
    selection = select_projector("ldp", options)
    sizes = {"vision_hidden_size": vision_hidden_size, "text_hidden_size": text_hidden_size}
    projector = selection.build(selection.build_config(**sizes)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.normal_(0, 0.5)
    return projector


def channel_norm(feature_map, weights, name):
    normed = functional.layer_norm(
        feature_map.movedim(1, 3), feature_map.shape[1:2], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5
    )
    return normed.movedim(3, 1)


def inverted_residual(feature_map, weights, name, stride):
    depthwise = functional.conv2d(
        feature_map, weights[f"{name}.0.0.weight"], stride=stride, padding=1, groups=feature_map.shape[1]
    )
    hidden = functional.hardswish(channel_norm(depthwise, weights, f"{name}.0.1"))
    gate = functional.adaptive_avg_pool2d(hidden, 1)
    gate = functional.relu(functional.conv2d(gate, weights[f"{name}.1.fc1.weight"], weights[f"{name}.1.fc1.bias"]))
    gate = functional.conv2d(gate, weights[f"{name}.1.fc2.weight"], weights[f"{name}.1.fc2.bias"])
    projected = functional.conv2d(hidden * functional.hardsigmoid(gate), weights[f"{name}.2.0.weight"])
    return channel_norm(projected, weights, f"{name}.2.1")


def mobilevlm(weights, tokens, grid):
    hidden = functional.linear(tokens, weights["model.mlp.1.weight"], weights["model.mlp.1.bias"])
    hidden = functional.linear(functional.gelu(hidden), weights["model.mlp.3.weight"], weights["model.mlp.3.bias"])
    feature_map = hidden.transpose(1, 2).reshape(len(tokens), -1, grid.height, grid.width)
    feature_map = feature_map + inverted_residual(feature_map, weights, "model.mb_block.1.block", 1)
    feature_map = inverted_residual(feature_map, weights, "model.mb_block.2.block", 2)
    return feature_map.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    "grid, vision_hidden_size, text_hidden_size",
    [(PatchGrid(4, 4), 6, 10), (PatchGrid(4, 6), 6, 10), (PatchGrid(7, 5), 8, 24), (PatchGrid(1, 3), 12, 40)],
)
def test_output_is_mobilevlms(grid, vision_hidden_size, text_hidden_size):
    projector = build(vision_hidden_size, text_hidden_size)
    tokens = torch.randn(2, grid.num_patches, vision_hidden_size)
    weights = projector.to_original_state_dict(projector.state_dict())
    # Outputs of unit scale behind a LayerNorm; 1x1 convolutions are summed in another order.
    expected = mobilevlm(weights, tokens, grid)
    torch.testing.assert_close(projector([tokens], grid), expected, rtol=0, atol=1e-5)


def test_a_patch_reaches_its_neighbours_alone_where_the_gates_are_fixed():
    """Square on purpose: exchanged rows and columns would change other tokens, and no shape."""
    projector, tokens, other = build(), torch.randn(1, 64, 6), torch.randn(6)
    with torch.no_grad():
        for block in projector.blocks:
            block.squeeze_excite.fc2.weight.zero_()
    before = projector([tokens], PatchGrid(8, 8))
    tokens[0, 7] = other  # row 0, column 7: rows 0 and 1, columns 6 and 7 behind the first block
    differs = (projector([tokens], PatchGrid(8, 8)) - before)[0].abs().amax(1) > 1e-4
    assert differs.nonzero().flatten().tolist() == [0 * 4 + 3, 1 * 4 + 3]


@pytest.mark.parametrize(
    "channels, width", [(4096, 1024), (48, 16), (40, 16), (24, 8), (10, 8), (88, 24), (2560, 640), (368, 96)]
)
def test_squeeze_is_mobilenets_multiple_of_eight(channels, width):
    # By hand: 40 -> 10 -> 8, which is below 0.9 * 10, so 16; 88 -> 22 -> 24; 368 -> 92 -> 96.
    assert squeezed_width(channels) == width


@pytest.mark.parametrize(
    "grid, num_tokens",
    [(PatchGrid(24, 24), 144), (PatchGrid(27, 27), 196), (PatchGrid(18, 18), 81), (PatchGrid(9, 4), 10)],
)
def test_each_side_is_halved_and_rounded_up(grid, num_tokens):
    assert build().config.num_output_tokens(grid) == num_tokens


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", ""])
def test_checkpoints_of_the_original_load(prefix):
    source, target = build(), build()
    theirs = {
        prefix + key: torch.randn_like(tensor)
        for key, tensor in source.to_original_state_dict(source.state_dict()).items()
    }
    assert theirs[f"{prefix}model.mb_block.2.block.2.0.weight"].shape == (10, 10, 1, 1)
    others = {"model.layers.0.mlp.gate_proj.weight": torch.zeros(3)} if prefix else {}
    load_projector_state_dict(target, theirs | others)
    back = target.to_original_state_dict(target.state_dict())
    assert set(back) == {key.removeprefix(prefix) for key in theirs}
    assert all(torch.equal(back[key.removeprefix(prefix)], tensor) for key, tensor in theirs.items())


def test_mobilevlms_name_is_an_alias():
    assert projector_spec("ldpnet").name == "ldp"


def test_several_layers_keep_the_contract():
    check_projector("ldp", {"vision_layers": [1, 2]}).raise_if_failed()
