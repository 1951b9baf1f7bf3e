"""Images of any mode and shape become pixel values; files that cannot be used end in one message that names them.

tests/parity/test_original_images.py compares the values with LLaVA's.
"""

import logging
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile
from transformers import BitImageProcessorPil, SiglipImageProcessorPil

from llava_saep.data import images
from llava_saep.data.images import (
    ImageSize,
    default_grid_pinpoints,
    expand_to_square,
    load_image,
    mean_color,
    parse_grid_pinpoints,
    preprocess_image,
    processed_image_size,
    read_image_size,
    select_resolution,
    select_tile_grid,
    smallest_decoded_size,
)
from llava_saep.errors import UserError

from .conftest import GOLDEN, clip_processor


@pytest.mark.parametrize("size", [(1, 1), (80, 1), (1, 80), (30, 3), (3, 30)])
@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_thin_images_keep_their_content(image_processor, size, aspect_ratio):
    """A one-coloured image stays so: red in the middle, nothing that came from swapped axes."""
    pixels = preprocess_image(Image.new("RGB", size, (255, 0, 0)), image_processor, aspect_ratio)
    assert pixels.shape == (3, 56, 56)
    mean, std = np.array(image_processor.image_mean), np.array(image_processor.image_std)
    center = pixels[:, 28, 28].numpy() * std + mean
    if aspect_ratio == "square" or size == (1, 1):  # resampling blends a padded line with its margin
        np.testing.assert_allclose(center, [1, 0, 0], atol=1e-6)
    assert center.argmax() == 0


def test_padding_has_the_mean_colour_and_the_larger_margin_below(image_processor):
    square = np.asarray(expand_to_square(Image.new("RGB", (4, 1), "white"), mean_color(image_processor)))
    assert mean_color(image_processor) == (122, 116, 104)
    assert square[:, 0].tolist() == [[122, 116, 104], [255, 255, 255], [122, 116, 104], [122, 116, 104]]


def test_exif_orientation_is_applied_only_on_request():
    path = GOLDEN / "images" / "exif_rot6.jpg"
    assert load_image(path).size == (90, 60)
    assert load_image(path, apply_exif_orientation=True).size == (60, 90)
    assert read_image_size(path) == ImageSize(height=60, width=90)
    assert read_image_size(path, apply_exif_orientation=True) == ImageSize(height=90, width=60)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_in_the_head_is_that_of_the_image_turned_upright(tmp_path, orientation):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (40, 20)).save(path, exif=exif)
    upright = load_image(path, apply_exif_orientation=True)
    assert read_image_size(path, apply_exif_orientation=True) == ImageSize(upright.height, upright.width)


def test_modes_are_converted_before_padding(image_processor):
    """A palette image padded as such would change its colours."""
    image = Image.new("RGB", (40, 20), (10, 200, 30)).quantize(4)
    assert image.mode == "P"
    padded = preprocess_image(image, image_processor, "pad")
    torch.testing.assert_close(padded, preprocess_image(image.convert("RGB"), image_processor, "pad"), rtol=0, atol=0)


def test_deep_images_are_clipped_with_one_warning(caplog):
    images._warn_about_clipping.cache_clear()
    with caplog.at_level(logging.WARNING):
        load_image(GOLDEN / "images" / "i16.png")
        load_image(GOLDEN / "images" / "i16.png")
    assert len(caplog.records) == 1
    assert "values above 255 are clipped" in caplog.text


def test_size_is_known_without_an_image():
    assert processed_image_size(clip_processor(336)) == (336, 336)
    assert processed_image_size(SiglipImageProcessorPil(size={"height": 384, "width": 384})) == (384, 384)
    no_crop = clip_processor(56)
    no_crop.do_center_crop = False
    with pytest.raises(UserError, match="CLIPImageProcessorPil has no fixed output size"):
        processed_image_size(no_crop)


def _png(path, size=(64, 64)):
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.png: no such image file"):
        load_image(tmp_path / "gone.png")


@pytest.mark.parametrize("num_bytes", [0, 4, 20, 60, 5_000])
def test_truncated_file_is_named(tmp_path, num_bytes):
    path = _png(tmp_path / "cut.png")
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(UserError, match="cut.png: cannot be read as an image"):
        load_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("file_format", ["png", "jpeg", "gif", "webp", "bmp", "tiff"])
def test_damaged_files_end_in_a_user_error_or_an_image(tmp_path, file_format):
    """Whatever Pillow's decoders raise on random damage is a UserError, never something else."""
    rng = np.random.default_rng(1)
    original = tmp_path / f"whole.{file_format}"
    Image.open(_png(tmp_path / "source.png", (24, 24))).save(original, format=file_format)
    for _ in range(60):
        content = np.frombuffer(original.read_bytes(), np.uint8).copy()
        content[rng.integers(0, len(content), 8)] = rng.integers(0, 256, 8)
        damaged = tmp_path / f"damaged.{file_format}"
        damaged.write_bytes(content.tobytes()[: rng.integers(1, len(content))])
        try:
            assert load_image(damaged).mode == "RGB"
        except UserError as error:
            assert "damaged." in str(error)


@pytest.mark.parametrize("error", [NotImplementedError(), MemoryError(), struct.error(), zlib.error()])
def test_every_error_of_a_decoder_is_a_user_error(tmp_path, monkeypatch, error):
    def fail(self):
        raise error

    path = _png(tmp_path / "odd.png")
    monkeypatch.setattr(PngImageFile, "load", fail)
    with pytest.raises(UserError, match="odd.png: cannot be read as an image"):
        load_image(path)


def test_other_files_and_folders_are_named(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(UserError, match="page.jpg: cannot be read as an image"):
        load_image(tmp_path / "page.jpg")
    with pytest.raises(UserError, match="cannot be read as an image"):
        load_image(tmp_path)


def test_huge_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 1_000)
    with pytest.raises(UserError, match="big.png: 64 x 64 pixels; more than 1000 are refused"):
        load_image(_png(tmp_path / "big.png"))


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="bomb.png: refused as a possible decompression bomb"):
        load_image(_png(tmp_path / "bomb.png"))


def test_strip_is_refused(image_processor):
    with pytest.raises(UserError, match="4000 x 1 pixels is too thin"):
        preprocess_image(Image.new("RGB", (4000, 1)), image_processor, "square")


def test_strip_may_be_cut_into_tiles(image_processor):
    """Crops are resized to their own size, however thin the image is."""
    assert preprocess_image(Image.new("RGB", (4000, 1)), image_processor, "anyres").shape == (3, 3, 56, 56)


def test_unknown_aspect_ratio_lists_the_known_ones(image_processor):
    with pytest.raises(UserError, match="unknown image_aspect_ratio 'crop'; known: square, pad, anyres"):
        preprocess_image(Image.new("RGB", (4, 4)), image_processor, "crop")


def test_crops_keep_their_margins_under_a_processor_that_cuts_them_off():
    """DINOv2's processor enlarges to 256 pixels and cuts 224 out; a crop is as large as that cut already."""
    processor = BitImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56})
    image = Image.new("RGB", (112, 56))
    image.paste((255, 0, 0), (0, 0, 112, 1))
    crops = preprocess_image(image, processor, "anyres", ((112, 56),))
    assert crops.shape == (3, 3, 56, 56)
    assert (crops[1:, 0, 0] > crops[1:, 0, 1]).all()


def test_size_is_read_without_decoding(tmp_path):
    path = _png(tmp_path / "cut.png", (40, 64))
    path.write_bytes(path.read_bytes()[:60])
    assert read_image_size(path) == ImageSize(height=40, width=64)
    with pytest.raises(UserError, match="gone.png: no such image file"):
        read_image_size(tmp_path / "gone.png")


@pytest.mark.parametrize("value", ["[(336, 672), (672, 336)]", [[336, 672], [672, 336]], ((336, 672), (672, 336))])
def test_pinpoints_are_read_in_every_form_that_llava_writes(value):
    assert parse_grid_pinpoints(value) == ((336, 672), (672, 336))


@pytest.mark.parametrize("value", ["(336, 672", "336", "[336, 672]", [[336]], [[336, -1]], [["a", "b"]], "[(1.5, 2)]"])
def test_other_pinpoints_are_refused_with_an_example(value):
    with pytest.raises(UserError, match="image_grid_pinpoints .* expected pairs of width and height"):
        parse_grid_pinpoints(value)


def test_default_pinpoints_are_llava_next_s_at_336_pixels():
    expected = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    assert default_grid_pinpoints(ImageSize(336, 336)) == expected
    assert parse_grid_pinpoints(None) == ()


@pytest.mark.parametrize(
    ("pinpoints", "expected"),
    [
        (((112, 112), (56, 112), (112, 56)), ImageSize(height=112, width=56)),
        (((112, 112), (112, 56), (56, 112)), ImageSize(height=56, width=112)),
        (((56, 56), (168, 168)), ImageSize(height=168, width=168)),
    ],
    ids=["the least waste", "of equals the first", "no pixel lost"],
)
def test_resolution_is_chosen_by_pixels_kept_then_by_waste_then_by_order(pinpoints, expected):
    assert select_resolution(ImageSize(40, 40) if len(pinpoints) == 3 else ImageSize(100, 100), pinpoints) == expected


def test_pinpoint_that_is_no_multiple_of_the_tile_is_named():
    with pytest.raises(UserError, match=r"\(100, 56\), which cannot be cut into tiles of 56 x 56 pixels"):
        select_tile_grid(ImageSize(50, 100), ImageSize(56, 56), ((100, 56),))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A JPEG of 1200 x 900 pixels with edges, slopes and a texture."""
    rows, columns = np.mgrid[0:900, 0:1200]
    planes = [
        columns / 1200 * 255,
        np.where((columns // 300 + rows // 300) % 2, 220, 30),
        128 + 60 * np.sin(columns / 9) * np.cos(rows / 7),
    ]
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8)).save(path, quality=90)
    return path


@pytest.mark.parametrize(
    ("smallest", "expected"),
    [
        (ImageSize(450, 600), (600, 450)),
        (ImageSize(451, 600), (1200, 900)),
        (ImageSize(114, 150), (300, 225)),
        (ImageSize(1, 1), (150, 113)),
        (ImageSize(2000, 3000), (1200, 900)),
    ],
)
def test_reduced_jpeg_is_never_smaller_than_needed(smallest, expected, photo):
    asked = []
    image = load_image(photo, smallest_size=lambda original: asked.append(original) or smallest)
    assert asked == [ImageSize(900, 1200)]
    assert image.size == expected
    assert load_image(photo).size == (1200, 900)


def test_other_formats_are_read_whole(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    assert load_image(tmp_path / "image.png", smallest_size=lambda original: ImageSize(1, 1)).size == (64, 64)


@pytest.mark.parametrize(
    ("aspect_ratio", "original", "expected"),
    [("square", (900, 1200), (112, 150)), ("pad", (900, 1200), (84, 112)), ("square", (300, 100), (336, 112))],
)
def test_reduced_jpeg_keeps_twice_the_resolution_that_is_needed(aspect_ratio, original, expected, image_processor):
    assert smallest_decoded_size(ImageSize(*original), image_processor, aspect_ratio) == expected


def test_reduced_jpeg_for_a_processor_that_squeezes():
    processor = SiglipImageProcessorPil(size={"height": 56, "width": 56})
    assert smallest_decoded_size(ImageSize(900, 1200), processor, "square") == (112, 112)
    assert smallest_decoded_size(ImageSize(900, 1200), processor, "pad") == (84, 112)


@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_reduced_decoding_changes_pixels_little(aspect_ratio, photo, image_processor):
    """Both ways average blocks of pixels before the tower sees them; the weights of the averages differ."""
    whole = preprocess_image(load_image(photo), image_processor, aspect_ratio)
    reduced = load_image(photo, smallest_size=lambda size: smallest_decoded_size(size, image_processor, aspect_ratio))
    assert max(reduced.size) < 1200
    difference = (preprocess_image(reduced, image_processor, aspect_ratio) - whole).abs()
    in_grey_levels = difference * torch.tensor(image_processor.image_std)[:, None, None] * 255
    assert 0 < in_grey_levels.mean() < 4
