"""Where the tokens of an image lie on it, in pixels of the image before it was resized, padded, cropped or cut.

Nothing is computed from weights: the arithmetic of preprocessing (llava_saep/data/images.py and the image processor's)
is followed backwards. A token's cell is its share of the map that its projector makes of a crop; what a token has seen
of the rest of the image, through attention or wide kernels, does not show.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llava_saep.data.images import (
    ImageProcessor,
    ImageSize,
    TileGrid,
    fitted_size,
    processed_image_size,
    select_tile_grid,
)
from llava_saep.model.anyres import ImageTokens, unpadded_window
from projectors import PatchGrid

WHOLE = "whole image"
TILES = "tiles"


class Span(NamedTuple):
    """Where a row or a column of tokens begins and ends, in pixels; beyond the image where it was padded."""

    start: float
    end: float


@dataclass(frozen=True)
class TokenMap:
    """Tokens of an image that lie side by side.

    Attributes:
        part: WHOLE or TILES (of an image that was cut).
        rows, columns: where each row and column of tokens lies, from above and from the left.
        first: index of the first token among those of the image.
        stride: tokens from one row's first to the next one's; more than columns where rows end with a newline.
    """

    part: str
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    first: int
    stride: int

    def arrange(self, values: np.ndarray) -> np.ndarray:
        """Pick this map's values from those of the image's tokens: (..., tokens) -> (..., rows, columns)."""
        height, width = len(self.rows), len(self.columns)
        own = values[..., self.first : self.first + height * self.stride]
        return own.reshape(*values.shape[:-1], height, self.stride)[..., :width]


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of one image.

    Attributes:
        size: of the image, in pixels.
        num_tokens: of the image, in all.
        maps: where tokens lie; none where they have no place, such as learned queries.
    """

    size: ImageSize
    num_tokens: int
    maps: tuple[TokenMap, ...]


@dataclass(frozen=True)
class _Crop:
    """One input of the tower: where its pixels were in the image.

    A pixel (x, y) of the crop was at (left + x * across, top + y * down).
    """

    left: float
    top: float
    across: float
    down: float


def layout_tokens(
    image_tokens: ImageTokens, image_processor: ImageProcessor, aspect_ratio: str, size: ImageSize
) -> TokenLayout:
    """Find where the tokens of an image of `size` lie.

    Args:
        image_tokens, aspect_ratio: the model's.
        image_processor: the first tower's.
    Raises:
        UserError: the image cannot be cut so.
    """
    view = processed_image_size(image_processor)
    if aspect_ratio == "anyres":
        return _layout_of_crops(image_tokens, view, size)
    grid = image_tokens.projector.token_grid(image_tokens.patch_grid(view))
    num_tokens = image_tokens.num_tokens_of_view(view)
    if grid is None:
        return TokenLayout(size, num_tokens, ())
    crop = _padded_crop(image_processor, size) if aspect_ratio == "pad" else _resized_crop(image_processor, size)
    return TokenLayout(size, num_tokens, (_map_of_crop(image_tokens, view, grid, crop, WHOLE, 0),))


def _resized_crop(image_processor: ImageProcessor, size: ImageSize) -> _Crop:
    """Follow an image processor's resizing and its crop of the centre backwards."""
    resized = _resized(image_processor, size) if image_processor.do_resize else size
    across, down = size.width / resized.width, size.height / resized.height
    if not getattr(image_processor, "do_center_crop", False):  # SigLIP's has no such setting
        return _Crop(0.0, 0.0, across, down)
    cut = image_processor.crop_size  # where it is larger, the image is padded, and the margins are negative
    left, top = (resized.width - cut["width"]) // 2, (resized.height - cut["height"]) // 2
    return _Crop(left * across, top * down, across, down)


def _resized(image_processor: ImageProcessor, size: ImageSize) -> ImageSize:
    """Return the size that an image processor brings an image to, before it cuts anything off."""
    target = image_processor.size
    if target.get("shortest_edge"):
        side, longer = target["shortest_edge"], max(size)
        scaled = int(side * longer / min(size))
        return ImageSize(side, scaled) if size.height <= size.width else ImageSize(scaled, side)
    return ImageSize(target["height"], target["width"])


def _padded_crop(image_processor: ImageProcessor, size: ImageSize) -> _Crop:
    side = max(size)
    crop = _resized_crop(image_processor, ImageSize(side, side))
    left, top = (side - size.width) // 2, (side - size.height) // 2
    return _Crop(crop.left - left, crop.top - top, crop.across, crop.down)


def _map_of_crop(
    image_tokens: ImageTokens, view: ImageSize, grid: PatchGrid, crop: _Crop, part: str, first: int
) -> TokenMap:
    rows, columns = _spans_of_crop(image_tokens, view, grid, crop)
    return TokenMap(part, rows, columns, first, grid.width)


def _spans_of_crop(
    image_tokens: ImageTokens, view: ImageSize, grid: PatchGrid, crop: _Crop
) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """Divide what the tower's patches cover of a crop among rows and columns of tokens, in equal shares.

    A tower drops what is left of a crop right and below where the patch size does not divide it.
    """
    patches = image_tokens.patch_grid(view)
    height = patches.height * image_tokens.patch_size * crop.down
    width = patches.width * image_tokens.patch_size * crop.across
    return tuple(_shares(crop.top, height, grid.height)), tuple(_shares(crop.left, width, grid.width))


def _shares(start: float, length: float, count: int) -> Iterator[Span]:
    for index in range(count):
        yield Span(start + length * index / count, start + length * (index + 1) / count)


def _layout_of_crops(image_tokens: ImageTokens, view: ImageSize, size: ImageSize) -> TokenLayout:
    """Find where the tokens of an image lie that is cut into a view of the whole and tiles."""
    num_tokens = image_tokens.num_tokens(size, view)
    grid = image_tokens.projector.token_grid(image_tokens.patch_grid(view))
    if grid is None:
        return TokenLayout(size, num_tokens, ())
    per_view = image_tokens.num_tokens_of_view(view)
    squeezed = _Crop(0.0, 0.0, size.width / view.width, size.height / view.height)
    whole = _map_of_crop(image_tokens, view, grid, squeezed, WHOLE, 0)
    tiles = select_tile_grid(size, view, image_tokens.grid_pinpoints)
    crops = _tile_crops(view, size, tiles)
    if image_tokens.patch_merge_type == "flat":
        maps = [
            _map_of_crop(image_tokens, view, grid, crop, TILES, (index + 1) * per_view)
            for index, crop in enumerate(crop for row in crops for crop in row)
        ]
        return TokenLayout(size, num_tokens, (whole, *maps))
    rows = [span for row in crops for span in _spans_of_crop(image_tokens, view, grid, row[0])[0]]
    columns = [span for crop in crops[0] for span in _spans_of_crop(image_tokens, view, grid, crop)[1]]
    joined = _joined_map(image_tokens, size, rows, columns, per_view)
    return TokenLayout(size, num_tokens, (whole, joined) if joined.rows and joined.columns else (whole,))


def _tile_crops(view: ImageSize, size: ImageSize, tiles: TileGrid) -> list[list[_Crop]]:
    """Find where the pixels of each tile were, row by row; the picture they are cut from is centred on black."""
    target = ImageSize(tiles.rows * view.height, tiles.columns * view.width)
    fitted = fitted_size(size, target)
    across, down = size.width / fitted.width, size.height / fitted.height
    left, top = (target.width - fitted.width) // 2, (target.height - fitted.height) // 2
    return [
        [
            _Crop((column * view.width - left) * across, (row * view.height - top) * down, across, down)
            for column in range(tiles.columns)
        ]
        for row in range(tiles.rows)
    ]


def _joined_map(
    image_tokens: ImageTokens, size: ImageSize, rows: Sequence[Span], columns: Sequence[Span], first: int
) -> TokenMap:
    """The map of all tiles' tokens, without what merging cuts off."""
    if not image_tokens.has_newline:
        return TokenMap(TILES, tuple(rows), tuple(columns), first, len(columns))
    window = unpadded_window(PatchGrid(len(rows), len(columns)), size)
    kept_rows = tuple(rows[window.top : window.top + window.height])
    kept_columns = tuple(columns[window.left : window.left + window.width])
    return TokenMap(TILES, kept_rows, kept_columns, first, window.width + 1)
