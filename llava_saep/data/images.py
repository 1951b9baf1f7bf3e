"""Image files to pixel values, by LLaVA's rules.

Every image becomes RGB first: alpha is dropped without compositing, palettes are resolved, EXIF orientation is not
applied (released models were trained that way; load_image has a switch). Sizes come from the tower's image processor,
whose PIL back end gives the values that LLaVA's towers saw; torchvision is not used.

With "anyres" (LLaVA-1.6) an image becomes a stack of crops, each as large as a tower's input: first a view of the whole
image, squeezed into that size, then the tiles of a larger picture of it, row by row.
"""

import ast
import functools
import logging
import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar, get_args

from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from llava_saep.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

ImageProcessor = Any  # a transformers image processor with the PIL back end
AspectRatio = Literal["square", "pad", "anyres"]
GridPinpoints = tuple[tuple[int, int], ...]
"""Sizes that an image may be brought to before it is cut into tiles: (width, height) in pixels, LLaVA's order."""


class ImageSize(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int


class TileGrid(NamedTuple):
    """How many tiles an image is cut into, downwards and across."""

    rows: int
    columns: int


MAX_IMAGE_PIXELS = 178_956_970
"""Images above this are refused before they are decoded; Pillow's own limit for a decompression bomb."""

MAX_SIDE_RATIO = 200
"""Longest over shortest side. A thinner image would be resized to a strip of gigabytes before its centre is cut out."""

_REDUCING_GAP = 2

DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    NotImplementedError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders raise on damaged files, and on kinds of them that they do not know."""


def load_image(
    path: str | os.PathLike[str] | BinaryIO,
    *,
    apply_exif_orientation: bool = False,
    name: str | None = None,
    smallest_size: Callable[[ImageSize], ImageSize] | None = None,
) -> Image.Image:
    """Read an image file completely and return it as RGB.

    Args:
        path: any file that Pillow reads, or one that is open.
        name: what messages call it; None: its path.
        apply_exif_orientation: turn the image as its EXIF tag says. LLaVA does not.
        smallest_size: from the image's size as stored, the smallest that will do: a JPEG is then decoded at 1/2, 1/4 or
            1/8 of its size where that leaves no side shorter, which is faster and changes pixels slightly. None, as in
            LLaVA: the whole image.
    Raises:
        UserError: the file is missing, unreadable, truncated, not an image, or has more than MAX_IMAGE_PIXELS.
    """

    def load(image: Image.Image) -> Image.Image:
        if smallest_size is not None:
            height, width = smallest_size(ImageSize(image.height, image.width))
            image.draft(None, (width, height))  # other formats than JPEG ignore it
        image.load()
        return to_rgb(turn_upright(image) if apply_exif_orientation else image)

    return _with_opened(path, load, name)


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF tag says; one without a tag stays as it is."""
    return ImageOps.exif_transpose(image)


def read_image_size(path: str | os.PathLike[str], *, apply_exif_orientation: bool = False) -> ImageSize:
    """Read an image's size from the head of its file, as `load_image` would find it.

    Raises:
        UserError: as `load_image`, as far as the head of the file shows it.
    """

    def read(image: Image.Image) -> ImageSize:
        is_on_its_side = apply_exif_orientation and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return ImageSize(image.width, image.height) if is_on_its_side else ImageSize(image.height, image.width)

    return _with_opened(path, read)


def _with_opened(
    file: str | os.PathLike[str] | BinaryIO, read: Callable[[Image.Image], T], name: str | None = None
) -> T:
    """Return what `read` makes of an image file whose head has been read; its errors become UserErrors."""
    path = file if name is None else name
    try:
        with Image.open(file) as image:
            _refuse_huge(path, image.size)
            return read(image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: refused as a possible decompression bomb ({error})") from error
    except UserError:
        raise
    except DECODER_ERRORS as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); replace the file or leave it out") from error


def preprocess_image(
    image: Image.Image, image_processor: ImageProcessor, aspect_ratio: str, grid_pinpoints: GridPinpoints = ()
) -> Tensor:
    """Turn an image into the pixel values of one tower input, or of several with "anyres".

    Args:
        image: any mode; converted to RGB when it is not.
        image_processor: the tower's, with the PIL back end.
        aspect_ratio: "square" resizes the short edge and cuts out the centre (LLaVA's name: the sides are lost);
            "pad" extends the image to a square with the processor's mean colour first; "anyres" makes crops.
        grid_pinpoints: with "anyres", what the image may be brought to; () for `default_grid_pinpoints`.
    Returns:
        (3, height, width) float tensor, height and width as processed_image_size says; with "anyres"
        (crops, 3, height, width).
    Raises:
        UserError: an unknown aspect ratio, an image too thin to be processed, or impossible pinpoints.
    """
    check_aspect_ratio(aspect_ratio)
    if image.mode != "RGB":
        image = to_rgb(image)
    if aspect_ratio == "anyres":
        crops = cut_into_crops(image, processed_image_size(image_processor), grid_pinpoints)
        # They have their size. DINOv2's processor would enlarge each and cut its margins off.
        return image_processor(crops, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    refuse_thin(image.size)
    if aspect_ratio == "pad":
        image = expand_to_square(image, mean_color(image_processor))
    return image_processor(image, return_tensors="pt")["pixel_values"][0]


def processed_image_size(image_processor: ImageProcessor) -> ImageSize:
    """Return the size in pixels of what preprocess_image makes.

    Raises:
        UserError: the processor does not make images of one fixed size.
    """
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else image_processor.size
    if size is not None and size.get("height") and size.get("width"):
        return ImageSize(size["height"], size["width"])
    raise UserError(
        f"the image processor {type(image_processor).__name__} has no fixed output size (size {image_processor.size}); "
        "use one that crops or resizes to height x width"
    )


def smallest_decoded_size(original: ImageSize, image_processor: ImageProcessor, aspect_ratio: str) -> ImageSize:
    """Return the size below which a JPEG must not be decoded: twice what "square" or "pad" resizes its content to.

    The factor is Pillow's own for thumbnails; docs/results.md has what it costs and spares.
    """
    size = image_processor.size
    sides = [size[name] for name in ("height", "width", "shortest_edge") if size.get(name)]
    if aspect_ratio != "pad" and len(sides) == 2:
        return ImageSize(*(_REDUCING_GAP * side for side in sides))
    side = max(original) if aspect_ratio == "pad" else min(original)
    return ImageSize(*(math.ceil(_REDUCING_GAP * length * max(sides) / side) for length in original))


def expand_to_square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Centre an RGB image on a square of its longer side; of an odd margin, bottom or right get the larger half."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def mean_color(image_processor: ImageProcessor) -> tuple[int, int, int]:
    """Return the processor's mean as an 8-bit colour, rounded down as LLaVA does."""
    red, green, blue = (int(channel * 255) for channel in image_processor.image_mean)
    return red, green, blue


def check_aspect_ratio(aspect_ratio: str) -> None:
    """Raise a UserError when `aspect_ratio` is not one that preprocess_image knows."""
    if aspect_ratio not in get_args(AspectRatio):
        raise UserError(f"unknown image_aspect_ratio {aspect_ratio!r}; known: {', '.join(get_args(AspectRatio))}")


# Crops


def parse_grid_pinpoints(value: str | Sequence[Sequence[int]] | None) -> GridPinpoints:
    """Read `image_grid_pinpoints` as LLaVA writes it: a list of (width, height), or the same as text.

    Returns:
        the pairs in their order, which decides between equally good ones; () when there is nothing.
    Raises:
        UserError: something else.
    """
    try:
        listed = ast.literal_eval(value) if isinstance(value, str) and value.strip() else value or ()
        pinpoints = tuple((width, height) for width, height in listed)
    except (ValueError, TypeError, SyntaxError):
        pinpoints = None
    if pinpoints is None or not all(type(side) is int and side > 0 for pair in pinpoints for side in pair):
        raise UserError(
            f"image_grid_pinpoints {value!r}: expected pairs of width and height in pixels, such as "
            "'[(336, 672), (672, 336), (672, 672)]'"
        )
    return pinpoints


def default_grid_pinpoints(view: ImageSize) -> GridPinpoints:
    """Return LLaVA-1.6's five arrangements, 1x2, 2x1, 2x2, 3x1 and 1x3 tiles, for tiles of any size."""
    arrangements = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    return tuple((columns * view.width, rows * view.height) for columns, rows in arrangements)


def select_resolution(original: ImageSize, grid_pinpoints: GridPinpoints) -> ImageSize:
    """Choose the size that keeps most of an image's pixels and, among equals, wastes the least; then the first one.

    Raises:
        UserError: there is none to choose from.
    """
    if not grid_pinpoints:
        raise UserError("image_aspect_ratio 'anyres' needs image_grid_pinpoints, the sizes that an image may take")

    def merit(pinpoint: tuple[int, int]) -> tuple[int, int]:
        width, height = pinpoint
        scale = min(width / original.width, height / original.height)
        resized = int(original.width * scale) * int(original.height * scale)
        num_kept = min(resized, original.width * original.height)
        return num_kept, num_kept - width * height

    width, height = max(grid_pinpoints, key=merit)  # max returns the first of equals
    return ImageSize(height, width)


def select_tile_grid(original: ImageSize, view: ImageSize, grid_pinpoints: GridPinpoints) -> TileGrid:
    """Return how an image of size `original` is cut into tiles of size `view`.

    Raises:
        UserError: the chosen size is no multiple of the tile's.
    """
    target = select_resolution(original, grid_pinpoints)
    if target.height % view.height or target.width % view.width:
        raise UserError(
            f"image_grid_pinpoints holds ({target.width}, {target.height}), which cannot be cut into tiles of "
            f"{view.width} x {view.height} pixels, the size that the image processor makes; use multiples of it"
        )
    return TileGrid(target.height // view.height, target.width // view.width)


def cut_into_crops(image: Image.Image, view: ImageSize, grid_pinpoints: GridPinpoints = ()) -> list[Image.Image]:
    """Squeeze an RGB image into one view, and cut its larger picture into tiles of the same size.

    Returns:
        the view of the whole image, then the tiles row by row.
    """
    pinpoints = grid_pinpoints or default_grid_pinpoints(view)
    rows, columns = select_tile_grid(ImageSize(image.height, image.width), view, pinpoints)
    picture = fit_on_black(image, ImageSize(rows * view.height, columns * view.width))
    corners = [(column * view.width, row * view.height) for row in range(rows) for column in range(columns)]
    tiles = [picture.crop((left, top, left + view.width, top + view.height)) for left, top in corners]
    return [image.resize((view.width, view.height), Image.Resampling.BICUBIC), *tiles]


def fitted_size(original: ImageSize, target: ImageSize) -> ImageSize:
    """Return the size that an image is resized to so that it fits into `target`, keeping its proportions."""
    scale_across, scale_down = target.width / original.width, target.height / original.height
    if scale_across < scale_down:
        return ImageSize(min(math.ceil(original.height * scale_across), target.height), target.width)
    return ImageSize(target.height, min(math.ceil(original.width * scale_down), target.width))


def fit_on_black(image: Image.Image, target: ImageSize) -> Image.Image:
    """Resize an RGB image as far as it fits, keeping its proportions, and centre it on black."""
    height, width = fitted_size(ImageSize(image.height, image.width), target)
    picture = Image.new("RGB", (target.width, target.height), (0, 0, 0))
    picture.paste(
        image.resize((width, height), Image.Resampling.BICUBIC),
        ((target.width - width) // 2, (target.height - height) // 2),
    )
    return picture


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert as LLaVA does."""
    if image.mode.startswith("I"):
        _warn_about_clipping(image.mode)
    return image.convert("RGB")


@functools.cache
def _warn_about_clipping(mode: str) -> None:
    logger.warning(
        "an image has more than 8 bits per channel (mode %s): values above 255 are clipped, as in LLaVA. "
        "Convert such files to 8 bits to keep their contrast.",
        mode,
    )


def _refuse_huge(path: str | os.PathLike[str], size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_IMAGE_PIXELS:
        raise UserError(
            f"{path}: {width} x {height} pixels; more than {MAX_IMAGE_PIXELS} are refused. Store a smaller version."
        )


def refuse_thin(size: tuple[int, int]) -> None:
    """Refuse images that are cheap to store but whose square or short-edge resize would fill the memory."""
    width, height = size
    if max(size) > MAX_SIDE_RATIO * min(size):
        raise UserError(
            f"an image of {width} x {height} pixels is too thin to be resized: its sides may differ by a "
            f"factor of {MAX_SIDE_RATIO} at most"
        )
