"""The data set: what a sample holds, what cannot be one, and lengths that need no image."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from llava_saep.constants import IGNORE_INDEX
from llava_saep.data import dataset as dataset_module
from llava_saep.data.collator import ConversationCollator
from llava_saep.data.dataset import ConversationDataset, check_data
from llava_saep.data.feature_cache import FeatureStore, ImageFeatures
from llava_saep.data.image_check import find_damaged_images
from llava_saep.data.images import ImageSize, load_image, preprocess_image
from llava_saep.data.records import BadSampleError
from llava_saep.data.templates import conversation_template
from llava_saep.errors import UserError

from .conftest import IMAGE_TOKEN_ID, llama_tokenizer

SAMPLE_DATA = Path(__file__).parents[3] / "playground" / "data" / "sample"


def _record(image=None, question="What?", answer="A cat.", **fields):
    if image is not None:
        num_images = len(image) if isinstance(image, list) else 1
        fields["image"] = image
        question = "<image>\n" * num_images + question
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": answer, "conversations": turns} | fields


def test_sample_holds_placeholders_labels_and_pixels(make_dataset, tmp_path, tokenizer, image_processor):
    sample = make_dataset([_record("red.png")])[0]
    assert (sample["input_ids"] == IMAGE_TOKEN_ID).sum() == 16  # 4 x 4 patches
    targets = sample["labels"][sample["labels"] != IGNORE_INDEX]
    assert tokenizer.decode(targets) == "A cat.</s>"
    expected = preprocess_image(load_image(tmp_path / "red.png"), image_processor, "pad")
    torch.testing.assert_close(sample["pixel_values"], expected[None], rtol=0, atol=0)


def test_images_follow_the_order_of_markers(make_dataset):
    sample = make_dataset([_record(["red.png", "blue.png"])])[0]
    assert (sample["input_ids"] == IMAGE_TOKEN_ID).sum() == 32
    red, blue = sample["pixel_values"][:, :, 28, 28]
    assert red.argmax() == 0
    assert blue.argmax() == 2


def test_images_stand_where_their_markers_do(make_dataset, tokenizer):
    """Several in a turn, between words, and in a later turn: none is collapsed or moved before the others."""
    values = ["Is <image> like <image> or", "No.", "And this?\n<image>", "Yes."]
    turns = [{"from": ("human", "gpt")[at % 2], "value": value} for at, value in enumerate(values)]
    sample = make_dataset([{"image": ["red.png", "blue.png", "red.png"], "conversations": turns}])[0]
    ids = sample["input_ids"].tolist()
    starts = [at for at in range(len(ids)) if ids[at] == IMAGE_TOKEN_ID != ids[at - 1]]
    between = [tokenizer.decode(ids[start + 16 : end]) for start, end in zip(starts, [*starts[1:], None], strict=True)]
    texts = ["".join(text.split()) for text in between]
    assert texts == ["like", "orASSISTANT:No.</s>USER:", "Andthis?ASSISTANT:Yes.</s>"]
    assert sample["pixel_values"][:, :, 28, 28].argmax(dim=1).tolist() == [0, 2, 0]


def test_text_only_sample_has_no_pixels(make_dataset):
    assert make_dataset([_record()])[0].keys() == {"input_ids", "labels", "sample_index"}


def test_a_marker_in_a_text_only_sample_is_text(make_dataset):
    """Also where "<image>" is a token of the vocabulary, which the model would take for the place of an image."""
    tokenizer = llama_tokenizer(legacy=False, add_bos_token=True)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    record = _record(question="What does <image> mean?", answer="It <image> means.")
    dataset = make_dataset([record, _record("red.png")], tokenizer=tokenizer, image_token_id=image_token_id)
    sample = dataset[0]
    assert image_token_id not in sample["input_ids"]
    assert "".join(tokenizer.decode(sample["input_ids"]).split()).count("<image>") == 2
    targets = sample["labels"][sample["labels"] != IGNORE_INDEX]
    assert tokenizer.decode(targets) == "It <image> means.</s>"
    assert dataset.lengths == [len(dataset[index]["input_ids"]) for index in range(2)]
    assert dataset.modality_lengths[0] < 0


def test_token_count_comes_from_the_projector_and_the_processed_size(make_dataset):
    grids = []
    make_dataset([_record("red.png")], num_image_tokens=lambda grid: grids.append(grid) or 5, patch_size=8)
    assert grids == [(7, 7)]


@pytest.mark.parametrize(
    ("template", "max_length"), [("v1", 100), ("plain", 40), ("llama_2", 300), ("chatml_direct", 120)]
)
def test_lengths_are_those_of_the_samples(make_dataset, template, max_length):
    records = [_record("red.png", "Why so? " * number, "A cat. " * (number + 1)) for number in range(12)]
    dataset = make_dataset(records, template, max_length=max_length, on_bad_sample="skip")
    assert min(dataset.lengths) < max(dataset.lengths) == max_length
    assert dataset.lengths == [len(dataset[index]["input_ids"]) for index in range(len(dataset))]


def test_lengths_open_no_image(make_dataset, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    dataset = make_dataset([_record("broken.png"), _record(), _record("broken.png")])
    assert [length > 0 for length in dataset.modality_lengths] == [True, False, True]
    assert [abs(length) for length in dataset.modality_lengths] == dataset.lengths


def test_long_text_is_cut_on_the_right(make_dataset):
    whole = make_dataset([_record("red.png", answer="A cat. " * 50)])[0]
    cut = make_dataset([_record("red.png", answer="A cat. " * 50)], max_length=90)[0]
    for name in ("input_ids", "labels"):
        assert cut[name].tolist() == whole[name][:90].tolist()


def test_image_behind_the_cut_is_dropped(make_dataset):
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A cat. " * 20},
        {"from": "human", "value": "<image>\nAnd this?"},
        {"from": "gpt", "value": "A dog."},
    ]
    sample = make_dataset([{"image": ["red.png", "blue.png"], "conversations": turns}], max_length=80)[0]
    assert (sample["input_ids"] == IMAGE_TOKEN_ID).sum() == 16
    assert len(sample["pixel_values"]) == 1


BAD_RECORDS = {
    "missing image": (_record("gone.png"), {}, "its image .*gone.png does not exist"),
    "image cut by max_length": (_record("red.png"), {"max_length": 49}, "cut at 49 inside an image .*34 to 50"),
    "no supervised token": (
        _record(question="Why? " * 100),
        {"max_length": 100},
        "no token to learn among its first 100 of 440; raise --model_max_length",
    ),
    "not a caption": (_record(), {"template": "plain"}, "'plain' needs one turn with <image> .* 2 turns and 0 images"),
    "empty answer": (_record("red.png", answer=""), {}, "its answer 1 is empty"),
}


@pytest.mark.parametrize("cause", BAD_RECORDS)
def test_bad_record_is_found_before_training(make_dataset, cause, caplog):
    record, options, message = BAD_RECORDS[cause]
    good = _record("red.png") if options.get("template") == "plain" else _record()
    records = [good | {"id": "good"}, record | {"id": "bad"}]
    with pytest.raises(BadSampleError, match=rf"sample 1 \(id 'bad'\): .*{message}.* --on_bad_sample skip") as info:
        make_dataset(records, **options)
    assert info.value.cause == cause
    with caplog.at_level(logging.WARNING):
        dataset = make_dataset([*records, good], on_bad_sample="skip", **options)
    assert len(dataset) == 2
    assert dataset.skipped == {cause: 1}
    assert f"1 samples left out (1 x {cause})" in caplog.text


def test_error_counts_the_other_bad_records(make_dataset):
    records = [_record(), _record("gone.png"), _record(answer=""), _record("gone.png")]
    with pytest.raises(
        BadSampleError, match=r"sample 1 .* In all 3 samples cannot be used: 2 x missing image, 1 x empty"
    ):
        make_dataset(records)


def test_no_usable_record_is_an_error_even_when_skipping(make_dataset):
    with pytest.raises(UserError, match="no sample can be used; 2 x missing image"):
        make_dataset([_record("gone.png"), _record("gone.png")], on_bad_sample="skip")


def _with_damaged_images(make_dataset, tmp_path, **options):
    """Samples 1 and 2 have damaged images; 0 and 3 can be used."""
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:50])
    names = ["red.png", "broken.png", "broken.png", "blue.png"]
    return make_dataset([_record(name, answer=f"Answer {index}.") for index, name in enumerate(names)], **options)


def test_damaged_image_is_an_error_that_names_sample_and_file(make_dataset, tmp_path):
    dataset = _with_damaged_images(make_dataset, tmp_path)
    with pytest.raises(BadSampleError, match=r"sample 1 \(id 'Answer 1.'\): .*broken.png: cannot be read as an image"):
        dataset[1]


def test_damaged_image_is_replaced_by_the_next_usable_sample(make_dataset, tmp_path, caplog):
    dataset = _with_damaged_images(make_dataset, tmp_path, on_bad_sample="skip")
    with caplog.at_level(logging.WARNING):
        samples = [dataset[index] for index in (1, 2, 3)]
    for sample in samples:
        assert sample["input_ids"].tolist() == samples[2]["input_ids"].tolist()
    assert dataset.skipped == {"unreadable image": 2}  # each counts once, though 1 and 2 met the second
    assert len(caplog.records) == 1
    assert "sample 1 (id 'Answer 1.')" in caplog.text


def test_damaged_image_alone_can_be_tolerated(make_dataset, tmp_path):
    """What shows at the start ends the run before it, and a damaged image does not end it at step 9,000."""
    dataset = _with_damaged_images(make_dataset, tmp_path, on_bad_image="skip")
    assert int(dataset[1]["sample_index"]) == 3
    with pytest.raises(BadSampleError, match="its answer 1 is empty"):
        make_dataset([_record(), _record(answer="")], on_bad_image="skip")


def test_damaged_image_is_opened_once(make_dataset, tmp_path, monkeypatch):
    opened = []
    dataset = _with_damaged_images(make_dataset, tmp_path, on_bad_image="skip")
    monkeypatch.setattr(
        dataset_module, "load_image", lambda path, **_: opened.append(Path(path).name) or load_image(path)
    )
    for _ in range(3):
        list(dataset)
    assert opened.count("broken.png") == 2  # two samples show it


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_folder_that_is_gone_ends_the_run(num_workers, make_dataset, tmp_path, monkeypatch):
    """In one sentence, also where a worker finds it, whose traceback comes along."""
    monkeypatch.setattr(dataset_module, "MAX_BAD_IN_A_ROW", 3)
    dataset = make_dataset([_record("red.png") for _ in range(8)], on_bad_image="skip")
    (tmp_path / "red.png").unlink()
    with pytest.raises(UserError, match="^3 samples in a row cannot be read; is the image folder still there.*red.png"):
        list(DataLoader(dataset, batch_size=None, num_workers=num_workers))


def test_account_names_what_was_left_out_replaced_and_cut(make_dataset, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    long = _record(answer="A cat. " * 50) | {"id": "long"}
    records = [_record("red.png"), _record("gone.png"), _record("broken.png"), long]
    dataset = make_dataset(records, max_length=90, on_bad_sample="skip")
    list(DataLoader(dataset, batch_size=None, num_workers=1))
    account = dataset.account()
    assert (account.num_records, account.num_used, account.num_cut) == (4, 2, 1)
    assert account.left_out == {"missing image": 1}
    assert account.replaced == {"unreadable image": 1}
    assert "gone.png does not exist" in account.examples["missing image"][0]
    assert "broken.png: cannot be read" in account.examples["unreadable image"][0]
    assert account.examples["cut"] == [f"{tmp_path / 'data.json'}: sample 3 (id 'long')"]


@pytest.mark.parametrize("image", [None, "red.png"])
def test_too_long_records_are_cut_skipped_or_refused(make_dataset, image):
    whole = make_dataset([_record(image, answer="A cat. " * 20)])
    length = whole.lengths[0]
    fitting, long = _record(image), _record(image, answer="A cat. " * 20)
    assert make_dataset([fitting, long], max_length=length - 1).lengths[1] == length - 1
    for policy in ("skip", "error"):  # as long as allowed is not too long
        assert len(make_dataset([fitting, long], max_length=length, on_too_long=policy)) == 2
    skipping = make_dataset([fitting, long], max_length=length - 1, on_too_long="skip")
    assert len(skipping) == 1
    assert skipping.skipped == {"longer than max_length": 1}
    with pytest.raises(BadSampleError, match=f"sample 1 .*: has {length} tokens, more than {length - 1}"):
        make_dataset([fitting, long], max_length=length - 1, on_too_long="error", on_bad_sample="skip")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_all_images_can_be_decoded_before_training(make_dataset, tmp_path, num_workers):
    dataset = _with_damaged_images(make_dataset, tmp_path, on_bad_sample="skip")
    damaged = find_damaged_images(dataset, range(4), num_workers=num_workers)
    assert list(damaged) == [1, 2]
    dataset.leave_out(damaged)
    assert [int(sample["sample_index"]) for sample in dataset] == [0, 1]
    assert len(dataset.lengths) == 2
    assert dataset.skipped == {"unreadable image": 2}
    strict = _with_damaged_images(make_dataset, tmp_path)
    with pytest.raises(BadSampleError, match=r"sample 1 .*In all 2 samples cannot be used: 2 x unreadable image"):
        strict.leave_out(find_damaged_images(strict, range(4), num_workers=num_workers))


def test_last_sample_is_replaced_by_the_first(make_dataset, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    dataset = make_dataset([_record("red.png"), _record("broken.png")], on_bad_sample="skip")
    assert dataset[1]["input_ids"].tolist() == dataset[0]["input_ids"].tolist()


def test_worker_processes_report_skips_and_errors(make_dataset, tmp_path):
    collator = ConversationCollator(0, (56, 56), 512)
    skipping = _with_damaged_images(make_dataset, tmp_path, on_bad_sample="skip")
    batches = list(DataLoader(skipping, batch_size=2, num_workers=1, collate_fn=collator))
    assert [len(batch["pixel_values"]) for batch in batches] == [2, 2]
    assert skipping.skipped == {"unreadable image": 2}
    strict = _with_damaged_images(make_dataset, tmp_path)
    with pytest.raises(BadSampleError) as info:
        list(DataLoader(strict, batch_size=4, num_workers=1, collate_fn=collator))
    assert str(info.value).startswith(f"{tmp_path / 'data.json'}: sample 1 (id 'Answer 1.')")
    assert "Traceback" not in str(info.value)


def test_index_outside_the_data_set_ends_iteration(make_dataset):
    dataset = make_dataset([_record(), _record("red.png")])
    assert len(list(dataset)) == 2
    with pytest.raises(IndexError, match="index 2 of a data set with 2 samples"):
        dataset[2]
    assert "pixel_values" in dataset[-1]


def test_large_folders_are_listed_once(make_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "FILES_WORTH_LISTING", 2)
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "sub" / "a.png")
    names = ["red.png", "blue.png", "gone.png", "sub/a.png", "sub/gone.png"]
    dataset = make_dataset([_record(name) for name in names], on_bad_sample="skip")
    assert len(dataset) == 3
    assert dataset.skipped == {"missing image": 2}


def test_unknown_options_are_named(make_dataset):
    with pytest.raises(UserError, match="unknown on_bad_sample 'ignore'; known: error, skip"):
        make_dataset([_record()], on_bad_sample="ignore")
    with pytest.raises(UserError, match="unknown image_aspect_ratio"):
        make_dataset([_record()], image_aspect_ratio="crop")
    with pytest.raises(UserError, match="max_length is 0"):
        make_dataset([_record()], max_length=0)


def test_missing_image_folder_is_named(tmp_path, make_dataset):
    dataset = make_dataset([_record("red.png")])
    settings = {name: getattr(dataset, name) for name in ("tokenizer", "image_processor", "image_aspect_ratio")}
    with pytest.raises(UserError, match="image folder .*nowhere does not exist"):
        ConversationDataset(
            tmp_path / "data.json",
            tmp_path / "nowhere",
            **settings,
            template=dataset.template,
            num_image_tokens=lambda grid: 16,
            patch_size=14,
            image_token_id=IMAGE_TOKEN_ID,
            max_length=512,
        )


def test_template_that_does_not_fit_the_tokenizer_is_pointed_out(make_dataset, caplog):
    with caplog.at_level(logging.WARNING):
        make_dataset([_record("red.png")], "v1")
        make_dataset([_record("red.png")], "plain")
    assert not caplog.records
    make_dataset([_record("red.png")], "chatml_direct")
    assert (
        "ends answers with '<|im_end|>', which is not a token of this tokenizer (its eos token is '</s>')"
        in caplog.text
    )


def test_check_data_counts_every_cause(make_dataset, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    records = [_record("red.png"), _record("broken.png"), _record("gone.png"), _record("broken.png")]
    report = check_data(make_dataset(records, on_bad_sample="skip"))
    assert report.num_usable == 1
    assert report.counts == {"unreadable image": 2, "missing image": 1}
    assert "1 samples can be used, 3 cannot" in str(report)
    assert "broken.png: cannot be read" in str(report)


def test_the_sample_in_the_playground_can_be_used(tokenizer, image_processor):
    dataset = ConversationDataset(
        SAMPLE_DATA / "conversations.json",
        SAMPLE_DATA / "images",
        tokenizer=tokenizer,
        image_processor=image_processor,
        image_aspect_ratio="pad",
        template=conversation_template("v1"),
        num_image_tokens=lambda grid: 16,
        patch_size=14,
        image_token_id=IMAGE_TOKEN_ID,
        max_length=512,
    )
    assert len(dataset) == len(json.loads((SAMPLE_DATA / "conversations.json").read_text()))
    assert check_data(dataset).counts.total() == 0
    assert [length > 0 for length in dataset.modality_lengths] == [True, True, True, True, False]


def test_large_jpeg_is_decoded_small_only_on_request(make_dataset, tmp_path, monkeypatch):
    """LLaVA decodes it whole, so its pixels are the default; with the flag the resize starts from 1/8 of it."""
    Image.new("RGB", (960, 640), "red").save(tmp_path / "photo.jpg")
    sizes = []
    record = _record("photo.jpg")
    monkeypatch.setattr(
        "llava_saep.data.dataset.preprocess_image",
        lambda image, *_: sizes.append(image.size) or torch.zeros(3, 56, 56),
    )
    for jpeg_draft in (False, True):
        make_dataset([record], jpeg_draft=jpeg_draft)[0]
    assert sizes == [(960, 640), (120, 80)]


def test_stored_features_take_the_place_of_pixels(make_dataset, tmp_path, monkeypatch):
    """An image that is stored is not opened; its neighbour in the same sample is."""
    dataset = make_dataset([_record(["red.png", "blue.png"], "What?"), _record()])
    store = FeatureStore(tmp_path / "cache", {})
    store.open()
    dataset.use_feature_store(store)
    before = dataset[0]
    assert [pixels.shape for pixels in before["pixel_values"]] == [(1, 3, 56, 56)] * 2
    assert before["vision_features"] == [(), ()]
    key, is_damaged = before["image_lookups"][0]
    assert not is_damaged
    assert before["image_sizes"].tolist() == [[40, 60], [40, 60]]
    store.write(key, ImageFeatures(ImageSize(40, 60), (torch.ones(1, 16, 8),)))
    opened, really_open = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(os.path.basename(path)) or really_open(path))
    after = dataset[0]
    assert opened == ["blue.png"]
    assert [pixels.numel() for pixels in after["pixel_values"]] == [0, 3 * 56 * 56]
    assert [len(layers) for layers in after["vision_features"]] == [1, 0]
    assert torch.equal(after["vision_features"][0][0], torch.ones(1, 16, 8))
    assert torch.equal(after["pixel_values"][1], before["pixel_values"][1])
    for name in ("input_ids", "labels", "image_sizes"):
        assert torch.equal(after[name], before[name])
    assert "image_lookups" not in dataset[1]


def test_image_that_vanished_is_reported_with_a_feature_store_too(make_dataset, tmp_path):
    dataset = make_dataset([_record("red.png")])
    store = FeatureStore(tmp_path / "cache", {})
    store.open()
    dataset.use_feature_store(store)
    (tmp_path / "red.png").unlink()
    with pytest.raises(BadSampleError, match="red.png"):
        dataset[0]
