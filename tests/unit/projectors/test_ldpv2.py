"""LDPv2 against MobileVLM's order of operations, written with torch's functions on the original's keys."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from projectors import PatchGrid, ProjectorError, load_projector_state_dict, projector_spec, select_projector
from projectors.conformance import check_projector

VISION, TEXT = 6, 10


def build(**options):
    """With every parameter random: the convolution shall matter as much as the identity beside it."""
    selection = select_projector("ldpv2", options)
    projector = selection.build(selection.build_config(vision_hidden_size=VISION, text_hidden_size=TEXT)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.normal_(0, 0.4)
    return projector


def mobilevlm(weights, tokens, grid, output_grid):
    """Both Linear layers before the pooling, as the original has it."""
    hidden = functional.linear(tokens, weights["mlp.mlp.0.weight"], weights["mlp.mlp.0.bias"])
    hidden = functional.linear(functional.gelu(hidden), weights["mlp.mlp.2.weight"], weights["mlp.mlp.2.bias"])
    feature_map = hidden.transpose(1, 2).reshape(len(tokens), TEXT, grid.height, grid.width)
    feature_map = functional.adaptive_avg_pool2d(feature_map, output_grid)
    positions = functional.conv2d(
        feature_map, weights["peg.peg.0.weight"], weights["peg.peg.0.bias"], padding=1, groups=TEXT
    )
    return (feature_map + positions).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("grid", [PatchGrid(24, 24), PatchGrid(10, 10), PatchGrid(16, 16), PatchGrid(27, 27)])
def test_output_on_twelve_by_twelve_is_mobilevlms(grid):
    projector, tokens = build(output_grid="12|12"), torch.randn(2, grid.num_patches, VISION)
    weights = projector.to_original_state_dict(projector.state_dict())
    output = projector([tokens], grid)
    assert output.shape[1] == projector.config.num_output_tokens(grid) == 144
    # The average and the second Linear change places: other roundings of values of size 5.
    torch.testing.assert_close(output, mobilevlm(weights, tokens, grid, (12, 12)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options, grid, output_grid",
    [
        ({}, PatchGrid(4, 6), (2, 3)),
        ({}, PatchGrid(7, 5), (4, 3)),
        ({}, PatchGrid(1, 1), (1, 1)),
        ({"output_grid": [2, 3]}, PatchGrid(4, 9), (2, 3)),
        ({"output_grid": [3, 2]}, PatchGrid(4, 9), (3, 2)),
        ({"output_grid": [4, 3]}, PatchGrid(2, 5), (4, 3)),
    ],
)
def test_any_grid_is_pooled_to_the_grid_that_the_option_says(options, grid, output_grid):
    projector, tokens = build(**options), torch.randn(2, grid.num_patches, VISION)
    weights, output = projector.to_original_state_dict(projector.state_dict()), projector([tokens], grid)
    assert output.shape[1] == projector.config.num_output_tokens(grid)
    torch.testing.assert_close(output, mobilevlm(weights, tokens, grid, output_grid), rtol=0, atol=1e-5)


def test_a_patch_reaches_the_neighbours_of_its_token_alone():
    """Square on purpose: exchanged rows and columns would change other tokens, and no shape."""
    projector, tokens, other = build(), torch.randn(1, 64, VISION), torch.randn(VISION)
    before = projector([tokens], PatchGrid(8, 8))
    tokens[0, 7] = other  # row 0, column 7: token row 0, column 3
    differs = (projector([tokens], PatchGrid(8, 8)) - before)[0].abs().amax(1) > 1e-4
    assert differs.nonzero().flatten().tolist() == [2, 3, 4 + 2, 4 + 3]


@pytest.mark.parametrize("prefix", ["model.mm_projector.", ""])
def test_checkpoints_of_the_original_load(prefix):
    source, target = build(), build()
    theirs = {
        prefix + key: torch.randn_like(tensor)
        for key, tensor in source.to_original_state_dict(source.state_dict()).items()
    }
    load_projector_state_dict(target, theirs | ({"model.norm.weight": torch.zeros(3)} if prefix else {}))
    back = target.to_original_state_dict(target.state_dict())
    assert {key.rpartition(".")[0] for key in back} == {"mlp.mlp.0", "mlp.mlp.2", "peg.peg.0"}
    assert all(torch.equal(back[key.removeprefix(prefix)], tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize("output_grid", [[0, 12], [12], [12, 12, 12]])
def test_impossible_output_grid_is_refused(output_grid):
    with pytest.raises(ProjectorError, match="output_grid"):
        build(output_grid=output_grid)


def test_mobilevlms_name_is_an_alias():
    assert projector_spec("ldpnetv2").name == "ldpv2"


@pytest.mark.parametrize(
    "options", [{"output_grid": [12, 12]}, {"output_grid": [3, 2]}, {"output_grid": [2, 2], "vision_layers": [1, 2]}]
)
def test_options_keep_the_contract(options):
    check_projector("ldpv2", options).raise_if_failed()
