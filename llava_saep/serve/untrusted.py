"""Images that came over the network: what they are is read from their content, and they are refused before they cost.

Pillow can open dozens of formats, some with decoders that nobody looks at; five are let in here. A picture is turned as
its EXIF tag says, since whoever sent it has seen it so; training and evaluation do that only where the checkpoint does.
"""

import io

from PIL import Image, UnidentifiedImageError

from llava_saep.data.images import DECODER_ERRORS, ImageSize, refuse_thin, to_rgb, turn_upright
from llava_saep.errors import UserError
from llava_saep.serve.limits import Limits

ALLOWED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Pillow's names. Phones write JPEGs that Pillow calls MPO (several pictures in one file); they come with JPEG."""

_MAX_HEAD_READS = 10_000
_MAX_READS = 100_000
"""Pieces in which a file is read, up to its pixels and from there on. Pillow joins the comments of a GIF one by one, in
a time that grows with the square of their number."""
_MAX_EXIF_BYTES = 65_535
"""A JPEG's segment has no more. Each of the tags in it may stand for all of it, and Pillow copies it for each."""
_MAX_SCANS = 100
"""Of a progressive JPEG, which has about ten; a scan of a hundred bytes can make the decoder visit all pixels anew."""
_RAW_EXIF = "Raw profile type exif"


def open_untrusted_image(data: bytes, limits: Limits) -> Image.Image:
    """Decode an image that somebody sent.

    Args:
        data: a whole file: PNG, JPEG, WebP, GIF or BMP, of which an animated one gives its first picture.
    Returns:
        an RGB image, upright, decoded completely. Transparency is dropped; 16 bits per channel become 8.
    Raises:
        UserError: too many bytes or pixels, another kind of file, damaged or cut off. The message says which, and
            holds nothing of this machine.
    """
    size = read_untrusted_size(data, limits)
    file = _MeteredFile(data)
    with _decoding_errors(), Image.open(file, formats=ALLOWED_FORMATS) as image:
        file.reads_left = _MAX_READS
        image.load()
        _check_exif(image)
        decoded = to_rgb(_to_eight_bits(turn_upright(image)))
    decoded.info.clear()  # profiles and comments, of any length
    refuse_thin((size.width, size.height))
    return decoded


def read_untrusted_size(data: bytes, limits: Limits) -> ImageSize:
    """Read an image's size from its head, without decoding it; errors as `open_untrusted_image`, as far as seen."""
    if not data:
        raise UserError("the image is empty; expected a PNG, JPEG, WebP, GIF or BMP file")
    if len(data) > limits.max_image_bytes:
        raise UserError(f"the image has {len(data):,} bytes, at most {limits.max_image_bytes:,} are allowed")
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > _MAX_SCANS:
        raise UserError(f"the JPEG is stored in more than {_MAX_SCANS} scans; save it anew")
    with _decoding_errors(), Image.open(_MeteredFile(data), formats=ALLOWED_FORMATS) as image:
        width, height = image.size
    if width * height > limits.max_image_pixels:
        raise UserError(
            f"the image has {width} x {height} pixels, at most {limits.max_image_pixels:,} are allowed; shrink it"
        )
    refuse_thin((width, height))
    return ImageSize(height, width)


class _MeteredFile(io.BytesIO):
    """A file whose decoder is stopped when it reads too many pieces, or a second block of a JPEG's EXIF data.

    Attributes:
        reads_left: pieces that may still be read.
    """

    def __init__(self, data: bytes):
        super().__init__(data)
        self.reads_left = _MAX_HEAD_READS
        self._has_exif = False

    def read(self, size: int | None = -1) -> bytes:
        """Read on.

        Raises:
            UserError: that was one piece too many.
        """
        self.reads_left -= 1
        if self.reads_left < 0:
            raise UserError("the image is stored in too many small pieces; save it anew")
        data = super().read(size)
        if data.startswith(b"Exif\0\0"):  # Pillow joins these blocks, and reads them when it opens the file
            if self._has_exif:
                raise UserError("the image has several blocks of EXIF data; save it without them")
            self._has_exif = True
        return data


def _check_exif(image: Image.Image) -> None:
    """Refuse EXIF data that would fill the memory when they are read."""
    found = max(len(image.info.get("exif", b"")), len(image.info.get(_RAW_EXIF, "")) // 2)  # the latter is hexadecimal
    if found > _MAX_EXIF_BYTES:
        raise UserError(
            f"the image has {found:,} bytes of EXIF data, at most {_MAX_EXIF_BYTES:,} are read; save it without them"
        )


class _decoding_errors:
    """Turns what decoders raise into a UserError. Their own texts stay out: they can name objects in memory."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, UnidentifiedImageError):
            raise UserError("the file is no image of a known kind; expected PNG, JPEG, WebP, GIF or BMP") from error
        if isinstance(error, Image.DecompressionBombError):
            raise UserError("the image has too many pixels; send a smaller one") from error
        if isinstance(error, DECODER_ERRORS) and not isinstance(error, UserError):
            raise UserError(
                "the image is damaged or cut off and cannot be read; send it again or as another kind"
            ) from error


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey values down, which a plain conversion would clip to white."""
    return image.point(lambda value: value / 256).convert("L") if image.mode.startswith("I") else image
