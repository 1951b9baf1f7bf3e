"""Bodies of requests: limited while they are read, and parsed without growing in memory."""

import asyncio
import json
import time
import tracemalloc

import pytest
from starlette.requests import Request

from llava_saep.serve.api import ApiSettings
from llava_saep.serve.api import body as body_module
from llava_saep.serve.api.body import BodyReader, parse_json
from llava_saep.serve.api.errors import ApiError
from llava_saep.serve.limits import Limits
from tests.fixtures.requests import ask, question, refused

JSON = {"Content-Type": "application/json"}


def post(client, content, **headers):
    return client.post("/v1/chat/completions", content=content, headers=JSON | headers)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be used"),
        (b"{", "cannot be used"),
        (b"null", "expected an object, got NoneType"),
        (b"[]", "expected an object, got list"),
        (b'"text"', "expected an object, got str"),
        (b"\xff\xfe{}", "not UTF-8"),
        ('{"model": "é"}'.encode("utf-16"), "not UTF-8"),
        (b'{"model": NaN}', "NaN is no JSON"),
        (b'{"seed": -Infinity}', "Infinity is no JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "limit"),
        (b"[" * 60_000, "nested too deeply"),
        (b'{"a":' * 30_000 + b"1" + b"}" * 30_000, "nested too deeply"),
        (b"[" + b"[]," * 100_000 + b"[]]", "too many elements"),
        (b"{}{}", "cannot be used"),
        (b"'single'", "cannot be used"),
        (b"\0" * 100, "cannot be used"),
    ],
)
def test_what_is_no_json_object_is_refused(open_client, engine, content, words):
    assert words in refused(post(open_client(), content), 400)["message"]
    assert not engine.asked


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 4000, "1e-999", "-0.0", "0.1e1"])
def test_huge_numbers_are_refused_where_a_limit_is_meant(open_client, number):
    fields = json.dumps(question())[:-1] + f', "max_tokens": {number}}}'
    refused(post(open_client(), fields.encode()), 400)


def test_a_body_that_announces_too_much_is_refused_unread(open_client):
    client = open_client(ApiSettings(limits=Limits(max_request_bytes=1000)))
    assert refused(post(client, b"x" * 1001), 413)["code"] == "request_too_large"
    assert ask(client, question(images=[])).status_code == 200


def test_a_body_in_pieces_is_refused_when_it_has_too_many(open_client, monkeypatch):
    """Without a Content-Length, and without an end: the reader stops by itself."""
    monkeypatch.setattr(body_module, "_DISCARD_SECONDS", 0.05)
    taken = [0]

    async def receive():
        taken[0] += 100
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"x" * 100, "more_body": True}

    async def read():
        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
        async with BodyReader(1000, 10).reading(Request(scope, receive)):
            pytest.fail("was read")

    start = time.monotonic()
    with pytest.raises(ApiError, match="more than 1,000 bytes"):
        asyncio.run(read())
    assert taken[0] > 1000 and time.monotonic() - start < 5


def test_a_body_that_comes_too_slowly_is_given_up(monkeypatch):
    monkeypatch.setattr(body_module, "BODY_SECONDS", 0.1)

    async def receive():
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def read():
        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
        async with BodyReader(10**6, 10).reading(Request(scope, receive)):
            pytest.fail("was read")

    with pytest.raises(ApiError) as refusal:
        asyncio.run(read())
    assert refusal.value.status == 408


def test_bodies_of_all_clients_together_are_limited(monkeypatch):
    reader = BodyReader(1000, 10)
    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}

    async def receive():
        return {"type": "http.request", "body": b'{"a":"' + b"x" * 900 + b'"}', "more_body": False}

    async def hold(number):
        if number == 0:
            return "all were let in"
        try:
            async with reader.reading(Request(scope, receive)):
                return await hold(number - 1)
        except ApiError as error:
            return error.status

    assert asyncio.run(hold(4)) == "all were let in"
    assert asyncio.run(hold(5)) == 503
    assert asyncio.run(hold(4)) == "all were let in"  # what was refused takes no room


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "identity, gzip"])
def test_compressed_bodies_are_refused(open_client, encoding):
    refused(post(open_client(), b"{}", **{"Content-Encoding": encoding}), 415)


def test_parsing_takes_no_more_memory_than_a_few_times_the_body():
    """32 MB of empty lists would be 700 MB of objects."""
    content = b"[" + b"[]," * (4 * 10**6) + b"[]]"
    tracemalloc.start()
    with pytest.raises(ApiError, match="too many elements"):
        parse_json(content, 82_000)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_a_prompt_of_brackets_is_let_pass(open_client):
    assert ask(open_client(), question("[{,]" * 8000, images=[])).status_code == 200
