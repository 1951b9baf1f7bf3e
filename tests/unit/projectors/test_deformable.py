"""Deformable attention against transformers' Deformable DETR and a loop over patches."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoder,
    DeformableDetrMultiscaleDeformableAttention,
)

from projectors import PatchGrid
from projectors.layers import DeformableAttention
from projectors.layers.deformable import sampling_locations, weighted_samples

NUM_HEADS, NUM_POINTS, WIDTH = 8, 3, 16  # eight heads, so that rings have corners


def detr_config():
    return DeformableDetrConfig(
        d_model=WIDTH,
        decoder_attention_heads=NUM_HEADS,
        encoder_attention_heads=NUM_HEADS,
        decoder_n_points=NUM_POINTS,
        decoder_layers=1,
        num_feature_levels=1,
        disable_custom_kernels=True,
    )


def randomised(module, std=0.5):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, std)
    return module


def bilinear(feature_map, x, y):
    """(H, W, C) at x, y from 0 to 1; what lies between the outermost centres and outside fades to zero."""
    height, width, channels = feature_map.shape
    column, row = x * width - 0.5, y * height - 0.5
    total = torch.zeros(channels)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * feature_map[i, j]
    return total


@pytest.mark.parametrize("grid", [PatchGrid(5, 5), PatchGrid(3, 7), PatchGrid(6, 2), PatchGrid(1, 1)])
def test_output_is_deformable_detrs(grid):
    torch.manual_seed(0)
    ours = randomised(DeformableAttention(WIDTH, NUM_HEADS, NUM_POINTS))
    theirs = DeformableDetrMultiscaleDeformableAttention(detr_config(), NUM_HEADS, NUM_POINTS)
    theirs.load_state_dict(ours.state_dict())
    queries, features = torch.randn(2, 9, WIDTH), torch.randn(2, grid.num_patches, WIDTH)
    points = torch.rand(2, 9, 2)
    expected, _ = theirs(
        queries,
        encoder_hidden_states=features,
        reference_points=points[:, :, None],
        spatial_shapes=torch.tensor([grid]),
        spatial_shapes_list=[tuple(grid)],
        level_start_index=torch.tensor([0]),
    )
    # Outputs of magnitude ten in float32, products summed in another order.
    torch.testing.assert_close(ours(queries, features, grid, points), expected, rtol=1e-5, atol=1e-5)


def test_samples_are_bilinear_and_zero_outside():
    grid = PatchGrid(3, 5)
    torch.manual_seed(0)
    values = torch.randn(2, grid.num_patches, 2, 4)
    locations = torch.rand(2, 6, 2, 3, 2) * 1.6 - 0.3  # a third of them outside of the map
    weights = torch.randn(2, 6, 2, 3)
    samples = weighted_samples(values, grid, locations, weights).unflatten(2, (2, 4))
    for image in range(2):
        for head in range(2):
            feature_map = values[image, :, head].view(*grid, 4)
            for query in range(6):
                expected = sum(
                    weight * bilinear(feature_map, *location.tolist())
                    for weight, location in zip(weights[image, query, head], locations[image, query, head], strict=True)
                )
                # Three products of unit scale in float32.
                torch.testing.assert_close(samples[image, query, head], expected, rtol=0, atol=1e-5)


def test_offsets_are_in_patches_and_x_comes_first():
    points, offsets = torch.tensor([[[0.5, 0.25]]]), torch.tensor([1.0, 2.0]).view(1, 1, 1, 1, 2)
    locations = sampling_locations(points, offsets, PatchGrid(8, 4))
    assert locations.flatten().tolist() == [0.5 + 1 / 4, 0.25 + 2 / 8]


def test_bfloat16_offsets_lose_nothing_when_they_are_added():
    points, offsets = torch.rand(1, 9, 2).bfloat16(), torch.randn(2, 9, NUM_HEADS, NUM_POINTS, 2).bfloat16()
    grid = PatchGrid(24, 31)
    locations = sampling_locations(points, offsets, grid)
    expected = sampling_locations(points.float(), offsets.float(), grid)
    assert locations.dtype == torch.float32 and torch.equal(locations, expected)


def test_bfloat16_values_are_weighed_in_float32():
    grid = PatchGrid(4, 3)
    torch.manual_seed(0)
    values, weights = torch.randn(1, 12, 2, 4).bfloat16(), torch.rand(1, 5, 2, 3).bfloat16()
    locations = torch.rand(1, 5, 2, 3, 2)
    samples = weighted_samples(values, grid, locations, weights)
    expected = weighted_samples(values.float(), grid, locations, weights.float())
    assert samples.dtype == torch.bfloat16 and torch.equal(samples, expected.bfloat16())


def test_gradients_of_values_locations_and_weights_are_right():
    grid = PatchGrid(3, 2)
    torch.manual_seed(0)
    shapes = ((1, 6, 2, 2), (1, 3, 2, 2, 2), (1, 3, 2, 2))
    values, locations, weights = (torch.rand(shape, dtype=torch.double, requires_grad=True) for shape in shapes)
    # Against finite differences.
    assert torch.autograd.gradcheck(
        lambda *tensors: weighted_samples(tensors[0], grid, *tensors[1:]), (values, locations, weights)
    )


def test_rings_are_deformable_detrs_start():
    torch.manual_seed(0)
    theirs = DeformableDetrDecoder(detr_config()).layers[0].encoder_attn
    ours = randomised(DeformableAttention(WIDTH, NUM_HEADS, NUM_POINTS))
    ours.reset_offsets_to_rings()
    for name in ("sampling_offsets", "attention_weights"):
        for kind in ("weight", "bias"):
            expected = getattr(getattr(theirs, name), kind)
            # One rounding of sine and cosine.
            torch.testing.assert_close(getattr(getattr(ours, name), kind), expected, rtol=0, atol=1e-6)
    assert ours.sampling_offsets.bias.view(NUM_HEADS, NUM_POINTS, 2)[0, 2].tolist() == [3.0, 0.0]


def test_an_empty_batch_gives_an_empty_batch():
    attention = DeformableAttention(WIDTH, NUM_HEADS, NUM_POINTS)
    output = attention(torch.zeros(0, 5, WIDTH), torch.zeros(0, 6, WIDTH), PatchGrid(2, 3), torch.zeros(1, 5, 2))
    assert output.shape == (0, 5, WIDTH)
