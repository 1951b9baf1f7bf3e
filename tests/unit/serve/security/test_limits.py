"""Limits of conversations and clients: each is a flag, and what exceeds one is told its number."""

from dataclasses import fields

import pytest

from llava_saep.errors import UserError
from llava_saep.program import AbbreviatingParser
from llava_saep.serve.limits import Limits, add_limit_flags, check_conversation, limits_from
from llava_saep.serve.rate import RequestRate

IMAGE = {"type": "image", "image": None}


def parsed(*flags):
    parser = AbbreviatingParser()
    add_limit_flags(parser)
    return limits_from(parser.parse_args(flags))


def text(content):
    return {"type": "text", "text": content}


def test_each_limit_is_a_flag():
    assert parsed() == Limits()
    for index, limit in enumerate(fields(Limits), start=1):
        assert getattr(parsed(f"--{limit.name.replace('_', '-')}", str(index)), limit.name) == index


@pytest.mark.parametrize("flags", ["--max-image-bytes 0", "--max-generation-seconds nan", "--max-queue -1"])
def test_a_limit_that_lets_nothing_through_is_refused(flags):
    with pytest.raises(UserError, match=f"{flags.split()[0]} must be at least"):
        parsed(*flags.split())


def test_a_conversation_within_the_limits_passes():
    messages = [{"role": "user", "content": [IMAGE, IMAGE, text("12345")]}, {"role": "assistant", "content": "12345"}]
    check_conversation(
        messages, Limits(max_images_per_message=2, max_images=2, max_prompt_characters=10, max_messages=2)
    )


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(max_messages=2), "has 3 messages, at most 2"),
        (Limits(max_images_per_message=1), "message 2 has 2 images, at most 1"),
        (Limits(max_images=2), "has 3 images, at most 2"),
        (Limits(max_prompt_characters=5), "has 6 characters, at most 5"),
    ],
)
def test_what_a_conversation_exceeds_is_named(limits, message):
    messages = [
        {"role": "user", "content": [IMAGE, text("ab")]},
        {"role": "assistant", "content": "cd"},
        {"role": "user", "content": [IMAGE, text("ef"), IMAGE]},
    ]
    with pytest.raises(UserError, match=message):
        check_conversation(messages, limits)


def test_a_client_waits_until_its_oldest_request_is_a_minute_old():
    now = [100.0]
    rate = RequestRate(2, clock=lambda: now[0])
    assert rate.seconds_to_wait("a") == 0
    now[0] += 10
    assert rate.seconds_to_wait("a") == 0
    assert rate.seconds_to_wait("a") == pytest.approx(50)
    assert rate.seconds_to_wait("b") == 0  # others do not wait for it
    now[0] += 50
    assert rate.seconds_to_wait("a") == 0
    assert rate.seconds_to_wait("a") == pytest.approx(10)


def test_clients_that_come_once_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("llava_saep.serve.rate._MAX_CLIENTS", 3)
    rate = RequestRate(1)
    for client in "abcd":
        rate.seconds_to_wait(client)
    assert len(rate._times) == 3
