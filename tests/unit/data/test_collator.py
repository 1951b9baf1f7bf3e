"""Batches equal LLaVA's but for what it hides behind the pad id."""

import pytest
import torch

from llava_saep.constants import IGNORE_INDEX
from llava_saep.data.collator import ConversationCollator

from .conftest import read_golden


def _sample(ids, num_images=0, value=0.0):
    sample = {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}
    if num_images:
        sample["pixel_values"] = torch.full((num_images, 3, 8, 6), value)
    return sample


@pytest.mark.parametrize("name", ["v1/new:mixed", "v1/new:unk"])
def test_padding_equals_llavas(name):
    case = read_golden("collator.json")[name]
    longest = max(end for row in case["attention_spans"] for _, end in row)
    lengths = [row[-1][1] for row in case["attention_spans"]]
    samples = []
    for ids, spans, length in zip(case["input_ids"], case["label_spans"], lengths, strict=True):
        labels = torch.full((length,), IGNORE_INDEX)
        for start, end in spans:
            labels[start:end] = torch.tensor(ids[start:end])
        samples.append({"input_ids": torch.tensor(ids[:length]), "labels": labels})
    batch = ConversationCollator(case["pad_token_id"], (8, 6), 2048)(samples)
    assert batch["input_ids"].tolist() == case["input_ids"]
    for row, length in zip(batch["attention_mask"], lengths, strict=True):
        # LLaVA's mask has holes at real <unk> tokens (case "unk"); ours covers the whole text.
        assert row.tolist() == [1] * length + [0] * (longest - length)
    for row, ids, spans in zip(batch["labels"], case["input_ids"], case["label_spans"], strict=True):
        expected = [IGNORE_INDEX] * longest
        for start, end in spans:
            expected[start:end] = ids[start:end]
        assert row.tolist() == expected


def test_images_of_all_samples_are_joined_in_order():
    samples = [_sample([1, 2], 2, 0.5), _sample([3]), _sample([4], 1, 0.7)]
    batch = ConversationCollator(0, (8, 6), 10)(samples)
    assert batch["pixel_values"].shape == (3, 3, 8, 6)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == pytest.approx([0.5, 0.5, 0.7])


def test_text_only_batch_gets_one_zero_image():
    batch = ConversationCollator(0, (8, 6), 10)([_sample([1, 2]), _sample([3])])
    assert batch["pixel_values"].shape == (1, 3, 8, 6)
    assert not batch["pixel_values"].any()


def test_sample_above_max_length_is_refused():
    with pytest.raises(ValueError, match="3 tokens, more than max_length=2"):
        ConversationCollator(0, (8, 6), 2)([_sample([1, 2, 3])])


def _cut_sample(*crop_counts):
    stacks = [torch.full((count, 3, 8, 6), float(count)) for count in crop_counts]
    sizes = torch.tensor([(100, 50 * count) for count in crop_counts])
    return {**_sample([1, 2]), "pixel_values": stacks, "image_sizes": sizes}


def test_stacks_of_crops_stay_apart_and_keep_their_sizes():
    batch = ConversationCollator(0, (8, 6), 10, cuts_images=True)([_cut_sample(3, 5), _sample([3]), _cut_sample(4)])
    assert [stack.shape[0] for stack in batch["pixel_values"]] == [3, 5, 4]
    assert [stack[0, 0, 0, 0].item() for stack in batch["pixel_values"]] == [3, 5, 4]
    assert batch["image_sizes"].tolist() == [[100, 150], [100, 250], [100, 200]]


def test_text_only_batch_gets_one_zero_crop_where_images_are_cut():
    batch = ConversationCollator(0, (8, 6), 10, cuts_images=True)([_sample([1, 2])])
    (stack,) = batch["pixel_values"]
    assert stack.shape == (1, 3, 8, 6) and not stack.any()
    assert batch["image_sizes"].tolist() == [[8, 6]]
