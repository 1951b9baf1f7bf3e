"""Small files that would take a decoder minutes or gigabytes, though they have few pixels, are refused."""

import struct
import time
import tracemalloc
import zlib

import pytest
from PIL import Image

from llava_saep.errors import UserError
from llava_saep.serve.limits import Limits
from llava_saep.serve.untrusted import open_untrusted_image
from tests.fixtures.image_files import encoded, gradient, sideways_jpeg


def exif(num_tags: int, num_bytes: int) -> bytes:
    """EXIF data of which each tag stands for the same bytes."""
    tags = b"".join(struct.pack("<HHLL", 300 + tag, 7, num_bytes, 14 + 12 * num_tags) for tag in range(num_tags))
    return b"II*\0" + struct.pack("<LH", 8, num_tags) + tags + bytes(4) + b"x" * num_bytes


def png_with(name: bytes, content: bytes) -> bytes:
    """A PNG with a chunk of one's own before its pixels."""
    png = encoded(gradient())
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return png[:33] + chunk + png[33:]


def jpeg_with_exif(content: bytes) -> bytes:
    """A JPEG whose EXIF data are cut into as many segments as they need."""
    parts = [content[start : start + 65_000] for start in range(0, len(content), 65_000)]
    segments = [b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts]
    jpeg = encoded(gradient(), "JPEG")
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def gif_with_comments(count: int) -> bytes:
    gif = encoded(Image.new("P", (4, 4)), "GIF")
    head = 13 + 3 * (2 << (gif[10] & 7))
    return gif[:head] + b"\x21\xfe\x01a\0" * count + gif[head:]


def jpeg_with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again; with 50 million pixels each takes 60 ms."""
    jpeg = encoded(gradient(64, 64), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[last:-2] * count + jpeg[-2:]


RAW_EXIF = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 1\n" + exif(300, 100_000).hex().encode())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(png_with(b"eXIf", exif(300, 100_000)), "103,620 bytes of EXIF data", id="png"),
        pytest.param(png_with(b"zTXt", RAW_EXIF), "bytes of EXIF data", id="png-text"),
        pytest.param(encoded(gradient(), "WEBP", exif=exif(300, 100_000)), "bytes of EXIF data", id="webp"),
        pytest.param(jpeg_with_exif(exif(300, 100_000)), "several blocks of EXIF data", id="jpeg"),
        pytest.param(gif_with_comments(200_000), "too many small pieces", id="gif"),
        pytest.param(jpeg_with_scans(100), "more than 100 scans", id="scans"),
        pytest.param(png_with(b"prVt", b"")[:-12] + png_with(b"prVt", b"")[33:45] * 60_000, "too many", id="chunks"),
    ],
)
def test_costly_files_are_refused_at_once(data, words):
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(UserError, match=words):
        open_untrusted_image(data, Limits())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000 + len(data)  # tags of 100 kB each are 30 MB
    assert time.process_time() - start < 5  # the GIF would take 8 and its square for more comments


@pytest.mark.parametrize(
    "data",
    [
        sideways_jpeg(),
        jpeg_with_exif(exif(100, 100)),
        jpeg_with_scans(80),
        png_with(b"eXIf", exif(3, 60_000)),
        gif_with_comments(1000),
    ],
    ids=["phone", "jpeg", "scans", "png", "gif"],
)
def test_what_cameras_and_programs_write_is_read(data):
    open_untrusted_image(data, Limits())
