"""Samples whose images are cut into crops: token counts by arithmetic, before any pixel is read."""

import pytest
import torch
from PIL import ExifTags, Image

from llava_saep.data.images import ImageSize, default_grid_pinpoints, load_image, preprocess_image, select_tile_grid
from llava_saep.data.records import BadSampleError
from llava_saep.errors import UserError

from .conftest import IMAGE_TOKEN_ID

PINPOINTS = default_grid_pinpoints(ImageSize(56, 56))


def _record(*images):
    turns = [{"from": "human", "value": "<image>\n" * len(images) + "What?"}, {"from": "gpt", "value": "A cat."}]
    return {"conversations": turns} | ({"image": list(images)} if images else {})


def _ten_per_crop(original, view):
    rows, columns = select_tile_grid(original, view, PINPOINTS)
    return 10 * (1 + rows * columns)


@pytest.fixture
def make_cut_dataset(make_dataset, tmp_path):
    """Besides red.png and blue.png (60 x 40, 3 crops each): wide.png with 4 crops, broken.png that is no image."""
    Image.new("RGB", (168, 50), "green").save(tmp_path / "wide.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")

    def make(records, **options):
        settings = {
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": PINPOINTS,
            "num_anyres_tokens": _ten_per_crop,
        }
        return make_dataset(records, **(settings | options))

    return make


def test_each_image_has_as_many_placeholders_as_its_crops_give(make_cut_dataset, tmp_path, image_processor):
    sample = make_cut_dataset([_record("wide.png", "red.png")])[0]
    assert [stack.shape for stack in sample["pixel_values"]] == [(4, 3, 56, 56), (3, 3, 56, 56)]
    assert sample["image_sizes"].tolist() == [[50, 168], [40, 60]]
    is_image = (sample["input_ids"] == IMAGE_TOKEN_ID).tolist()
    runs = "".join("x" if image else "." for image in is_image).replace(".", " ").split()
    assert [len(run) for run in runs] == [40, 30]
    expected = preprocess_image(load_image(tmp_path / "wide.png"), image_processor, "anyres", PINPOINTS)
    torch.testing.assert_close(sample["pixel_values"][0], expected, rtol=0, atol=0)


def test_lengths_are_those_of_the_samples_without_decoding_an_image(make_cut_dataset, monkeypatch):
    dataset = make_cut_dataset([_record("red.png"), _record("wide.png"), _record(), _record("red.png", "wide.png")])
    lengths = [len(dataset[index]["input_ids"]) for index in range(4)]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("an image was decoded"))
    assert dataset.lengths == lengths
    assert len(set(lengths)) == 4


def test_damaged_image_counts_as_the_longest_until_it_is_read(make_cut_dataset):
    dataset = make_cut_dataset([_record("broken.png"), _record("wide.png")])
    assert dataset.max_tokens_per_image == 50
    assert dataset.lengths[0] == dataset.lengths[1] + 10
    with pytest.raises(BadSampleError, match="broken.png: cannot be read as an image"):
        dataset[0]


def test_image_that_does_not_fit_is_found_when_the_data_set_is_made(make_cut_dataset):
    """By its own token count: the smaller image of the two fits."""
    length = make_cut_dataset([_record("red.png")]).lengths[0]
    dataset = make_cut_dataset([_record("red.png"), _record("wide.png")], max_length=length, on_bad_sample="skip")
    assert len(dataset) == 1
    assert dataset.skipped == {"no supervised token": 1}


def test_pinpoint_that_cannot_be_tiled_is_refused_before_any_sample_is_read(make_cut_dataset):
    pinpoints = ((100, 56),)
    with pytest.raises(UserError, match="cannot be cut into tiles of 56 x 56 pixels"):
        make_cut_dataset(
            [_record("red.png")],
            image_grid_pinpoints=pinpoints,
            num_anyres_tokens=lambda original, view: 10 * sum(select_tile_grid(original, view, pinpoints)),
        )


def test_photo_on_its_side_is_counted_and_cut_as_it_will_be_seen(make_cut_dataset, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (168, 50), "green").save(tmp_path / "sideways.jpg", exif=exif)
    plain = make_cut_dataset([_record("sideways.jpg")])[0]
    turned = make_cut_dataset([_record("sideways.jpg")], apply_exif_orientation=True)[0]
    assert plain["image_sizes"].tolist() == [[50, 168]]
    assert turned["image_sizes"].tolist() == [[168, 50]]
    assert (turned["input_ids"] == IMAGE_TOKEN_ID).sum() == 10 * len(turned["pixel_values"][0])


def test_each_file_is_opened_once_for_a_sample(make_cut_dataset, monkeypatch):
    """Its size decides the tokens and its pixels the crops; on network storage each opening is a wait."""
    dataset = make_cut_dataset([_record("wide.png", "red.png")])
    opened, really_open = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or really_open(path))
    assert len(dataset[0]["pixel_values"]) == 2
    assert len(opened) == 2
