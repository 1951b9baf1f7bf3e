"""Image files to pixel values, by LLaVA's rules.

Every image becomes RGB first: alpha is dropped without compositing, palettes are resolved, EXIF orientation is not
applied (released models were trained that way; load_image has a switch). Sizes come from the tower's image processor,
whose PIL back end gives the values that LLaVA's towers saw; torchvision is not used.
"""

import functools
import logging
import os
import struct
import zlib
from collections.abc import Callable
from typing import Any, Literal, get_args

from PIL import Image, ImageOps
from torch import Tensor

from llava_saep.errors import UserError

logger = logging.getLogger(__name__)

ImageProcessor = Any  # a transformers image processor with the PIL back end
AspectRatio = Literal["square", "pad"]

MAX_IMAGE_PIXELS = 178_956_970
"""Images above this are refused before they are decoded; Pillow's own limit for a decompression bomb."""

MAX_SIDE_RATIO = 200
"""Longest over shortest side. A thinner image would be resized to a strip of gigabytes before its centre is cut out."""

_DECODER_ERRORS = (
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


def load_image(path: str | os.PathLike[str], *, apply_exif_orientation: bool = False) -> Image.Image:
    """Read an image file completely and return it as RGB.

    Args:
        path: any file that Pillow reads.
        apply_exif_orientation: turn the image as its EXIF tag says. LLaVA does not.
    Raises:
        UserError: the file is missing, unreadable, truncated, not an image, or has more than MAX_IMAGE_PIXELS.
    """
    try:
        with Image.open(path) as image:
            _refuse_huge(path, image.size)
            image.load()
            if apply_exif_orientation:
                image = ImageOps.exif_transpose(image)
            return _to_rgb(image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file; check the image folder and the record's 'image'") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: refused as a possible decompression bomb ({error})") from error
    except UserError:
        raise
    except _DECODER_ERRORS as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); replace the file or leave it out") from error


def preprocess_image(image: Image.Image, image_processor: ImageProcessor, aspect_ratio: str) -> Tensor:
    """Turn an image into the pixel values of one tower input.

    Args:
        image: any mode; converted to RGB when it is not.
        image_processor: the tower's, with the PIL back end.
        aspect_ratio: "square" resizes the short edge and cuts out the centre (LLaVA's name: the sides are lost);
            "pad" extends the image to a square with the processor's mean colour first.
    Returns:
        (3, height, width) float tensor, height and width as processed_image_size says.
    Raises:
        UserError: an unknown aspect ratio, or an image too thin to be processed.
    """
    _refuse_thin(image.size)
    if image.mode != "RGB":
        image = _to_rgb(image)
    image = _preparation(aspect_ratio)(image, image_processor)
    return image_processor(image, return_tensors="pt")["pixel_values"][0]


def processed_image_size(image_processor: ImageProcessor) -> tuple[int, int]:
    """Return (height, width) in pixels of what preprocess_image makes.

    Raises:
        UserError: the processor does not make images of one fixed size.
    """
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else image_processor.size
    if size is not None and size.get("height") and size.get("width"):
        return size["height"], size["width"]
    raise UserError(
        f"the image processor {type(image_processor).__name__} has no fixed output size (size {image_processor.size}); "
        "use one that crops or resizes to height x width"
    )


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
    _preparation(aspect_ratio)


def _preparation(aspect_ratio: str) -> Callable[[Image.Image, ImageProcessor], Image.Image]:
    """Return what happens to an image before the processor sees it."""
    preparations: dict[str, Callable[[Image.Image, ImageProcessor], Image.Image]] = {
        "square": lambda image, image_processor: image,
        "pad": lambda image, image_processor: expand_to_square(image, mean_color(image_processor)),
    }
    if aspect_ratio not in preparations:
        raise UserError(f"unknown image_aspect_ratio {aspect_ratio!r}; known: {', '.join(get_args(AspectRatio))}")
    return preparations[aspect_ratio]


def _to_rgb(image: Image.Image) -> Image.Image:
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


def _refuse_thin(size: tuple[int, int]) -> None:
    """Refuse images that are cheap to store but whose square or short-edge resize would fill the memory."""
    width, height = size
    if max(size) > MAX_SIDE_RATIO * min(size):
        raise UserError(
            f"an image of {width} x {height} pixels is too thin to be resized: its sides may differ by a "
            f"factor of {MAX_SIDE_RATIO} at most"
        )
