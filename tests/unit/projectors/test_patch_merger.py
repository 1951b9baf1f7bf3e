"""The patch merger against transformers' modules of Qwen2-VL and Qwen2.5-VL, with their weights."""

from __future__ import annotations

import pytest
import torch

from projectors import PatchGrid, ProjectorError, load_projector_state_dict, select_projector
from projectors.conformance import check_projector

VISION, TEXT = 6, 10


def build(spelling="patch_merger", options=None, vision_hidden_size=VISION):
    selection = select_projector(spelling, options)
    sizes = {"vision_hidden_size": vision_hidden_size, "text_hidden_size": TEXT}
    return selection.build(selection.build_config(**sizes)).eval()


def randomise(module):
    """Every parameter: gains of one and biases of zero would hide errors."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module.eval()


def original_merger(spelling, factor, channels):
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

    classes = {"patch_merger_qwen2_vl": PatchMerger, "patch_merger_qwen2_5_vl": Qwen2_5_VLPatchMerger}
    return randomise(classes[spelling](TEXT, channels, factor))


def block_order(grid, factor):
    """The patches' places in a raster, in the order in which Qwen's image processor cuts them."""
    return [
        row * grid.width + column
        for top in range(0, grid.height, factor)
        for left in range(0, grid.width, factor)
        for row in range(top, top + factor)
        for column in range(left, left + factor)
    ]


@pytest.mark.parametrize("prefix", ["visual.merger.", "model.visual.merger."])
@pytest.mark.parametrize("spelling", ["patch_merger_qwen2_vl", "patch_merger_qwen2_5_vl"])
@pytest.mark.parametrize(
    "factor, grid, channels",
    [(2, PatchGrid(4, 6), 6), (2, PatchGrid(6, 4), 5), (2, PatchGrid(4, 4), 6), (3, PatchGrid(3, 9), 4)],
)
def test_output_is_qwens(spelling, factor, grid, channels, prefix):
    original, tokens = original_merger(spelling, factor, channels), torch.randn(2, grid.num_patches, channels)
    projector = build(spelling, {"factor": factor}, vision_hidden_size=channels)
    whole = {prefix + key: tensor for key, tensor in original.state_dict().items()}
    load_projector_state_dict(projector, whole | {"model.embed_tokens.weight": torch.zeros(3, TEXT)})
    # The original knows no batch: patches of all images, one after another.
    expected = original(tokens[:, block_order(grid, factor)].flatten(0, 1)).unflatten(0, (2, -1))
    # The norms are computed by other kernels: a few roundings at unit scale.
    torch.testing.assert_close(projector([tokens], grid), expected, rtol=0, atol=1e-5)


def test_block_order_is_that_of_qwens_image_processor():
    """Ties `block_order` to the original: patches of a 4x6 raster whose pixels hold their patch's number."""
    import numpy
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=4, min_pixels=1, max_pixels=10**6, do_rescale=False, do_normalize=False, do_convert_rgb=False
    )
    numbers = numpy.arange(24, dtype=numpy.uint8).reshape(4, 6).repeat(4, axis=0).repeat(4, axis=1)
    pixels = processor(images=numpy.stack([numbers] * 3, axis=2), return_tensors="np")["pixel_values"]
    assert pixels.min(axis=1).astype(int).tolist() == block_order(PatchGrid(4, 6), 2)


def test_a_patch_changes_the_token_of_its_own_window_alone():
    """Square on purpose: exchanged rows and columns would change another token, and no shape."""
    projector, tokens, other = randomise(build()), torch.randn(1, 36, VISION), torch.randn(VISION)
    before = projector([tokens], PatchGrid(6, 6))
    tokens[0, 1 * 6 + 4] = other  # row 1, column 4: window row 0, column 2
    differs = (projector([tokens], PatchGrid(6, 6)) - before)[0].abs().amax(1) > 1e-4
    assert differs.nonzero().flatten().tolist() == [2]


def test_padding_repeats_the_last_row_and_column():
    projector, tokens = randomise(build(options={"pad_grid": True})), torch.randn(2, 15, VISION)
    rows, columns = [0, 1, 2, 2], [0, 1, 2, 3, 4, 4]
    padded = tokens[:, [row * 5 + column for row in rows for column in columns]]
    # Norms of repeated patches come from another place of the batch.
    output = projector([tokens], PatchGrid(3, 5))
    torch.testing.assert_close(output, projector([padded], PatchGrid(4, 6)), rtol=0, atol=1e-6)


def test_grid_that_windows_do_not_tile_is_refused():
    with pytest.raises(ProjectorError, match="3x4 grid.*factor 2"):
        build()([torch.zeros(1, 12, VISION)], PatchGrid(3, 4))


@pytest.mark.parametrize("spelling", ["patch_merger_qwen2_vl", "patch_merger_qwen2_5_vl"])
def test_export_fits_the_original(spelling):
    original, projector = original_merger(spelling, 2, VISION), build(spelling)
    original.load_state_dict(projector.to_original_state_dict(projector.state_dict()))


@pytest.mark.parametrize(
    "options", [{"factor": 3}, {"pad_grid": True, "norm": "rmsnorm"}, {"factor": 1, "vision_layers": [1, 2]}]
)
def test_options_keep_the_contract(options):
    check_projector("patch_merger", options).raise_if_failed()
