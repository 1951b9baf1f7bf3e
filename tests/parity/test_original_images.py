"""Pixel values against LLaVA's process_images bit by bit; where it mangles an image, against a hand-made resize.

The cases are found in the reference folder (LLAVA_SAEP_GOLDEN, shared layout), so other images can be put through.
"""

import hashlib
import json
import math
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from llava_saep.data.images import (
    ImageSize,
    TileGrid,
    expand_to_square,
    load_image,
    mean_color,
    parse_grid_pinpoints,
    preprocess_image,
    select_resolution,
    select_tile_grid,
)
from llava_saep.mm_utils import process_images

from .llava_reference import REFERENCE_FOLDER as GOLDEN

REFERENCE = json.loads((GOLDEN / "image_processing.json").read_text())
CASES = REFERENCE["cases"]
KEY = ("file", "size", "image_aspect_ratio", "convert_rgb")
TABLES = {name.rpartition("_")[2]: REFERENCE[name] for name in REFERENCE if name.startswith("anyres_functions_")}


def clip_processor(side):
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def pinpoints_of(side):
    return parse_grid_pinpoints(REFERENCE["grid_pinpoints"].get(str(side)))


def is_mangled_by_the_original(case):
    """Errors, modes that it pads or resizes as they are, and 3 rows of pixels that it takes for 3 channels."""
    height = case["pil_size"][1]
    scrambles = height == 3 and case["image_aspect_ratio"] in (None, "square")
    return "error" in case or scrambles or (not case["convert_rgb"] and case["mode"] != "RGB")


def is_resized_otherwise_here(case):
    """The reference was made with Pillow 13; older ones resize what becomes wider and lower at once a little otherwise.

    (33 x 120 to 56 x 56 pixels: up to 19 of 255 grey levels in an eighth of the values. All other sizes are equal.)
    """
    is_older = int(PIL.__version__.split(".")[0]) < 13
    return is_older and case["file"] == "tall.png" and case["image_aspect_ratio"] == "anyres" and case["size"] == 56


def by_hand(image, case):
    """RGB first; pad or not; the short side to `size`, the centre cut out; scaled and normalised in float64.

    Returns:
        (height, width, 3), or with anyres (crops, height, width, 3).
    """
    side, image = case["size"], image.convert("RGB")
    if case["image_aspect_ratio"] == "anyres":
        return np.stack([normalised(crop) for crop in crops_by_hand(image, side, pinpoints_of(side))])
    if case["image_aspect_ratio"] == "pad":
        square = Image.new("RGB", (max(image.size),) * 2, tuple(REFERENCE["processor"]["pad_color"]))
        square.paste(image, tuple((max(image.size) - length) // 2 for length in image.size))
        image = square
    width, height = image.size
    short = min(width, height)
    image = image.resize((side * width // short, side * height // short), Image.BICUBIC)
    left, top = ((length - side) // 2 for length in image.size)
    return normalised(image.crop((left, top, left + side, top + side)))


def normalised(image):
    pixels = np.asarray(image, dtype=np.float64) / 255
    return (pixels - REFERENCE["processor"]["mean"]) / REFERENCE["processor"]["std"]


def crops_by_hand(image, side, pinpoints):
    """The whole image squeezed; then the tiles of the largest picture of it that a pinpoint holds, on black."""
    best, most, least = None, -1, 0
    for width, height in pinpoints:
        scale = min(width / image.width, height / image.height)
        kept = min(int(image.width * scale) * int(image.height * scale), image.width * image.height)
        if kept > most or (kept == most and width * height - kept < least):
            best, most, least = (width, height), kept, width * height - kept
    width, height = best
    fitted = (width, min(height, math.ceil(image.height * (width / image.width))))
    if width / image.width >= height / image.height:
        fitted = (min(width, math.ceil(image.width * (height / image.height))), height)
    picture = Image.new("RGB", best)
    picture.paste(image.resize(fitted, Image.BICUBIC), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    corners = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
    return [image.resize((side, side), Image.BICUBIC), *(picture.crop((x, y, x + side, y + side)) for x, y in corners)]


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(case[name]) for name in KEY))
def test_pixel_values_equal_the_originals(case):
    path = GOLDEN / "images" / case["file"]
    aspect_ratio = case["image_aspect_ratio"] or "square"
    image = load_image(path) if case["convert_rgb"] else Image.open(path)
    pixels = preprocess_image(image, clip_processor(case["size"]), aspect_ratio, pinpoints_of(case["size"]))
    if is_resized_otherwise_here(case):
        np.testing.assert_allclose(pixels.movedim(-3, -1), by_hand(image, case), atol=1e-6)  # float32 against float64
        return
    if not is_mangled_by_the_original(case):
        assert list(pixels.shape) == case["shape"]
        assert sha256(pixels) == case["sha256"]
        return
    converted = next((c for c in CASES if all(c[k] == case[k] for k in KEY[:3]) and c["convert_rgb"]), case)
    if not is_mangled_by_the_original(converted):
        assert sha256(pixels) == converted["sha256"]
    else:
        # float32 against float64
        np.testing.assert_allclose(pixels.movedim(-3, -1), by_hand(Image.open(path), case), atol=1e-6)


def test_the_hand_made_resize_equals_the_original_where_that_works():
    """Else `by_hand` would be no reference for what the original fails at."""
    compared = [case for case in CASES if case["convert_rgb"] and "error" not in case]
    compared = [case for case in compared if not is_mangled_by_the_original(case) | is_resized_otherwise_here(case)]
    for case in compared:
        pixels = by_hand(Image.open(GOLDEN / "images" / case["file"]), case)
        assert pixels.mean() == pytest.approx(case["mean"], abs=1e-6)
        assert pixels.std(ddof=1) == pytest.approx(case["std"], abs=1e-6)
    assert len(compared) > 10


@pytest.mark.parametrize(
    "batch", REFERENCE["batches"], ids=lambda b: f"{b['image_aspect_ratio']}-{'-'.join(b['files'])}"
)
def test_pinpoints_given_as_text_make_the_originals_crops(batch):
    shapes = [shape[-3:] for shape in batch["shapes"]]
    assert len({tuple(shape) for shape in shapes}) == 1
    side = shapes[0][-1]
    pinpoints = parse_grid_pinpoints(str(REFERENCE["grid_pinpoints"][str(side)]))
    images = [load_image(GOLDEN / "images" / name) for name in batch["files"]]
    aspect_ratio = batch["image_aspect_ratio"] or "square"
    made = [preprocess_image(image, clip_processor(side), aspect_ratio, pinpoints) for image in images]
    assert [list(pixels.shape) for pixels in made] == batch["shapes"]
    config = SimpleNamespace(image_aspect_ratio=batch["image_aspect_ratio"], image_grid_pinpoints=str(pinpoints))
    together = process_images(images, clip_processor(side), config)
    assert ("Tensor" if torch.is_tensor(together) else "list") == batch["type"]
    assert all(torch.equal(one, other) for one, other in zip(together, made, strict=True))


@pytest.mark.parametrize("case", REFERENCE["expand2square"], ids=lambda case: case["file"])
def test_expansion_to_a_square_equals_the_originals(case):
    path = GOLDEN / "images" / case["file"]
    color = mean_color(clip_processor(56))
    assert list(color) == REFERENCE["processor"]["pad_color"]
    square = expand_to_square(load_image(path), color)
    if case["mode"] == "RGB":
        assert sha256(np.asarray(square)) == case["sha256"]
        return
    # The original fails on these modes or pads with a wrong colour; after conversion the margin has the mean colour.
    assert square.mode == "RGB" and square.size == (max(square.size),) * 2
    if load_image(path).size != square.size:
        assert square.getpixel((0, 0)) == color
    if "size" in case:
        assert list(square.size) == case["size"]


@pytest.mark.parametrize(
    ("side", "case"),
    [pytest.param(int(side), case, id=f"{side}-{case['size']}") for side in TABLES for case in TABLES[side]],
)
def test_chosen_resolution_and_tiles_equal_the_originals(side, case):
    width, height = case["size"]
    resolution = select_resolution(ImageSize(height, width), pinpoints_of(side))
    assert [resolution.width, resolution.height] == case["best"]
    tiles = select_tile_grid(ImageSize(height, width), ImageSize(side, side), pinpoints_of(side))
    assert tiles == TileGrid(rows=case["grid_wh"][1], columns=case["grid_wh"][0])


def test_anyres_starts_with_the_whole_image_and_goes_on_row_by_row():
    """Four colours, one per tile: the order of the tiles is that of reading."""
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    image = Image.new("RGB", (112, 112))
    for index, color in enumerate(colors):
        image.paste(color, (56 * (index % 2), 56 * (index // 2), 56 * (index % 2) + 56, 56 * (index // 2) + 56))
    processor = clip_processor(56)
    crops = preprocess_image(image, processor, "anyres", ((112, 112),))
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    seen = crops.mean((2, 3)) * std + mean
    torch.testing.assert_close(seen[1:], torch.tensor(colors) / 255, atol=1e-5, rtol=0)
    assert math.isclose(seen[0].mean(), seen[1:].mean(), abs_tol=0.01)
