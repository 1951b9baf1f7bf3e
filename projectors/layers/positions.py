"""Position embeddings of a patch grid, for any height and width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._base import PatchGrid
from .initialization import trunc_normal_

_SINCOS_BASE = 10000.0


def resize_positions(positions: Tensor, stored_grid: PatchGrid, grid: PatchGrid) -> Tensor:
    """Interpolate (1, stored height * width, channels) embeddings to another grid, bicubic; unchanged on the same."""
    if (stored_grid.height, stored_grid.width) == (grid.height, grid.width):
        return positions
    position_map = positions.unflatten(1, (stored_grid.height, stored_grid.width)).permute(0, 3, 1, 2)
    resized = functional.interpolate(
        position_map.float(), size=(grid.height, grid.width), mode="bicubic", align_corners=False
    )
    return resized.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)


def sincos_positions(grid: PatchGrid, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Fixed 2-D sine and cosine embeddings (MAE, arXiv 2111.06377), (1, height * width, channels).

    The first half of the channels encodes the row and the second the column; a width that four does not divide is
    cut from the next one that it does.
    """
    per_axis = -(-channels // 4)
    exponents = torch.arange(per_axis, device=device, dtype=torch.float32) / per_axis
    frequencies = _SINCOS_BASE**-exponents
    rows = torch.arange(grid.height, device=device, dtype=torch.float32)[:, None] * frequencies
    columns = torch.arange(grid.width, device=device, dtype=torch.float32)[:, None] * frequencies
    row_part = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(-1, grid.width, -1)
    column_part = torch.cat([columns.sin(), columns.cos()], dim=1)[None].expand(grid.height, -1, -1)
    return torch.cat([row_part, column_part], dim=2).flatten(0, 1)[None, :, :channels].to(dtype)


def learned_tokens(num_tokens: int, channels: int) -> nn.Parameter | None:
    """Room for (1, num_tokens, channels) learned vectors, which `reset_parameters` has to draw; None for none."""
    return nn.Parameter(torch.empty(1, num_tokens, channels)) if num_tokens else None


class LearnedPositions(nn.Module):
    """One learned vector per patch of `stored_grid`, interpolated on any other grid."""

    def __init__(self, stored_grid: PatchGrid, channels: int) -> None:
        super().__init__()
        self.stored_grid = stored_grid
        self.embedding = nn.Parameter(torch.empty(1, stored_grid.height * stored_grid.width, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal, std 0.02."""
        trunc_normal_(self.embedding)

    def forward(self, tokens: Tensor, grid: PatchGrid) -> Tensor:
        """Add the positions to (batch, height * width, channels) tokens."""
        return tokens + resize_positions(self.embedding, self.stored_grid, grid).to(tokens.dtype)


class SincosPositions(nn.Module):
    """Adds `sincos_positions`; holds no weights and takes any grid."""

    def forward(self, tokens: Tensor, grid: PatchGrid) -> Tensor:
        """Add the positions to (batch, height * width, channels) tokens."""
        return tokens + sincos_positions(grid, tokens.shape[2], tokens.device, tokens.dtype)
