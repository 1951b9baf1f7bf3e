"""Where the tokens of an image lie: compared with pixels that say where they were before preprocessing."""

import numpy as np
import pytest
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil

from llava_saep.data.images import ImageSize, default_grid_pinpoints, preprocess_image
from llava_saep.model.anyres import ImageTokens
from llava_saep.model.token_layout import TILES, WHOLE, layout_tokens
from projectors import PatchGrid, select_projector

SIDE = 48
PATCH_SIZE = 4
SIZES = [ImageSize(96, 96), ImageSize(100, 161), ImageSize(203, 98), ImageSize(40, 30), ImageSize(99, 301)]
PROCESSORS = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
    "siglip": SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 55}, crop_size={"height": SIDE, "width": SIDE}),
    "siglip with patches that leave a margin": SiglipImageProcessorPil(size={"height": 51, "width": 51}),
    "a crop larger than the image": CLIPImageProcessorPil(
        size={"shortest_edge": 41}, crop_size={"height": SIDE, "width": SIDE}
    ),
}


def image_tokens(projector="linear", merge_type="flat", pinpoints=(), **options):
    config = select_projector(projector, options).build_config(
        vision_hidden_size=24, text_hidden_size=8, num_vision_layers=4
    )
    return ImageTokens(config, PATCH_SIZE, merge_type, pinpoints)


def ramp(size):
    """An image whose red and green are, from 0 to 255, how far right and down a pixel lies; blue marks the image."""
    across, down = np.meshgrid(
        (np.arange(size.width) + 0.5) / size.width * 255, (np.arange(size.height) + 0.5) / size.height * 255
    )
    return Image.fromarray(np.stack([across, down, np.full(tuple(size), 255)], axis=-1).astype(np.uint8))


def seen_pixels(size, processor, aspect_ratio, pinpoints=()):
    """What the tower gets of the ramp, back as colours: (crops, height, width, 3)."""
    pixels = preprocess_image(ramp(size), processor, aspect_ratio, pinpoints).numpy()
    pixels = pixels if pixels.ndim == 4 else pixels[None]
    mean, std = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return ((pixels * std + mean) * 255).transpose(0, 2, 3, 1)


def centres(token_map):
    """Where the centres of a map's cells are: (rows, columns, 2), x and y in pixels of the image."""
    x = [(span.start + span.end) / 2 for span in token_map.columns]
    y = [(span.start + span.end) / 2 for span in token_map.rows]
    return np.stack(np.meshgrid(x, y), axis=-1)


def assert_shows_what_the_patches_saw(token_map, patches, size):
    """Compare cells' centres with the mean colour of their patches, where those show nothing but the image.

    Args:
        patches: (rows, columns, pixels of a patch, 3).
    """
    inside = (patches[..., 2] > 254).all(axis=2)
    assert inside.sum() >= 4
    seen = patches[..., :2].mean(axis=2) / 255 * np.array([size.width, size.height])
    # 8-bit colours tell a place to 1/255 of a side, and resampling smooths the edges' pixels: half of a patch at most
    # would be wrong for any error of a patch or of the padding.
    tolerance = np.array([size.width, size.height]) / 255 + 0.15 * np.array(
        [token_map.columns[0].end - token_map.columns[0].start, token_map.rows[0].end - token_map.rows[0].start]
    )
    difference = np.abs(seen - centres(token_map))[inside]
    assert (difference <= tolerance).all()


def cut_into_patches(crop, grid):
    """(height, width, 3) -> (rows, columns, pixels, 3), without what the patches do not cover."""
    covered = crop[: grid.height * PATCH_SIZE, : grid.width * PATCH_SIZE]
    blocks = covered.reshape(grid.height, PATCH_SIZE, grid.width, PATCH_SIZE, 3).swapaxes(1, 2)
    return blocks.reshape(grid.height, grid.width, -1, 3)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_cells_lie_over_the_pixels_that_the_tower_saw(processor, aspect_ratio, size):
    layout = layout_tokens(image_tokens(), processor, aspect_ratio, size)
    (token_map,) = layout.maps
    (seen,) = seen_pixels(size, processor, aspect_ratio)
    grid = PatchGrid(*(side // PATCH_SIZE for side in seen.shape[:2]))
    assert (len(token_map.rows), len(token_map.columns)) == tuple(grid)
    assert_shows_what_the_patches_saw(token_map, cut_into_patches(seen, grid), size)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("processor", ["clip", "siglip with patches that leave a margin"])
def test_cells_of_tiles_lie_over_the_pixels_that_the_tower_saw(processor, merge_type, size):
    processor = PROCESSORS[processor]
    side = 51 if "height" in processor.size else SIDE
    pinpoints = default_grid_pinpoints(ImageSize(side, side))
    tokens = image_tokens(merge_type=merge_type, pinpoints=pinpoints)
    layout = layout_tokens(tokens, processor, "anyres", size)
    seen = seen_pixels(size, processor, "anyres", pinpoints)
    grid = PatchGrid(side // PATCH_SIZE, side // PATCH_SIZE)
    # Each patch's pixels under the number of its token, put in order by the code that orders the model's tokens.
    patches = np.stack([cut_into_patches(crop, grid) for crop in seen])
    ordered = merged_by_the_model(tokens, patches.reshape(len(seen), grid.num_patches, -1), size, side)
    assert len(ordered) == layout.num_tokens
    whole, *tiles = layout.maps
    assert whole.part == WHOLE and all(token_map.part == TILES for token_map in tiles)
    for token_map in layout.maps:
        arranged = token_map.arrange(ordered.T)
        arranged = arranged.transpose(1, 2, 0).reshape(*arranged.shape[1:], -1, 3)
        if (arranged[..., 2] > 254).all(axis=2).sum() >= 4:  # else a tile of black
            assert_shows_what_the_patches_saw(token_map, arranged, size)


def merged_by_the_model(tokens, crops, size, side):
    import torch

    newline = torch.zeros(crops.shape[-1], dtype=torch.float64) if tokens.has_newline else None
    return tokens.merge(torch.from_numpy(crops), size, ImageSize(side, side), newline).numpy()


def test_fewer_tokens_share_the_crop_equally():
    layout = layout_tokens(image_tokens("avg_pool", num_queries=9), PROCESSORS["clip"], "pad", ImageSize(60, 90))
    (token_map,) = layout.maps
    assert [tuple(span) for span in token_map.columns] == [(0, 30), (30, 60), (60, 90)]
    assert [tuple(span) for span in token_map.rows] == [(-15, 15), (15, 45), (45, 75)]


@pytest.mark.parametrize("aspect_ratio", ["square", "anyres"])
def test_learned_queries_have_no_place(aspect_ratio):
    tokens = image_tokens("resampler", pinpoints=default_grid_pinpoints(ImageSize(SIDE, SIDE)), num_queries=9)
    layout = layout_tokens(tokens, PROCESSORS["clip"], aspect_ratio, ImageSize(60, 90))
    assert layout.maps == ()
    assert layout.num_tokens == (9 if aspect_ratio == "square" else 5 * 9)  # the whole and 2 x 2 tiles
