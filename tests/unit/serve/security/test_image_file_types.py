"""What an image is, is read from its content; five kinds are decoded, and each of their variants becomes plain RGB."""

import io

import numpy as np
import pytest
from PIL import Image

from llava_saep.errors import UserError
from llava_saep.serve.limits import Limits
from llava_saep.serve.untrusted import open_untrusted_image
from tests.fixtures.image_files import HTML, SVG, encoded, gradient, sideways_jpeg, sixteen_bit_png

LIMITS = Limits()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_allowed_kinds_are_decoded(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    image = open_untrusted_image(encoded(gradient(), kind, **options), LIMITS)
    assert (image.mode, image.size) == ("RGB", (24, 16))
    tolerance = {"JPEG": 40, "GIF": 20}.get(kind, 0)  # lossy: blocks of 8 pixels, and 256 colours
    assert np.abs(np.asarray(image, int) - np.asarray(gradient(), int)).max() <= tolerance


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA", "PCX", "PDF", "EPS", "JPEG2000"])
def test_other_kinds_that_pillow_knows_are_refused(kind):
    with pytest.raises(UserError, match="no image of a known kind; expected PNG, JPEG, WebP, GIF or BMP"):
        open_untrusted_image(encoded(gradient(), kind), LIMITS)


@pytest.mark.parametrize(
    "content", [SVG, HTML, b"GIF", b"\x89PNG\r\n\x1a\n", b"\0" * 100, "héllo".encode(), b"%PDF-1.4"]
)
def test_what_is_no_image_is_refused_without_a_trace(content):
    with pytest.raises(UserError) as refused:
        open_untrusted_image(content, LIMITS)
    assert "known kind" in str(refused.value) and "0x" not in str(refused.value)


def test_an_empty_file_is_called_so():
    with pytest.raises(UserError, match="the image is empty"):
        open_untrusted_image(b"", LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_cut_off_files_are_refused(kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    content = encoded(noise, kind)
    with pytest.raises(UserError, match="damaged or cut off|known kind"):
        open_untrusted_image(content[: int(len(content) * share)], LIMITS)


def test_a_sideways_photograph_is_turned_upright_once():
    image = open_untrusted_image(sideways_jpeg(24, 16), LIMITS)
    assert image.size == (16, 24)
    assert not image.getexif()  # a processor that turns images finds nothing to do
    red = np.asarray(image)[..., 0].astype(int)
    assert red[0].mean() + 50 < red[-1].mean()  # left to right as stored, so top to bottom as seen


def test_sixteen_bits_keep_their_contrast():
    values = np.asarray(open_untrusted_image(sixteen_bit_png(), LIMITS))[..., 0].ravel()
    assert np.array_equal(values, np.linspace(0, 65535, 24 * 16).astype(np.uint16) // 256)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    image = open_untrusted_image(encoded(Image.new("RGB", (24, 16), "white").convert(mode), kind), LIMITS)
    assert image.mode == "RGB" and np.asarray(image).min() >= 250


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_picture(kind):
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("red", "green", "blue")]
    content = io.BytesIO()
    frames[0].save(content, kind, save_all=True, append_images=frames[1:])
    red, green, blue = np.asarray(open_untrusted_image(content.getvalue(), LIMITS)).reshape(-1, 3).mean(0)
    assert red > 200 and green < 50 and blue < 50


def test_profiles_and_comments_do_not_stay_in_memory():
    assert not open_untrusted_image(encoded(gradient(), "JPEG", comment=b"x" * 60_000), LIMITS).info
