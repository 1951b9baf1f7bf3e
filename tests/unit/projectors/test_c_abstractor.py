"""C-Abstractor against Honeybee's formula, written with torch's functions on the original's keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from projectors import PatchGrid, ProjectorError, load_projector_state_dict, select_projector
from projectors.conformance import check_projector

TINY = {"num_queries": 4, "hidden_size": 12, "depth": 2, "position_grid": [4, 6]}
GRID = PatchGrid(4, 6)


def build(vision_hidden_size=8, seed=0, std=0.3, **options):
    """With every parameter random; gains around one."""
    selection = select_projector("c_abstractor", TINY | options)
    torch.manual_seed(seed)
    projector = selection.build(
        selection.build_config(vision_hidden_size=vision_hidden_size, text_hidden_size=10)
    ).eval()
    with torch.no_grad():
        for name, parameter in projector.named_parameters():
            is_gain = name.endswith("bn.weight") or name == "prenorm.weight"
            parameter.normal_(1.0 if is_gain else 0.0, std)
    return projector


def conv_norm(weights, name, feature_map, **convolution):
    output = functional.conv2d(feature_map, weights[f"{name}.conv.weight"], **convolution)
    gain, bias = weights[f"{name}.bn.weight"], weights[f"{name}.bn.bias"]
    return functional.layer_norm(output.movedim(1, 3), gain.shape, gain, bias, eps=1e-5).movedim(3, 1)


def squeeze_excite(weights, name, feature_map):
    gate = feature_map.mean((2, 3), keepdim=True)
    gate = functional.silu(functional.conv2d(gate, weights[f"{name}.fc1.weight"], weights[f"{name}.fc1.bias"]))
    gate = functional.conv2d(gate, weights[f"{name}.fc2.weight"], weights[f"{name}.fc2.bias"])
    return feature_map * torch.sigmoid(gate)


def bottleneck(weights, name, feature_map):
    branch = functional.silu(conv_norm(weights, f"{name}.conv1", feature_map))
    branch = functional.silu(conv_norm(weights, f"{name}.conv2", branch, padding=1, groups=branch.shape[1]))
    branch = conv_norm(weights, f"{name}.conv3", squeeze_excite(weights, f"{name}.se", branch))
    has_projection = f"{name}.downsample.conv.weight" in weights
    shortcut = conv_norm(weights, f"{name}.downsample", feature_map) if has_projection else feature_map
    return functional.silu(branch + shortcut)


def adaptive_average(feature_map, side):
    """Bins that overlap where the sides are no multiples: from floor(i n / side) to ceil((i + 1) n / side)."""
    rows, columns = (
        [slice(i * size // side, math.ceil((i + 1) * size / side)) for i in range(side)]
        for size in feature_map.shape[2:]
    )
    means = [[feature_map[:, :, row, column].mean((2, 3)) for column in columns] for row in rows]
    return torch.stack([torch.stack(row, dim=2) for row in means], dim=2)


def honeybee(projector, tokens, grid):
    """The positions are those of this grid."""
    config, weights = projector.config, projector.to_original_state_dict(projector.state_dict())
    if config.prenorm:
        tokens = functional.layer_norm(
            tokens, tokens.shape[2:], weights["prenorm.weight"], weights["prenorm.bias"], eps=1e-6
        )
    if config.use_position_embedding:
        tokens = tokens + weights["pos_emb"]
    feature_map = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
    for index in range(config.depth):
        feature_map = bottleneck(weights, f"net.0.b{index + 1}", feature_map)
    feature_map = adaptive_average(feature_map, math.isqrt(config.num_queries))
    for index in range(config.depth):
        feature_map = bottleneck(weights, f"net.2.b{index + 1}", feature_map)
    output = feature_map.flatten(2).transpose(1, 2)
    for index in range(config.readout_depth):
        output = functional.silu(output) if index else output
        name = f"readout.{2 * index}"
        output = functional.linear(output, weights[f"{name}.weight"], weights[f"{name}.bias"])
    if config.num_eos_tokens:
        output = torch.cat([output, weights["eos_tokens"].expand(len(output), -1, -1)], dim=1)
    return output


# Outputs of unit scale in float32; 1x1 convolutions are summed in another order.
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("vision_hidden_size", [8, 12], ids=["widening", "equal widths"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 0},
        {"depth": 1, "num_eos_tokens": 2},
        {"depth": 0, "num_eos_tokens": 1, "prenorm": True},
        {"prenorm": True, "readout_depth": 1},
        {"use_position_embedding": False, "readout_depth": 3},
        {"num_queries": 9},  # 6 columns of 4x6 in 3 bins of 2, 4 rows in 3 bins of 2 that overlap
        {"num_queries": 16},  # 6 columns in 4 bins that overlap
        {"num_queries": 1},
    ],
    ids=str,
)
def test_output_is_honeybees_on_a_rectangle(vision_hidden_size, options):
    projector, tokens = build(vision_hidden_size, **options), torch.randn(2, 24, vision_hidden_size)
    has_projection = "net.0.b1.downsample.conv.weight" in projector.state_dict()
    assert has_projection == (vision_hidden_size == 8 and projector.config.depth > 0)
    torch.testing.assert_close(projector([tokens], GRID), honeybee(projector, tokens, GRID), **TOLERANCE)


@pytest.mark.parametrize("grid, num_queries", [(PatchGrid(7, 5), 9), (PatchGrid(3, 11), 4), (PatchGrid(5, 5), 16)])
def test_bins_overlap_where_the_sides_are_no_multiples(grid, num_queries):
    projector = build(num_queries=num_queries, position_grid=list(grid))
    tokens = torch.randn(2, grid.num_patches, 8)
    torch.testing.assert_close(projector([tokens], grid), honeybee(projector, tokens, grid), **TOLERANCE)


def test_epsilons_are_honeybees():
    """Where variances are as small as the epsilons: another epsilon would give another output."""
    projector, tokens = build(prenorm=True, use_position_embedding=False), 1e-3 * torch.randn(2, 24, 8)
    with torch.no_grad():
        for name, parameter in projector.named_parameters():
            if name.endswith("conv.weight"):
                parameter.mul_(1e-2)
    torch.testing.assert_close(projector([tokens], GRID), honeybee(projector, tokens, GRID), **TOLERANCE)


def test_transposing_the_grid_changes_the_output():
    projector, tokens = build(use_position_embedding=False), torch.randn(1, 24, 8)
    upright, lying = projector([tokens], PatchGrid(6, 4)), projector([tokens], PatchGrid(4, 6))
    assert (upright - lying).abs().amax() > 1e-2


def test_maps_stay_channels_last():
    projector, layouts = build(), []

    def record(module, inputs, output):
        layouts.append((module, output.is_contiguous(memory_format=torch.channels_last)))

    for module in projector.net.modules():
        module.register_forward_hook(record)
    projector([torch.randn(2, 24, 8)], GRID)
    maps = [layout for module, layout in layouts if not isinstance(module, torch.nn.Identity)]
    assert maps and all(maps)


@pytest.mark.parametrize("prefix", ["abstractor.", "model.abstractor.", ""])
@pytest.mark.parametrize("depth", [0, 2])
def test_old_checkpoints_lose_the_class_tokens_position(prefix, depth):
    source, target = build(depth=depth), build(depth=depth, seed=1)
    theirs = {prefix + key: tensor for key, tensor in source.to_original_state_dict(source.state_dict()).items()}
    theirs[f"{prefix}pos_emb"] = torch.cat([torch.full((1, 1, 8), 7.0), source.pos_emb.detach()], dim=1)
    others = {"vision_model.embeddings.weight": torch.zeros(3), "language_model.lm_head.weight": torch.zeros(3)}
    load_projector_state_dict(target, theirs | (others if prefix else {}))
    assert all(torch.equal(target.state_dict()[key], tensor) for key, tensor in source.state_dict().items())


def test_two_more_positions_are_refused():
    source = build()
    weights = source.state_dict() | {"pos_emb": torch.zeros(1, 26, 8)}
    with pytest.raises(ProjectorError, match=r"pos_emb is \(1, 26, 8\), expected \(1, 24, 8\)"):
        load_projector_state_dict(build(), weights)


def test_keys_are_honeybees():
    stem = "net.0.b1"
    norms = [f"{stem}.{name}.bn" for name in ("conv1", "conv2", "conv3", "downsample")]
    biased = [*norms, f"{stem}.se.fc1", f"{stem}.se.fc2", "readout.0", "readout.2"]
    keys = {f"{name}.{kind}" for name in biased for kind in ("weight", "bias")}
    keys |= {f"{name.removesuffix('.bn')}.conv.weight" for name in norms}
    keys |= {key.replace("net.0", "net.2") for key in keys if key.startswith(stem) and "downsample" not in key}
    projector = build(depth=1)
    assert set(projector.state_dict()) == keys | {"pos_emb"}
    shapes = {name: tuple(projector.get_parameter(f"{stem}.{name}.weight").shape) for name in ("conv1.conv", "se.fc1")}
    assert shapes == {"conv1.conv": (12, 8, 1, 1), "se.fc1": (2, 12, 1, 1)}  # a quarter of the block's input


@pytest.mark.parametrize("init", ["default", "normal", "trunc_normal"])
def test_start_is_torchs_or_honeybees(init):
    selection = select_projector("c_abstractor", TINY | {"hidden_size": 256, "depth": 1, "init": init})
    torch.manual_seed(0)
    projector = selection.build(selection.build_config(vision_hidden_size=8, text_hidden_size=64))
    depthwise, readout = projector.net[0].b1.conv2.conv.weight, projector.readout[0]
    if init == "default":
        # Uniform up to one over the square root of the fan-in; its deviation is that over the square root of three.
        expected = {depthwise: (9 * 3) ** -0.5, readout.weight: (256 * 3) ** -0.5}
        assert readout.bias.any()
    else:
        cut = 0.8796 if init == "trunc_normal" else 1.0  # deviation of a standard normal cut at two
        expected = {depthwise: 0.02 * cut, readout.weight: 0.02 * cut}
        assert not readout.bias.any() and not projector.net[0].b1.se.fc1.bias.any()
        assert (readout.weight.abs().max() > 0.04) == (init == "normal")
    for weight, deviation in expected.items():
        # 2304 draws at least: the standard error is 1.5 percent.
        assert weight.std().item() == pytest.approx(deviation, rel=0.06)
    assert 0 < projector.pos_emb.abs().max() <= 0.04


@pytest.mark.parametrize(
    "options",
    [
        {"init": "normal", "hidden_size": 16},
        {"readout_depth": 3, "use_position_embedding": False},
        {"vision_layers": [1, 3], "depth": 2},
        {"depth": 0, "prenorm": True, "num_eos_tokens": 1},
    ],
    ids=str,
)
def test_options_keep_the_contract(options):
    check_projector("c_abstractor", options).raise_if_failed()
