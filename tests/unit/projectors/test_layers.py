"""Shared layers against plain formulas, and the promise that maps are views."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from projectors import PatchGrid
from projectors.layers import (
    DepthwiseConv2d,
    LayerNorm2d,
    PointwiseConv2d,
    SqueezeExcite,
    map_to_tokens,
    normal_,
    pad_to_multiple,
    reset_module,
    resize_positions,
    sincos_positions,
    tokens_to_map,
    trunc_normal_,
)


def random_map(height=5, width=7, channels=6, batch=2):
    generator = torch.Generator().manual_seed(0)
    return tokens_to_map(torch.randn(batch, height * width, channels, generator=generator), PatchGrid(height, width))


def test_tokens_to_map_is_a_row_major_channels_last_view():
    tokens = torch.arange(2 * 6 * 3).view(2, 6, 3)
    feature_map = tokens_to_map(tokens, PatchGrid(2, 3))
    assert feature_map.data_ptr() == tokens.data_ptr()
    assert feature_map.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(feature_map[1, :, 1, 2], tokens[1, 5])
    assert map_to_tokens(feature_map).data_ptr() == tokens.data_ptr()
    assert torch.equal(map_to_tokens(feature_map), tokens)


@pytest.mark.parametrize(
    "layer",
    [LayerNorm2d(6), PointwiseConv2d(6, 8), DepthwiseConv2d(6, 3, 2), DepthwiseConv2d(6, 2, 2), SqueezeExcite(6, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_keep_the_map_channels_last(layer):
    assert layer(random_map()).is_contiguous(memory_format=torch.channels_last)


def test_layer_norm_2d_normalises_each_position_over_channels():
    norm, feature_map = LayerNorm2d(6, eps=1e-6), random_map()
    torch.nn.init.normal_(norm.weight)
    mean = feature_map.mean(1, keepdim=True)
    variance = feature_map.var(1, keepdim=True, unbiased=False)
    expected = (feature_map - mean) / (variance + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(feature_map), expected, rtol=0, atol=1e-5)


def test_pointwise_conv_is_a_1x1_convolution():
    layer, feature_map = PointwiseConv2d(6, 8), random_map()
    expected = functional.conv2d(feature_map, layer.weight[:, :, None, None], layer.bias)
    torch.testing.assert_close(layer(feature_map), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_depthwise_conv_sides_are_divided_and_rounded_up(kernel_size, stride):
    layer = DepthwiseConv2d(6, kernel_size, stride)
    for height, width in ((1, 1), (4, 6), (5, 7), (8, 3)):
        shape = layer(random_map(height, width)).shape
        assert shape[2:] == (math.ceil(height / stride), math.ceil(width / stride))


def test_depthwise_kernel_two_with_stride_two_sees_disjoint_blocks():
    layer, feature_map = DepthwiseConv2d(6, 2, 2), random_map(4, 6)
    expected = functional.conv2d(feature_map, layer.weight, layer.bias, stride=2, groups=6)
    torch.testing.assert_close(layer(feature_map), expected, rtol=0, atol=1e-6)


def test_squeeze_excite_gates_channels_by_their_means():
    layer, feature_map = SqueezeExcite(6, 2), random_map()
    means = feature_map.mean((2, 3))
    hidden = means @ layer.fc1.weight[:, :, 0, 0].T + layer.fc1.bias
    hidden = hidden * torch.sigmoid(hidden)
    gate = torch.sigmoid(hidden @ layer.fc2.weight[:, :, 0, 0].T + layer.fc2.bias)
    torch.testing.assert_close(layer(feature_map), feature_map * gate[:, :, None, None], rtol=0, atol=1e-6)


@pytest.mark.parametrize("multiple", [1, 2, 3, 4])
def test_padding_repeats_the_last_row_and_column(multiple):
    feature_map = random_map(5, 7)
    expected = functional.pad(feature_map, (0, -7 % multiple, 0, -5 % multiple), mode="replicate")
    assert torch.equal(pad_to_multiple(feature_map, multiple), expected)


def test_sincos_positions_encode_row_then_column():
    positions = sincos_positions(PatchGrid(3, 4), 8, torch.device("cpu"), torch.float32)[0].view(3, 4, 8)
    # Two frequencies per axis: 1 and 10000 ** -0.5 = 0.01.
    row, column = 2, 3
    expected = [
        function(position * frequency)
        for position in (row, column)
        for function in (math.sin, math.cos)
        for frequency in (1.0, 0.01)
    ]
    torch.testing.assert_close(positions[row, column], torch.tensor(expected), rtol=0, atol=1e-6)
    assert len({tuple(vector.tolist()) for vector in positions.flatten(0, 1)}) == 12


@pytest.mark.parametrize("channels", [1, 2, 5, 6, 7])
def test_sincos_positions_take_any_width(channels):
    shape = sincos_positions(PatchGrid(3, 2), channels, torch.device("cpu"), torch.float32).shape
    assert shape == (1, 6, channels)


def test_positions_are_unchanged_on_their_own_grid_and_transposed_with_the_grid():
    positions = torch.randn(1, 12, 5)
    assert resize_positions(positions, PatchGrid(3, 4), PatchGrid(3, 4)) is positions
    transposed = positions.view(1, 3, 4, 5).transpose(1, 2).reshape(1, 12, 5)
    wide = resize_positions(positions, PatchGrid(3, 4), PatchGrid(6, 8)).view(6, 8, 5)
    tall = resize_positions(transposed, PatchGrid(4, 3), PatchGrid(8, 6)).view(8, 6, 5)
    torch.testing.assert_close(wide, tall.transpose(0, 1), rtol=0, atol=1e-5)


def test_default_initialisation_is_that_of_torch():
    for fresh in (torch.nn.Linear(50, 40), torch.nn.Conv2d(12, 8, 3, groups=4)):
        torch.manual_seed(0)
        fresh.reset_parameters()
        expected = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
        torch.manual_seed(0)
        reset_module(fresh)
        for name, tensor in fresh.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=0)


def test_truncated_normal_is_cut_at_two_standard_deviations():
    tensor = torch.empty(20000)
    trunc_normal_(tensor, std=0.02)
    assert 0.035 < tensor.abs().max() <= 0.04
    # The standard deviation of a normal cut at two of its own is 0.8796 of it.
    assert abs(tensor.std() / 0.02 - 0.8796) < 0.02


def test_a_tensor_marked_as_loaded_is_left_alone():
    loaded, fresh = torch.full((4,), 7.0), torch.full((4,), 7.0)
    loaded._is_hf_initialized = True
    normal_(loaded, 1.0)
    normal_(fresh, 1.0)
    assert torch.equal(loaded, torch.full((4,), 7.0))
    assert not torch.equal(fresh, torch.full((4,), 7.0))
