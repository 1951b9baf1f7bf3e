"""How an image that was cut into crops becomes one run of tokens, and how many: LLaVA-1.6's patch merging.

"flat" lines the crops up, one behind the other. The "spatial" ways put the tokens of the tiles together as one map,
which "spatial_unpad" crops to the part that shows the image, with a learned newline token behind each row. The map is
that of the projector's tokens, so a projector that makes fewer of them makes a smaller map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from llava_saep.data.images import GridPinpoints, ImageSize, TileGrid, select_tile_grid
from llava_saep.errors import UserError
from projectors import PatchGrid, ProjectorConfig

PatchMergeType = Literal["flat", "spatial", "spatial_unpad"]


def check_patch_merge_type(patch_merge_type: str) -> None:
    """Raise a UserError when there is no such way to put crops together."""
    if patch_merge_type not in get_args(PatchMergeType):
        known = ", ".join(get_args(PatchMergeType))
        raise UserError(f"unknown mm_patch_merge_type {patch_merge_type!r}; known: {known}")


class Window(NamedTuple):
    """A part of a map: its first row and column, and its size; either side may be 0."""

    top: int
    left: int
    height: int
    width: int


def unpadded_window(grid: PatchGrid, original: ImageSize) -> Window:
    """Find the part of a map of tiles that shows the image and not the black beside it.

    The length is rounded down and the margins are cut symmetrically, as LLaVA does. So a thin image can lose all its
    rows (nothing but the view of the whole is left) or all its columns (a newline per row is left).
    """
    if original.width / original.height > grid.width / grid.height:
        height = int(original.height * (grid.width / original.width))
        margin = (grid.height - height) // 2
        return Window(margin, 0, grid.height - 2 * margin, grid.width)
    width = int(original.width * (grid.height / original.height))
    margin = (grid.width - width) // 2
    return Window(0, margin, grid.height, grid.width - 2 * margin)


@dataclass(frozen=True)
class ImageTokens:
    """How many tokens an image has, and in which order.

    Attributes:
        projector: what makes tokens of one crop.
        patch_size: side of the tower's patches in pixels.
        patch_merge_type: how the crops of an image are put together.
        grid_pinpoints: sizes that an image may be brought to before it is cut; () where images are not cut.
    """

    projector: ProjectorConfig
    patch_size: int
    patch_merge_type: PatchMergeType = "flat"
    grid_pinpoints: GridPinpoints = ()

    def __post_init__(self) -> None:
        check_patch_merge_type(self.patch_merge_type)

    @property
    def has_newline(self) -> bool:
        """Whether rows end with a learned token."""
        return self.patch_merge_type == "spatial_unpad"

    def patch_grid(self, view: ImageSize) -> PatchGrid:
        """Return the patch map of one crop of `view` pixels."""
        return PatchGrid(view.height // self.patch_size, view.width // self.patch_size)

    def num_tokens_of_view(self, view: ImageSize) -> int:
        """Count the tokens of an image that is shown as one crop."""
        return self.projector.num_output_tokens(self.patch_grid(view))

    def num_tokens(self, original: ImageSize, view: ImageSize) -> int:
        """Count the tokens of an image of size `original` that is shown in crops of size `view`.

        Raises:
            UserError: the image cannot be cut so, or the projector's tokens form no map to put together.
        """
        num_tokens_of_view = self.num_tokens_of_view(view)
        tiles = select_tile_grid(original, view, self.grid_pinpoints)
        if self.patch_merge_type == "flat":
            return (1 + tiles.rows * tiles.columns) * num_tokens_of_view
        grid = self._joined_grid(view, tiles)
        if not self.has_newline:
            return num_tokens_of_view + grid.num_patches
        window = unpadded_window(grid, original)
        return num_tokens_of_view + window.height * (window.width + 1)

    def max_tokens(self, view: ImageSize) -> int:
        """Return the most tokens that any image can have: one that fills a pinpoint leaves nothing to be cut off."""
        return max(self.num_tokens(ImageSize(height, width), view) for width, height in self.grid_pinpoints)

    def merge(self, crops: Tensor, original: ImageSize, view: ImageSize, newline: Tensor | None) -> Tensor:
        """Put the tokens of an image's crops in order.

        Args:
            crops: (crops, tokens, width), the view of the whole image first, then the tiles row by row. A lone crop
                was not cut; with spatial_unpad it gets one newline, as in LLaVA.
            newline: (width,), where rows end with it.
        Returns:
            (num_tokens, width)
        Raises:
            UserError: there are other crops than the image's size and the pinpoints give.
        """
        if self.patch_merge_type == "flat":
            return crops.flatten(0, 1)
        if len(crops) == 1:
            return crops[0] if newline is None else torch.cat([crops[0], newline.to(crops)[None]])
        tiles = select_tile_grid(original, view, self.grid_pinpoints)
        if len(crops) != 1 + tiles.rows * tiles.columns:
            raise UserError(
                f"an image of {original.width} x {original.height} pixels came in {len(crops)} crops, but "
                f"image_grid_pinpoints cuts it into {tiles.columns} x {tiles.rows} tiles and one view of the whole"
            )
        joined = self._join_tiles(crops[1:], view, tiles)
        if newline is not None:
            window = unpadded_window(PatchGrid(*joined.shape[:2]), original)
            joined = joined[window.top : window.top + window.height, window.left : window.left + window.width]
            ends = newline.to(joined).expand(window.height, 1, -1)
            joined = torch.cat([joined, ends], dim=1)
        return torch.cat([crops[0], joined.flatten(0, 1)])

    def _crop_grid(self, view: ImageSize) -> PatchGrid:
        """Return the map that the projector's tokens of one crop form."""
        grid = self.projector.token_grid(self.patch_grid(view))
        if grid is None:
            raise UserError(
                f"mm_patch_merge_type {self.patch_merge_type!r} puts the tokens of an image's tiles together as one "
                f"map, but those of {type(self.projector).__name__.removesuffix('Config')} form none (learned "
                "queries, a class token or appended tokens); use --mm_patch_merge_type flat"
            )
        return grid

    def _joined_grid(self, view: ImageSize, tiles: TileGrid) -> PatchGrid:
        grid = self._crop_grid(view)
        return PatchGrid(tiles.rows * grid.height, tiles.columns * grid.width)

    def _join_tiles(self, crops: Tensor, view: ImageSize, tiles: TileGrid) -> Tensor:
        """(tiles, tokens, width), row by row -> one (height, width, channels) map."""
        grid = self._crop_grid(view)
        # (tile row, tile column, row, column, channels) -> (tile row, row, tile column, column, channels)
        laid_out = crops.unflatten(1, tuple(grid)).unflatten(0, tuple(tiles)).transpose(1, 2)
        return laid_out.flatten(2, 3).flatten(0, 1)


def merge_all(
    image_tokens: ImageTokens,
    features: Tensor,
    crop_counts: Sequence[int],
    originals: Sequence[ImageSize] | None,
    view: ImageSize,
    newline: Tensor | None,
) -> list[Tensor]:
    """Put the tokens of each image of a batch in order.

    Args:
        features: (crops of all images, tokens, width), image by image.
        originals: one size per image; None where the way of merging needs none.
    Returns:
        one (num_tokens, width) tensor per image. The newline, if any, is in the graph of each, also where no row of
        the image is left or there was no image to cut, so that all ranks of a ZeRO run reduce its gradient.
    Raises:
        UserError: sizes are missing, or do not fit the crops.
    """
    needs_sizes = image_tokens.patch_merge_type != "flat" and any(count > 1 for count in crop_counts)
    if originals is None and needs_sizes:
        raise UserError(f"mm_patch_merge_type {image_tokens.patch_merge_type!r} needs image_sizes beside pixel_values")
    originals = [view] * len(crop_counts) if originals is None else originals
    if len(originals) != len(crop_counts):
        raise UserError(f"image_sizes has {len(originals)} rows, but there are {len(crop_counts)} images")
    parts = features.split(list(crop_counts))
    return [
        image_tokens.merge(crops, original, view, newline) for crops, original in zip(parts, originals, strict=True)
    ]
