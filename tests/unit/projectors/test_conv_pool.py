"""The pooler against torch's own convolution, as LLaVA-NeXT's code applies it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from projectors import PatchGrid, ProjectorError, load_projector_state_dict, projector_spec, select_projector
from projectors.conformance import check_projector

VISION, TEXT = 6, 10
GRIDS = [PatchGrid(4, 6), PatchGrid(6, 4), PatchGrid(2, 8)]


def build(options=None):
    """With every parameter random, so that all of them show in the output."""
    selection = select_projector("conv_pool", options)
    projector = selection.build(selection.build_config(vision_hidden_size=VISION, text_hidden_size=TEXT)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.normal_(0, 0.2)
    return projector


class Original(nn.Module):
    """The modules of LLaVA-NeXT's pooler under its names, on a (batch, channels, height, width) map."""

    def __init__(self, channels, factor):
        super().__init__()
        self.conv_pool = nn.Conv2d(channels, TEXT, kernel_size=factor, stride=factor)
        self.proj = nn.Sequential(nn.GELU(), nn.Linear(TEXT, TEXT))

    def forward(self, feature_map):
        return self.proj(self.conv_pool(feature_map).flatten(2).transpose(1, 2))


def original_of(projector, factor, num_layers=1):
    original = Original(VISION * num_layers, factor)
    original.load_state_dict(projector.to_original_state_dict(projector.state_dict()))
    return original


def to_map(tokens, grid):
    return tokens.transpose(1, 2).reshape(len(tokens), -1, grid.height, grid.width)


@pytest.mark.parametrize("factor, grid", [(2, grid) for grid in GRIDS] + [(3, PatchGrid(6, 9)), (1, PatchGrid(3, 2))])
def test_output_is_the_convolutions(factor, grid):
    projector, tokens = build({"factor": factor}), torch.randn(2, grid.num_patches, VISION)
    expected = original_of(projector, factor)(to_map(tokens, grid))
    # One matrix product against a convolution: another order of at most 54 summands.
    torch.testing.assert_close(projector([tokens], grid), expected, rtol=0, atol=1e-5)


def test_several_layers_are_concatenated_in_order():
    grid, projector = GRIDS[0], build({"vision_layers": [1, 2]})
    features = [torch.randn(2, grid.num_patches, VISION) for _ in range(2)]
    expected = original_of(projector, 2, num_layers=2)(to_map(torch.cat(features, dim=2), grid))
    torch.testing.assert_close(projector(features, grid), expected, rtol=0, atol=1e-5)


def test_padding_repeats_the_last_row_and_column():
    projector, tokens = build({"pad_grid": True}), torch.randn(2, 15, VISION)
    padded = nn.functional.pad(to_map(tokens, PatchGrid(3, 5)), (0, 1, 0, 1), mode="replicate")
    output = projector([tokens], PatchGrid(3, 5))
    torch.testing.assert_close(output, original_of(projector, 2)(padded), rtol=0, atol=1e-5)


def test_a_patch_changes_the_token_of_its_own_window_alone():
    """Square on purpose: exchanged rows and columns would change another token, and no shape."""
    projector, tokens, other = build(), torch.randn(1, 36, VISION), torch.randn(VISION)
    before = projector([tokens], PatchGrid(6, 6))
    tokens[0, 1 * 6 + 4] = other  # row 1, column 4: window row 0, column 2
    differs = (projector([tokens], PatchGrid(6, 6)) - before)[0].abs().amax(1) > 1e-4
    assert differs.nonzero().flatten().tolist() == [2]


def test_grid_that_windows_do_not_tile_is_refused():
    with pytest.raises(ProjectorError, match="3x4 grid.*factor 2"):
        build()([torch.zeros(1, 12, VISION)], PatchGrid(3, 4))


def test_checkpoints_of_the_original_load_under_its_prefix_and_in_the_convolutions_shape():
    source, target = build(), build()
    weights = {f"model.mm_projector.{key}": torch.randn_like(tensor) for key, tensor in source.state_dict().items()}
    assert weights["model.mm_projector.conv_pool.weight"].shape == (TEXT, VISION, 2, 2)
    load_projector_state_dict(target, weights | {"model.embed_tokens.weight": torch.zeros(3, TEXT)})
    assert torch.equal(target.proj[1].weight, weights["model.mm_projector.proj.1.weight"])
    assert torch.equal(target.conv_pool.weight, weights["model.mm_projector.conv_pool.weight"])


def test_llava_nexts_name_is_an_alias():
    assert projector_spec("pooler").name == "conv_pool"


@pytest.mark.parametrize("options", [{"factor": 3}, {"pad_grid": True}, {"factor": 1}, {"vision_layers": [1, 2]}])
def test_options_keep_the_contract(options):
    check_projector("conv_pool", options).raise_if_failed()
