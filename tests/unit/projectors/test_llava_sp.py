"""LLaVA-SP against its formula, written with torch's functions on the original's keys."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from projectors import PatchGrid, ProjectorError, load_projector_state_dict, select_projector
from projectors.conformance import check_projector

VARIANTS = ("pooling", "cropping")
SMALL = {"kernel_sizes": [1, 2, 4], "detail_kernel_size": 3, "detail_stride": 2}


def build(variant, seed=0, channels=6, **options):
    """With every parameter random, so that norms and biases count."""
    selection = select_projector("llava_sp", {"variant": variant, "spatial_hidden_size": 5} | options)
    torch.manual_seed(seed)
    projector = selection.build(selection.build_config(vision_hidden_size=channels, text_hidden_size=10)).eval()
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return projector


def original_weights(projector):
    return projector.to_original_state_dict(projector.state_dict())


def linear(weights, name, tokens):
    return functional.linear(tokens, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def mm_projector(weights, tokens):
    return linear(weights, "mm_projector.2", functional.gelu(linear(weights, "mm_projector.0", tokens)))


def normed_linear(weights, name, tokens):
    normed = functional.layer_norm(tokens, tokens.shape[2:], weights[f"{name}.0.weight"], weights[f"{name}.0.bias"])
    return linear(weights, f"{name}.1", normed)


def one_token(feature_map, kernel):
    """A valid convolution that leaves one position: (B, 1, width)."""
    return functional.conv2d(feature_map, kernel).flatten(2).transpose(1, 2)


def pooling_original(weights, tokens, grid, largest):
    feature_map = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
    spatial = []
    for key in (key for key in weights if key.startswith("conv_") and not key.startswith("conv_linear")):
        size = weights[key].shape[2]
        assert key == (f"conv_{size}.weight" if size == largest else f"conv_{size}.1.weight")
        spatial.append(one_token(functional.adaptive_avg_pool2d(feature_map, size), weights[key]))
    spatial = linear(weights, "conv_linear.1", functional.gelu(torch.cat(spatial, dim=1)))
    return torch.cat([spatial, mm_projector(weights, tokens)], dim=1)


def cropping_original(weights, tokens, grid, crops, detail_stride):
    """crops: kernel size -> rows, columns of the map."""
    feature_map = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
    spatial = []
    for size, (rows, columns) in crops.items():
        cropped = functional.adaptive_avg_pool2d(feature_map[:, :, rows, columns], size)
        spatial.append(one_token(cropped, weights[f"conv_{size}.weight"]))
    spatial = torch.cat(spatial, dim=1)
    details = functional.conv2d(feature_map, weights["conv_CM.weight"], stride=detail_stride)
    details = details.flatten(2).transpose(1, 2)
    scores = normed_linear(weights, "query_projector", spatial) @ normed_linear(
        weights, "key_projector", details
    ).transpose(1, 2)
    attended = (scores / spatial.shape[2] ** 0.5).softmax(2) @ normed_linear(weights, "value_projector", details)
    spatial = linear(weights, "conv_linear.1", functional.gelu(torch.cat([spatial, attended], dim=2)))
    return torch.cat([spatial, mm_projector(weights, tokens)], dim=1)


# Outputs of unit scale in float32; products of up to 24 * 24 * 6 terms are summed in another order.
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("kernel_sizes", [(4, 8, 12, 16, 20, 24), (8, 24, 16)])
def test_pooling_is_the_original_on_its_grid(kernel_sizes):
    projector, grid = build("pooling", kernel_sizes=list(kernel_sizes)), PatchGrid(24, 24)
    tokens = torch.randn(2, grid.num_patches, 6)
    output = projector([tokens], grid)
    assert output.shape[1] == projector.config.num_output_tokens(grid) == 576 + len(kernel_sizes)
    expected = pooling_original(original_weights(projector), tokens, grid, largest=24)
    torch.testing.assert_close(output, expected, **TOLERANCE)


def test_cropping_is_the_original_on_its_grid():
    projector, grid = build("cropping"), PatchGrid(24, 24)
    tokens = torch.randn(2, grid.num_patches, 6)
    squares = {size: slice(12 - size // 2, 12 + size // 2) for size in (4, 8, 12, 16, 20, 24)}
    crops = {size: (square, square) for size, square in squares.items()}
    expected = cropping_original(original_weights(projector), tokens, grid, crops, detail_stride=2)
    torch.testing.assert_close(projector([tokens], grid), expected, **TOLERANCE)


@pytest.mark.parametrize("grid", [PatchGrid(4, 4), PatchGrid(5, 9), PatchGrid(2, 3), PatchGrid(1, 1)])
def test_pooling_takes_any_grid(grid):
    projector, tokens = build("pooling", **SMALL), torch.randn(2, grid.num_patches, 6)
    expected = pooling_original(original_weights(projector), tokens, grid, largest=4)
    torch.testing.assert_close(projector([tokens], grid), expected, **TOLERANCE)


@pytest.mark.parametrize(
    "grid, crops",
    [
        # Kernels 1, 2 and 4: a quarter, half and the whole of each side, around the centre.
        (
            PatchGrid(12, 20),
            {1: (slice(4, 7), slice(7, 12)), 2: (slice(3, 9), slice(5, 15)), 4: (slice(0, 12), slice(0, 20))},
        ),
        # 1.75 and 0.75 round to 2 and 1, 3.5 and 1.5 to 4 and 2.
        (
            PatchGrid(7, 3),
            {1: (slice(2, 4), slice(1, 2)), 2: (slice(1, 5), slice(0, 2)), 4: (slice(0, 7), slice(0, 3))},
        ),
    ],
)
def test_crops_are_the_same_share_of_both_sides(grid, crops):
    projector, tokens = build("cropping", **SMALL), torch.randn(2, grid.num_patches, 6)
    expected = cropping_original(original_weights(projector), tokens, grid, crops, detail_stride=2)
    torch.testing.assert_close(projector([tokens], grid), expected, **TOLERANCE)


def test_a_crop_has_at_least_one_patch():
    config = build("cropping", kernel_sizes=[1, 24], detail_kernel_size=1).config
    assert config.crop_grid(PatchGrid(2, 30), 1) == PatchGrid(1, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_transposing_the_grid_changes_the_spatial_tokens_and_no_others(variant):
    # Not 1, which sees the mean of the map, and that has no direction.
    projector, tokens = build(variant, **SMALL | {"kernel_sizes": [2, 3, 4]}), torch.randn(1, 24, 6)
    upright, lying = projector([tokens], PatchGrid(6, 4)), projector([tokens], PatchGrid(4, 6))
    assert (upright - lying)[:, :3].abs().amax(2).min() > 1e-3
    torch.testing.assert_close(upright[:, 3:], lying[:, 3:], **TOLERANCE)


def test_grids_smaller_than_the_details_kernel_are_refused_where_there_are_details():
    grid = PatchGrid(24, 15)
    config = build("cropping", kernel_sizes=[1]).config
    with pytest.raises(ProjectorError, match="24x15 grid is smaller than detail_kernel_size 16.* at most 15"):
        config.num_output_tokens(grid)
    with pytest.raises(ProjectorError, match="24x15 grid"):
        build("cropping", kernel_sizes=[1])([torch.zeros(1, 360, 6)], grid)
    assert config.num_output_tokens(PatchGrid(24, 16)) == 385
    assert build("pooling", kernel_sizes=[1]).config.num_output_tokens(grid) == 361


@pytest.mark.parametrize("kernel_sizes", [[], [2, 4, 2]])
def test_missing_and_repeated_kernels_are_refused(kernel_sizes):
    with pytest.raises(ProjectorError, match="kernel_sizes: got .*expected at least one size and none twice"):
        build("pooling", kernel_sizes=kernel_sizes)


def test_kernels_are_drawn_like_torchs_convolutions():
    selection = select_projector("llava_sp", {"kernel_sizes": [8], "spatial_hidden_size": 16})
    torch.manual_seed(0)
    projector = selection.build(selection.build_config(vision_hidden_size=6, text_hidden_size=10))
    bound = (6 * 8 * 8) ** -0.5  # kaiming_uniform(a=sqrt(5)): one over the square root of the fan-in
    largest = projector.spatial["8"].weight.abs().max().item()
    assert 0.99 * bound < largest <= bound  # of 6144 uniform draws


@pytest.mark.parametrize(
    "variant, keys",
    [
        ("pooling", ["conv_1.1.weight", "conv_2.1.weight", "conv_4.weight", "conv_linear.1.weight"]),
        (
            "cropping",
            ["conv_1.weight", "conv_2.weight", "conv_4.weight", "conv_CM.weight"]
            + ["conv_linear.1.weight", "conv_linear.1.bias"]
            + [
                f"{k}_projector.{i}.{kind}"
                for k in ("query", "key", "value")
                for i in "01"
                for kind in ("weight", "bias")
            ],
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["model.", "base_model.model.model.", ""])
def test_whole_models_state_dict_loads(variant, keys, prefix):
    source, target = build(variant, **SMALL), build(variant, seed=1, **SMALL)
    theirs = {prefix + key: tensor for key, tensor in original_weights(source).items()}
    mlp = [f"mm_projector.{i}.{kind}" for i in "02" for kind in ("weight", "bias")]
    assert set(theirs) == {prefix + key for key in keys + mlp}
    others = {"layers.0.mlp.up_proj.weight", "vision_tower.vision_tower.post_layernorm.weight", "image_newline"}
    load_projector_state_dict(target, theirs | {prefix + key: torch.zeros(3) for key in others})
    assert all(torch.equal(target.state_dict()[key], tensor) for key, tensor in source.state_dict().items())


def test_weights_of_another_model_are_refused():
    pooling = original_weights(build("pooling", **SMALL))
    with pytest.raises(ProjectorError, match="Missing: .*detail"):
        load_projector_state_dict(build("cropping", **SMALL), pooling)
    with pytest.raises(ProjectorError, match="Unexpected: conv_8"):
        load_projector_state_dict(build("pooling", **SMALL), pooling | {"conv_8.1.weight": torch.zeros(5, 6, 8, 8)})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "options",
    [{"kernel_sizes": [3]}, {"depth": 1, "detail_stride": 2}, {"vision_layers": [1, 4], "detail_kernel_size": 3}],
    ids=str,
)
def test_options_keep_the_contract(variant, options):
    check_projector("llava_sp", options | {"variant": variant}).raise_if_failed()
