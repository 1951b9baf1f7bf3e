"""Bytes and pixels of an image are limited, pixels before anything is decoded."""

import time

import psutil
import pytest

from llava_saep.errors import UserError
from llava_saep.serve.limits import Limits
from llava_saep.serve.untrusted import open_untrusted_image, read_untrusted_size
from tests.fixtures.image_files import encoded, gradient, png_that_claims


def test_bytes_are_limited():
    content = encoded(gradient())
    open_untrusted_image(content, Limits(max_image_bytes=len(content)))
    with pytest.raises(UserError, match=f"has {len(content)} bytes, at most {len(content) - 1} are allowed"):
        open_untrusted_image(content, Limits(max_image_bytes=len(content) - 1))


def test_pixels_are_limited():
    open_untrusted_image(encoded(gradient(24, 16)), Limits(max_image_pixels=24 * 16))
    with pytest.raises(UserError, match="24 x 16 pixels, at most 383 are allowed"):
        open_untrusted_image(encoded(gradient(24, 16)), Limits(max_image_pixels=24 * 16 - 1))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8_000, 13_000, 30_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_from_its_head(side):
    """Above Pillow's own limits too, one of which warns and one of which raises."""
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    with pytest.raises(UserError, match="pixels"):
        open_untrusted_image(png_that_claims(side, side), Limits())
    assert psutil.Process().memory_info().rss - before < 20 * 2**20  # decoded, the smallest has 192 MB
    assert time.perf_counter() - start < 1


def test_a_strip_that_resizing_would_blow_up_is_refused():
    with pytest.raises(UserError, match="too thin"):
        open_untrusted_image(encoded(gradient(2010, 10)), Limits())


def test_size_is_read_without_decoding():
    assert read_untrusted_size(png_that_claims(300, 200), Limits()) == (200, 300)
    with pytest.raises(UserError, match="damaged or cut off"):  # its pixels are not there
        open_untrusted_image(png_that_claims(300, 200), Limits())


def test_size_is_read_of_the_allowed_kinds_alone():
    """Before anything is decoded, no decoder of another kind is asked what it makes of the head."""
    with pytest.raises(UserError, match="known kind"):
        read_untrusted_size(encoded(gradient(), "TIFF"), Limits())
