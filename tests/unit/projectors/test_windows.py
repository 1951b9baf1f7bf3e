"""Windows of patches against index loops, torch's unfold and transformers' own pixel shuffles; values only move."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from projectors import PatchGrid, ProjectorError
from projectors.layers import fold_windows, pad_to_windows, split_windows, tokens_to_map

# Height, width and side of the window; no two grids have the same shape after windowing.
CASES = [(4, 6, 2), (6, 4, 2), (2, 8, 2), (6, 9, 3), (9, 3, 3), (8, 4, 4), (5, 3, 1)]


def numbered_tokens(height, width, channels=5, batch=2):
    """Every value is different, so that any exchange shows."""
    return torch.arange(batch * height * width * channels, dtype=torch.float32).view(batch, height * width, channels)


@pytest.mark.parametrize("height, width, factor", CASES)
def test_windows_and_their_patches_are_row_major(height, width, factor):
    tokens, rows = numbered_tokens(height, width), []
    for top in range(0, height, factor):
        for left in range(0, width, factor):
            inside = [(top + row) * width + left + column for row in range(factor) for column in range(factor)]
            rows.append(tokens[:, inside])
    assert torch.equal(split_windows(tokens, PatchGrid(height, width), factor), torch.stack(rows, dim=1))


@pytest.mark.parametrize("height, width, factor", CASES)
def test_folding_puts_the_patches_of_a_window_side_by_side(height, width, factor):
    tokens, grid = numbered_tokens(height, width), PatchGrid(height, width)
    windows = split_windows(tokens, grid, factor)
    expected = torch.cat([windows[:, :, patch] for patch in range(factor**2)], dim=2)
    assert torch.equal(fold_windows(tokens, grid, factor), expected)


@pytest.mark.parametrize("height, width, factor", CASES)
def test_channel_major_is_unfolds_order(height, width, factor):
    tokens, grid = numbered_tokens(height, width), PatchGrid(height, width)
    expected = functional.unfold(tokens_to_map(tokens, grid), factor, stride=factor).transpose(1, 2)
    assert torch.equal(fold_windows(tokens, grid, factor, channel_major=True), expected)


@pytest.mark.parametrize("channel_major", [False, True])
@pytest.mark.parametrize("height, width, factor", CASES)
def test_column_major_lists_the_same_windows_column_by_column(height, width, factor, channel_major):
    tokens, grid = numbered_tokens(height, width), PatchGrid(height, width)
    by_row = fold_windows(tokens, grid, factor, channel_major=channel_major)
    order = [row * (width // factor) + column for column in range(width // factor) for row in range(height // factor)]
    by_column = fold_windows(tokens, grid, factor, channel_major=channel_major, column_major=True)
    assert torch.equal(by_column, by_row[:, order])


def test_folding_is_internvls_pixel_shuffle_on_rectangles():
    from transformers.models.internvl.modeling_internvl import InternVLModel

    tokens = numbered_tokens(4, 6)
    # The method uses nothing of the model; its image is (batch, height, width, channels).
    theirs = InternVLModel.pixel_shuffle(None, tokens.view(2, 4, 6, 5), scale_factor=0.5)
    assert torch.equal(fold_windows(tokens, PatchGrid(4, 6), 2), theirs.flatten(1, 2))


@pytest.mark.parametrize("height, width, factor", CASES)
def test_padding_repeats_the_last_row_and_column(height, width, factor):
    tokens = numbered_tokens(height, width)
    padded_height, padded_width = -(-height // 4) * 4, -(-width // 4) * 4
    index = [
        min(row, height - 1) * width + min(column, width - 1)
        for row in range(padded_height)
        for column in range(padded_width)
    ]
    assert torch.equal(pad_to_windows(tokens, PatchGrid(height, width), 4), tokens[:, index])


def test_padding_what_windows_tile_already_is_free():
    tokens = numbered_tokens(4, 6)
    assert pad_to_windows(tokens, PatchGrid(4, 6), 2).data_ptr() == tokens.data_ptr()


class CopyCounter(TorchDispatchMode):
    """Counts the operations that write a new tensor."""

    def __init__(self):
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        inputs = {tensor.data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        self.copies += isinstance(output, torch.Tensor) and output.data_ptr() not in inputs
        return output


@pytest.mark.parametrize(
    "regroup",
    [
        split_windows,
        fold_windows,
        lambda *arguments: fold_windows(*arguments, channel_major=True),
        lambda *arguments: fold_windows(*arguments, column_major=True),
    ],
)
def test_regrouping_copies_at_most_once(regroup):
    with CopyCounter() as counter:
        regroup(numbered_tokens(4, 6), PatchGrid(4, 6), 2)
    made = 1  # by numbered_tokens
    assert counter.copies <= made + 1


@pytest.mark.parametrize("regroup", [split_windows, fold_windows])
@pytest.mark.parametrize("grid", [PatchGrid(4, 5), PatchGrid(5, 4)])
def test_windows_that_do_not_tile_are_refused_by_name(regroup, grid):
    with pytest.raises(ProjectorError, match=f"{grid} grid .* 2x2 .*multiples of 2"):
        regroup(numbered_tokens(*grid), grid, 2)
