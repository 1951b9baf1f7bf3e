"""Patches in non-overlapping windows: the windows in raster order, and the patches of a window in raster order too.

Merging a window into one token is the "pixel shuffle" of InternVL, Idefics3, SmolVLM and nanoVLM, the merger of
Qwen2-VL (whose processor already delivers `split_windows(...).flatten(1, 2)`), and the first step of what works inside
windows. Each function here reads its input once and writes at most one copy.
"""

from __future__ import annotations

from torch import Tensor

from .._base import PatchGrid
from .._errors import ProjectorError
from .maps import map_to_tokens, pad_to_multiple, tokens_to_map


def split_windows(tokens: Tensor, grid: PatchGrid, factor: int) -> Tensor:
    """Group the patches by window.

    Args:
        tokens: (batch, grid.height * grid.width, channels), row-major.
        factor: side of the square window in patches; must divide both sides of the grid.
    Returns:
        (batch, windows, factor**2, channels); windows row-major, the patches of a window row-major.
    Raises:
        ProjectorError: factor does not divide the grid.
    """
    return _windows_view(tokens, grid, factor).permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


def fold_windows(
    tokens: Tensor, grid: PatchGrid, factor: int, *, channel_major: bool = False, column_major: bool = False
) -> Tensor:
    """Make one token of each window by putting the channels of its patches side by side.

    Args:
        tokens: (batch, grid.height * grid.width, channels), row-major.
        factor: side of the square window in patches; must divide both sides of the grid.
        channel_major: channels outside, patches of the window inside, as `torch.nn.functional.unfold` and a flattened
            convolution weight have it (LLaVA-STF). Otherwise patches outside and channels inside.
        column_major: list the windows column by column (InternVL's `ps_version` v1) instead of row by row.
    Returns:
        (batch, windows, channels * factor**2); the patches of a window are row-major in any case.
    Raises:
        ProjectorError: factor does not divide the grid.
    """
    window_axes = (3, 1) if column_major else (1, 3)
    inner_axes = (5, 2, 4) if channel_major else (2, 4, 5)
    windows = _windows_view(tokens, grid, factor).permute(0, *window_axes, *inner_axes)
    return windows.flatten(3).flatten(1, 2)


def pad_to_windows(tokens: Tensor, grid: PatchGrid, factor: int) -> Tensor:
    """Repeat the last row and column of row-major tokens until windows tile the grid.

    Returns:
        (batch, height * width, channels) of the grid with both sides rounded up to multiples of factor; the input
        itself, as a view, where the windows tile it already.
    """
    return map_to_tokens(pad_to_multiple(tokens_to_map(tokens, grid), factor))


def _windows_view(tokens: Tensor, grid: PatchGrid, factor: int) -> Tensor:
    """(batch, window rows, factor, window columns, factor, channels), a view."""
    if grid.height % factor or grid.width % factor:
        raise ProjectorError(
            f"a {grid.height}x{grid.width} grid cannot be cut into windows of {factor}x{factor} patches: both sides "
            f"must be multiples of {factor}. Choose another factor, or pad the grid first."
        )
    return tokens.unflatten(1, (grid.height // factor, factor, grid.width // factor, factor))
