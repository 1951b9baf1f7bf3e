"""The batch that all sides train on: the lengths asked for, the same for every side, padded as usual."""

import pytest
import torch

from llava_saep.bench.training.conversations import (
    Conversation,
    ConversationSamples,
    TextLengths,
    draw_conversations,
    pad_to_longest,
    padding_share,
)
from llava_saep.bench.training.shapes import PRESETS
from llava_saep.constants import IGNORE_INDEX

SHAPE = PRESETS["tiny"]


def test_lengths_fill_the_range_and_answers_their_share():
    drawn = draw_conversations(500, TextLengths(40, 400, 0.5), seed=0)
    lengths = [each.num_text_tokens for each in drawn]
    assert (min(lengths), max(lengths)) == (40, 400)  # a missing end has a chance of (360 / 361) ** 500, a quarter
    assert all(each.num_supervised == round(each.num_text_tokens * 0.5) for each in drawn)


def test_fewer_conversations_are_the_first_of_many():
    lengths = TextLengths(2, 50, 0.5)
    assert draw_conversations(3, lengths, seed=1) == draw_conversations(8, lengths, seed=1)[:3]
    assert draw_conversations(8, lengths, seed=1) != draw_conversations(8, lengths, seed=2)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_every_text_has_a_question_and_an_answer(share):
    for each in draw_conversations(50, TextLengths(2, 3, share), seed=0):
        assert 0 < each.num_supervised < each.num_text_tokens


def test_sample_is_start_image_text_with_the_end_learned():
    (sample,) = [ConversationSamples([Conversation(6, 2)], SHAPE, num_image_tokens=4, seed=0)[0]]
    ids, labels = sample["input_ids"], sample["labels"]
    assert len(ids) == len(labels) == 10
    assert ids[0] == 1
    assert (ids[1:5] == SHAPE.image_token_id).all()
    assert ((ids[5:] >= 3) & (ids[5:] < SHAPE.image_token_id)).all()
    assert (labels[:8] == IGNORE_INDEX).all()
    assert torch.equal(labels[8:], ids[8:])
    assert sample["pixel_values"].shape == (1, 3, 56, 56)


def test_texts_and_pixels_do_not_depend_on_how_many_tokens_an_image_takes():
    conversations = draw_conversations(2, TextLengths(5, 9, 0.5), seed=0)
    few, many = (ConversationSamples(conversations, SHAPE, num_tokens, seed=0) for num_tokens in (1, 16))
    for one, other in zip(few, many, strict=False):
        assert torch.equal(one["input_ids"][2:], other["input_ids"][17:])
        assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_padding_is_what_the_model_is_given_beyond_the_tokens():
    samples = ConversationSamples([Conversation(6, 2), Conversation(2, 1)], SHAPE, num_image_tokens=4, seed=0)
    batch = pad_to_longest([samples[0], samples[1]])
    assert batch["input_ids"].shape == (2, 10)
    assert batch["attention_mask"].sum() == 10 + 6
    assert (batch["labels"] != IGNORE_INDEX).sum() == 2 + 1
    assert padding_share(batch["input_ids"].numel(), sum(samples.lengths)) == pytest.approx(4 / 20)
