"""Deformable attention (Deformable DETR, arXiv 2010.04159) over one map of patches, in plain torch.

A query does not compare itself with every patch: it names a few places around its reference point and weighs what it
finds there. Places between patches are read bilinearly; outside the map there is zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._base import PatchGrid
from .initialization import copy_, zeros_


class DeformableAttention(nn.Module):
    """`num_points` places per head, relative to each query's reference point, and a softmax over them.

    Offsets are in patches, so that what they mean does not depend on the size of the map. Submodule names are those of
    Deformable DETR.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        self.num_heads, self.num_points = num_heads, num_points
        self.sampling_offsets = nn.Linear(hidden_size, num_heads * num_points * 2)
        self.attention_weights = nn.Linear(hidden_size, num_heads * num_points)
        self.value_proj = nn.Linear(hidden_size, hidden_size)
        self.output_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, queries: Tensor, features: Tensor, grid: PatchGrid, reference_points: Tensor) -> Tensor:
        """Read the map around the reference points.

        Args:
            queries: (batch, queries, hidden_size), from which offsets and weights are computed.
            features: (batch, grid.height * grid.width, hidden_size), row-major.
            reference_points: (batch or 1, queries, 2) as x, y; 0 is the left or upper edge of the map, 1 the other.
        Returns:
            (batch, queries, hidden_size)
        """
        values = self.value_proj(features).unflatten(2, (self.num_heads, -1))
        offsets = self.sampling_offsets(queries).unflatten(2, (self.num_heads, self.num_points, 2))
        weights = self.attention_weights(queries).unflatten(2, (self.num_heads, self.num_points)).softmax(3)
        locations = sampling_locations(reference_points, offsets, grid)
        return self.output_proj(weighted_samples(values, grid, locations, weights))

    def reset_offsets_to_rings(self) -> None:
        """Deformable DETR's start: point i of head h lies i + 1 patches away in the h-th of num_heads directions.

        The same for every query, because the offsets' weights are zero; the attention weights are uniform.
        """
        for tensor in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            zeros_(tensor)
        copy_(self.sampling_offsets.bias, ring_offsets(self.num_heads, self.num_points).flatten())


def ring_offsets(num_heads: int, num_points: int) -> Tensor:
    """(heads, points, 2) offsets as x, y in patches, on squares around the reference point; head 0 to the right."""
    angles = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
    directions = torch.stack([angles.cos(), angles.sin()], dim=1)
    directions = directions / directions.abs().amax(dim=1, keepdim=True)
    distances = torch.arange(1, num_points + 1, dtype=torch.float32)
    return directions[:, None, :] * distances[None, :, None]


def sampling_locations(reference_points: Tensor, offsets: Tensor, grid: PatchGrid) -> Tensor:
    """Reference points moved by offsets.

    Args:
        reference_points: (batch or 1, queries, 2) as x, y from 0 to 1.
        offsets: (batch, queries, heads, points, 2) as x, y in patches.
    Returns:
        (batch, queries, heads, points, 2) as x, y; at least float32, because half a patch of a large map is less than
        what bfloat16 resolves.
    """
    dtype = _sampling_dtype(offsets)
    # Python's numbers instead of a tensor: nothing to move to the device.
    scaled = torch.stack([offsets[..., 0].to(dtype) / grid.width, offsets[..., 1].to(dtype) / grid.height], dim=-1)
    return reference_points[:, :, None, None] + scaled


def weighted_samples(values: Tensor, grid: PatchGrid, locations: Tensor, weights: Tensor) -> Tensor:
    """Bilinear samples of a map, summed with weights.

    Args:
        values: (batch, grid.height * grid.width, heads, channels), row-major.
        locations: (batch, queries, heads, points, 2) as x, y from 0 to 1; outside of that the map is zero.
        weights: (batch, queries, heads, points)
    Returns:
        (batch, queries, heads * channels) in the dtype of values
    """
    batch_size, num_queries, num_heads = weights.shape[:3]
    channels = values.shape[3]
    dtype = _sampling_dtype(values)
    # (batch * heads, channels, height, width)
    maps = values.permute(0, 2, 3, 1).to(dtype).flatten(0, 1).unflatten(2, (grid.height, grid.width))
    # (batch * heads, queries, points, 2); grid_sample counts from -1 to 1.
    locations = locations.transpose(1, 2).flatten(0, 1).to(dtype) * 2 - 1
    sampled = functional.grid_sample(maps, locations, mode="bilinear", padding_mode="zeros", align_corners=False)
    weights = weights.transpose(1, 2).flatten(0, 1).to(dtype)
    summed = (sampled * weights[:, None]).sum(3)
    return summed.view(batch_size, num_heads, channels, num_queries).permute(0, 3, 1, 2).flatten(2).to(values.dtype)


def _sampling_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
