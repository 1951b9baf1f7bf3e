"""How lmms-eval's requests become messages and settings; lmms-eval itself is in tests/end_to_end/test_lmms_eval.py."""

from types import SimpleNamespace

import pytest
from PIL import Image

from llava_saep.errors import UserError
from llava_saep.evaluation.lmms_eval_adapter import (
    batches_of,
    checked_image,
    generation_options,
    marked_content,
    ordered_message,
)
from llava_saep.generation import GenerationOptions
from llava_saep.generation.messages import parse_messages

IMAGES = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]


def prompt(content):
    """The text as the predictor reads it, with `<image>` where images go, and the images."""
    turns, images, _ = parse_messages([{"role": "user", "content": content}], spell_out=str)
    return turns[0].text, images


def test_images_go_before_a_text_that_marks_none():
    assert prompt(marked_content("What?", IMAGES)) == ("<image>\n<image>\nWhat?", IMAGES)
    assert prompt(marked_content("What?", [])) == ("What?", [])


def test_images_go_where_a_text_marks_them():
    assert prompt(marked_content("Is <image> like <image>?", IMAGES)) == ("Is <image> like <image>?", IMAGES)
    with pytest.raises(UserError, match="1 <image-placeholder> and 2 images"):
        marked_content("Is <image> like that?", IMAGES)


def test_a_chat_keeps_the_order_of_texts_and_images():
    first, second = ({"type": "image", "image": image} for image in IMAGES)
    ask, also = {"type": "text", "text": "Look:"}, {"type": "text", "text": "and"}
    mixed = ordered_message({"role": "user", "content": [ask, first, also, second]})
    assert prompt(mixed["content"]) == ("Look:\n<image>\nand\n<image>", IMAGES)
    plain = {"role": "user", "content": [first, second, ask]}
    assert ordered_message(plain) is plain
    words = {"role": "system", "content": [ask]}
    assert ordered_message(words) is words


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, GenerationOptions(max_new_tokens=1024)),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": None, "num_beams": 1}, GenerationOptions(max_new_tokens=16)),
        ({"temperature": 0.7, "do_sample": False}, GenerationOptions(max_new_tokens=1024)),
        ({"temperature": 0.7, "top_p": 0.9}, GenerationOptions(max_new_tokens=1024, temperature=0.7, top_p=0.9)),
        ({"until": ["\n\n"], "num_beams": 5}, GenerationOptions(max_new_tokens=1024, num_beams=5)),
    ],
)
def test_a_tasks_settings_are_read_as_it_means_them(settings, expected):
    assert generation_options(settings) == expected


def request(context, task="a", **settings):
    return SimpleNamespace(args=(context, settings, None, 0, task, "test"), task_name=task)


def test_every_request_is_in_one_batch_with_its_like():
    requests = [request("x" * (index % 5), task, max_new_tokens=limit)
                for index, (task, limit) in enumerate([("a", 1), ("b", 1), ("a", 2)] * 7)]  # fmt: skip
    batches = batches_of(requests, 3)
    assert sorted(index for batch in batches for index in batch) == list(range(21))
    assert max(map(len, batches)) == 3
    for batch in batches:
        assert len({(requests[index].task_name, requests[index].args[1]["max_new_tokens"]) for index in batch}) == 1
        lengths = [len(requests[index].args[0]) for index in batch]
        assert lengths == sorted(lengths, reverse=True)


def test_what_is_no_image_is_named_with_its_task():
    assert checked_image(IMAGES[0], "mme") is IMAGES[0]
    with pytest.raises(UserError, match="task videomme gives a dict; llava_saep sees images"):
        checked_image({"array": []}, "videomme")
