"""What the model sees is what the processor made, and no more."""

import numpy as np
import pytest
from PIL import Image

from llava_saep.data.images import ImageSize, cut_into_crops, expand_to_square, mean_color
from llava_saep.model.loading import build_processor, build_tokenizer, make_config
from llava_saep.serve.demo.model_view import what_the_model_sees
from projectors import select_projector
from tests.fixtures.tiny import IMAGE_SIZE, write_bases, write_image

PINPOINTS = ((24, 48), (48, 24), (48, 48))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


def processor_for(bases, aspect_ratio):
    tokenizer = build_tokenizer(str(bases.language_model))
    is_cut = aspect_ratio == "anyres"
    config = make_config(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        projector=select_projector("saep"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        mm_patch_merge_type="spatial_unpad" if is_cut else "flat",
        image_grid_pinpoints=PINPOINTS if is_cut else (),
    )
    return build_processor(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        model_config=config,
        tokenizer=tokenizer,
        image_aspect_ratio=aspect_ratio,
    )


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    # Smooth, so that enlarging it and making it small again changes little.
    path = write_image(tmp_path_factory.mktemp("pictures") / "a.png", height=2, width=3)
    with Image.open(path) as image:
        return image.resize((48, 36), Image.Resampling.BICUBIC)


def assert_alike(seen, expected):
    """Equal up to the rounding of the pixel values there and back."""
    assert seen.size == expected.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert np.abs(np.asarray(seen, int) - np.asarray(expected, int)).max() <= 1


def test_a_padded_picture_is_shown_with_its_margins(bases, picture):
    processor = processor_for(bases, "pad")
    (seen,) = what_the_model_sees(processor, picture)
    square = expand_to_square(picture, mean_color(processor.image_processor))
    assert_alike(seen.image, square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    assert seen.caption == "24 x 24 pixels, padded to a square: 9 tokens"


def test_a_cropped_picture_is_shown_without_its_sides(bases, picture):
    (seen,) = what_the_model_sees(processor_for(bases, "square"), picture)
    small = picture.resize((32, 24), Image.Resampling.BICUBIC)
    assert_alike(seen.image, small.crop((4, 0, 28, 24)))
    assert "cropped to the centre" in seen.caption


def test_a_picture_that_is_cut_is_shown_whole_and_in_tiles(bases, picture):
    processor = processor_for(bases, "anyres")
    seen = what_the_model_sees(processor, picture)
    crops = cut_into_crops(picture, ImageSize(IMAGE_SIZE, IMAGE_SIZE), PINPOINTS)
    assert len(seen) == len(crops) == 5
    for one, crop in zip(seen, crops, strict=True):
        assert_alike(one.image, crop)
    assert str(processor.count_tokens([picture])[0]) in seen[0].caption
    assert [one.caption for one in seen[1:]] == [f"tile {number} of 4" for number in range(1, 5)]
