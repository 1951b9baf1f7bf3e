"""Images, characters and messages of a conversation are limited; each refusal names its numbers."""

import pytest

from llava_saep.serve.api import ApiSettings
from llava_saep.serve.limits import Limits
from tests.fixtures.image_files import encoded, gradient
from tests.fixtures.requests import ask, data_url, question, refused

IMAGE = data_url(encoded(gradient(2, 2)))


def turns(count):
    return [{"role": ("user", "assistant")[index % 2], "content": "x"} for index in range(count)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (question(images=[IMAGE] * 9), "message 0 has 9 images, at most 8"),
        (question("x" * 32_001), "has 32,001 characters, at most 32,000"),
        ({"model": "scripted", "messages": turns(101)}, "has 101 messages, at most 100"),
        ({"model": "scripted", "messages": question(images=[IMAGE] * 6)["messages"] * 3}, "has 18 images, at most 16"),
    ],
)
def test_defaults_are_limits(open_client, engine, fields, words):
    error = refused(ask(open_client(), fields), 400)
    assert words in error["message"] and error["code"] == "limit_exceeded" and not engine.asked


def test_what_is_at_the_limits_is_answered(open_client):
    client = open_client()
    assert ask(client, question("x" * 32_000, images=[IMAGE] * 8)).status_code == 200
    assert ask(client, {"model": "scripted", "messages": turns(99)}).status_code == 200


def test_the_answers_length_is_limited(open_client):
    client = open_client(ApiSettings(limits=Limits(max_new_tokens=100)))
    assert "at most 100" in refused(ask(client, question(max_tokens=101)), 400)["message"]
    assert ask(client, question(max_tokens=100)).status_code == 200


def test_an_answer_of_no_stated_length_stays_below_the_limit(open_client, engine):
    ask(open_client(ApiSettings(limits=Limits(max_new_tokens=100))), question())
    assert engine.asked[0][1].max_new_tokens == 100
