"""Batches equal LLaVA's but for what it hides behind the pad id."""

import pytest
import torch

from llava_saep.constants import IGNORE_INDEX
from llava_saep.data.collator import ConversationCollator, count_conversations, count_padding

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


# Packed rows, and batches without padding

ROWS = [[_sample([5, 6, 7], 1, 0.5), _sample([8, 9])], [_sample([1, 2, 3, 4], 2, 0.7)]]


def test_conversations_stand_in_one_row_without_padding():
    batch = ConversationCollator(0, (8, 6), 10, padding_free=True)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 9]
    assert batch["cu_seq_lens_q"].dtype == torch.int32  # as flash attention's kernels want it
    assert batch["max_length_q"] == batch["max_length_k"] == 4
    assert "attention_mask" not in batch
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == pytest.approx([0.5, 0.7, 0.7])


def test_no_label_crosses_from_one_conversation_into_the_next():
    labels = ConversationCollator(0, (8, 6), 10, padding_free=True)(ROWS)["labels"]
    assert labels.tolist() == [[IGNORE_INDEX, 6, 7, IGNORE_INDEX, 9, IGNORE_INDEX, 2, 3, 4]]
    labels = ConversationCollator(0, (8, 6), 10)(ROWS)["labels"]
    assert labels.tolist() == [[IGNORE_INDEX, 6, 7, IGNORE_INDEX, 9], [IGNORE_INDEX, 2, 3, 4, IGNORE_INDEX]]


def test_single_conversations_need_no_padding_either():
    batch = ConversationCollator(0, (8, 6), 10, padding_free=True)([sample for row in ROWS for sample in row])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4]]


def test_packed_rows_are_padded_where_attention_wants_rows():
    batch = ConversationCollator(0, (8, 6), 10)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 4, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert "attention_mask" not in batch  # with one, transformers does not look at the positions


def test_row_above_max_length_is_refused():
    with pytest.raises(ValueError, match="5 tokens, more than max_length=4"):
        ConversationCollator(0, (8, 6), 4)(ROWS)


@pytest.mark.parametrize(
    ("rows", "padding_free", "num_padding"),
    [
        (ROWS, True, 0),
        (ROWS, False, 1),
        ([[*ROWS[0], *ROWS[0]], ROWS[1]], False, 6),
        ([sample for row in ROWS for sample in row], False, 3),
        ([sample for row in ROWS for sample in row], True, 0),
    ],
)
def test_padding_and_conversations_are_counted(rows, padding_free, num_padding):
    batch = ConversationCollator(0, (8, 6), 10, padding_free=padding_free)(rows)
    assert count_padding(batch) == num_padding
    assert count_conversations(batch) == (5 if num_padding == 6 else 3)
