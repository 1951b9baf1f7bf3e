"""Image files as clients send them, good and bad, as bytes."""

import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """An image as a file's content."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    """An image whose pixels all differ, so that turning or scaling it shows."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))


def sideways_jpeg(width: int = 24, height: int = 16) -> bytes:
    """A photograph of a phone that was held upright: stored lying, with the tag that says so."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(gradient(width, height), "JPEG", exif=exif)


def sixteen_bit_png() -> bytes:
    """Grey from black to white in 16 bits."""
    return encoded(Image.fromarray(np.linspace(0, 65535, 24 * 16).reshape(16, 24).astype(np.uint16)))


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose head announces any size: what a decompression bomb looks like."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
HTML = b"<!DOCTYPE html><html><script>alert(1)</script></html>"
