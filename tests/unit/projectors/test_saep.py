"""SAEP against its written formula, its documented sizes, and its default layers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from projectors import PatchGrid, select_projector

GRID = PatchGrid(5, 6)


def build(**options):
    selection = select_projector("saep", {"vision_layers": [0, 1], **options})
    torch.manual_seed(0)
    projector = selection.build(selection.build_config(vision_hidden_size=8, text_hidden_size=12)).eval()
    if options.get("init") is None:
        with torch.no_grad():
            for parameter in projector.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return projector


def random_features(grid=GRID):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, grid.num_patches, 8, generator=generator) for _ in range(2)]


def as_map(tokens, grid=GRID):
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, grid.height, grid.width)


def channel_norm(feature_map, norm):
    normed = functional.layer_norm(feature_map.movedim(1, -1), norm.normalized_shape, norm.weight, norm.bias, 1e-6)
    return normed.movedim(-1, 1)


def pointwise(feature_map, unit):
    weight = unit.conv.weight[:, :, None, None]
    return channel_norm(functional.conv2d(feature_map, weight, unit.conv.bias), unit.norm)


def depthwise(feature_map, unit, stride=2):
    channels = feature_map.shape[1]
    filtered = functional.conv2d(feature_map, unit.conv.weight, unit.conv.bias, stride, padding=1, groups=channels)
    return channel_norm(filtered, unit.norm)


def read_out(block, projector):
    tokens = block.flatten(2).transpose(1, 2)
    first, _, second = projector.readout
    return functional.linear(
        functional.gelu(functional.linear(tokens, first.weight, first.bias)), second.weight, second.bias
    )


def padded(feature_map):
    return functional.pad(feature_map, (0, feature_map.shape[3] % 2, 0, feature_map.shape[2] % 2), mode="replicate")


def test_default_is_the_documented_formula():
    projector, features = build(), random_features()
    x = padded(torch.cat([as_map(tokens) for tokens in features], dim=1))
    x = functional.gelu(pointwise(x, projector.block.fuse))
    y = depthwise(x, projector.block.spatial) + functional.avg_pool2d(x, 2)
    # 1e-5: float32 at unit scale, the same operations in another memory layout.
    torch.testing.assert_close(projector(features, GRID), read_out(y, projector), rtol=0, atol=1e-5)


def test_depthwise_first_is_the_documented_formula():
    projector, features = build(order="dw_pw"), random_features()
    x = padded(torch.cat([as_map(tokens) for tokens in features], dim=1))
    y = depthwise(x, projector.block.spatial) + functional.avg_pool2d(x, 2)
    y = functional.gelu(pointwise(y, projector.block.fuse))
    torch.testing.assert_close(projector(features, GRID), read_out(y, projector), rtol=0, atol=1e-5)


def test_second_pointwise_is_inside_the_shortcut():
    projector, features = build(order="pw_dw_pw"), random_features()
    x = padded(torch.cat([as_map(tokens) for tokens in features], dim=1))
    x = functional.gelu(pointwise(x, projector.block.fuse))
    y = pointwise(depthwise(x, projector.block.spatial), projector.block.project) + functional.avg_pool2d(x, 2)
    torch.testing.assert_close(projector(features, GRID), read_out(y, projector), rtol=0, atol=1e-5)


def test_last_layer_shortcut_adds_the_pooled_deepest_layer():
    with_shortcut, without = build(shortcut="last_layer_avgpool"), build(shortcut="none")
    features = random_features()
    blocks = []
    for projector in (with_shortcut, without):
        projector.readout = torch.nn.Identity()
        blocks.append(projector(features, GRID))
    pooled = functional.avg_pool2d(padded(as_map(features[-1])), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(blocks[0] - blocks[1], pooled, rtol=0, atol=1e-5)


def test_zero_residual_starts_as_average_pooling_of_the_fused_layers():
    projector, features = build(init="zero_residual"), random_features()
    x = padded(torch.cat([as_map(tokens) for tokens in features], dim=1))
    x = functional.avg_pool2d(functional.gelu(pointwise(x, projector.block.fuse)), 2)
    torch.testing.assert_close(projector(features, GRID), read_out(x, projector), rtol=0, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["sum", "softmax"])
def test_layers_are_added_with_their_weights(aggregation):
    projector, features = build(aggregation=aggregation), random_features()
    weights = torch.ones(2)
    if aggregation == "softmax":
        weights = torch.softmax(projector.aggregation.layer_logits.detach(), 0)
        assert weights[0] != weights[1]
    expected = weights[0] * as_map(features[0]) + weights[1] * as_map(features[1])
    torch.testing.assert_close(projector.aggregation(features, GRID)[0], expected, rtol=0, atol=1e-5)


def test_softmax_aggregation_starts_as_the_mean():
    projector, features = build(aggregation="softmax", init="default"), random_features()
    mean = (as_map(features[0]) + as_map(features[1])) / 2
    torch.testing.assert_close(projector.aggregation(features, GRID)[0], mean, rtol=0, atol=1e-6)


def test_depthwise_concat_filters_each_layer_before_they_meet():
    projector, features = build(aggregation="depthwise_concat"), random_features()
    filters = projector.aggregation.layer_filters
    expected = torch.cat(
        [depthwise(as_map(tokens), unit, stride=1) for tokens, unit in zip(features, filters, strict=True)], dim=1
    )
    torch.testing.assert_close(projector.aggregation(features, GRID)[0], expected, rtol=0, atol=1e-5)


def test_input_norm_and_positions_act_on_each_layer():
    projector, features = build(input_norm=True, positions="learned", position_grid=[5, 6]), random_features()
    norms, positions = projector.aggregation.input_norms, projector.aggregation.positions.embedding
    expected = torch.cat(
        [
            as_map(functional.layer_norm(tokens, (8,), norm.weight, norm.bias, 1e-6) + positions)
            for tokens, norm in zip(features, norms, strict=True)
        ],
        dim=1,
    )
    torch.testing.assert_close(projector.aggregation(features, GRID)[0], expected, rtol=0, atol=1e-5)


def test_kernel_one_sees_no_neighbours_and_kernel_three_does():
    for kernel_size, sees_neighbours in ((1, False), (3, True)):
        projector, features = build(kernel_size=kernel_size), random_features(PatchGrid(4, 4))
        before = projector(features, PatchGrid(4, 4))
        features[0][:, 5] += 1.0  # row 1, column 1: the last of the first 2x2 block
        changed = (projector(features, PatchGrid(4, 4)) - before).abs().amax((0, 2)) > 1e-6
        assert changed.tolist() == [True, sees_neighbours, sees_neighbours, sees_neighbours]


@pytest.mark.parametrize(
    "options, grid, tokens",
    [
        ({}, (24, 24), 144),
        ({}, (27, 27), 196),
        ({}, (24, 18), 108),
        ({"stride": 1}, (24, 24), 576),
        ({"stride": 3}, (24, 24), 64),
        ({"stride": 4}, (24, 24), 36),
    ],
)
def test_token_counts(options, grid, tokens):
    config = select_projector("saep", options).build_config(vision_hidden_size=1024, text_hidden_size=4096)
    assert config.num_output_tokens(PatchGrid(*grid)) == tokens


@pytest.mark.parametrize(
    "num_vision_layers, layers",
    [
        (None, (12, 16, 22, 23)),
        (24, (12, 16, 22, 23)),
        (12, (6, 8, 11, 12)),
        (27, (14, 18, 25, 26)),
        (4, (2, 3, 4)),
        (2, (1, 2)),
        (1, (1,)),
    ],
)
def test_default_layers_follow_the_depth_of_the_tower(num_vision_layers, layers):
    selection = select_projector("saep")
    config = selection.build_config(vision_hidden_size=8, text_hidden_size=8, num_vision_layers=num_vision_layers)
    assert config.vision_layers == layers


def test_layer_presets_have_names():
    config = select_projector("saep", {"vision_layers": "lsf"}).build_config(vision_hidden_size=8, text_hidden_size=8)
    assert config.vision_layers == (3, 18, 23)


@pytest.mark.parametrize("order", ["pw_dw", "pw_dw_pw", "pw"])
def test_the_widest_product_sees_no_padding(order):
    projector, seen = build(order=order), []
    projector.block.fuse.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[2:])))
    features = [torch.randn(1, 15, projector.config.vision_hidden_size) for _ in projector.config.vision_layers]
    assert projector(features, PatchGrid(5, 3)).shape[1] == 6
    assert seen == [(5, 3)]
