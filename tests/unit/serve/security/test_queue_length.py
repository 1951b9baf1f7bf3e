"""Questions that wait are limited: further ones are refused with 503, and room is made when a client leaves."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from llava_saep.serve.api import ApiSettings, create_app
from llava_saep.serve.limits import Limits
from tests.fixtures.engines import ScriptedEngine, wait_until
from tests.fixtures.requests import ask, question, refused
from tests.fixtures.servers import serving


def test_a_question_too_many_is_refused_and_the_others_are_answered(open_client, engine):
    client = open_client(ApiSettings(limits=Limits(max_queue=2)))
    engine.may_go_on.clear()
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, client, question(stream=index == 1)) for index in range(3)]
        wait_until(lambda: len(engine.streams) == 3)
        for stream in (False, True):
            response = ask(client, question(stream=stream))
            error = refused(response, 503)
            assert error["code"] == "overloaded" and int(response.headers["retry-after"]) > 0
        engine.may_go_on.set()
        assert [answer.result().status_code for answer in answers] == [200] * 3
    assert ask(client, question()).status_code == 200


def test_replicas_answer_several_at_once(open_client, engine):
    client = open_client(ApiSettings(limits=Limits(max_queue=0), answers_at_once=2))
    engine.may_go_on.clear()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, client, question()) for _ in range(2)]
        wait_until(lambda: len(engine.streams) == 2)
        refused(ask(client, question()), 503)
        engine.may_go_on.set()
        assert [answer.result().status_code for answer in answers] == [200] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_model_and_makes_room(stream):
    engine = ScriptedEngine(["Hello"])
    engine.may_go_on.clear()
    settings = ApiSettings(limits=Limits(max_queue=0))
    with serving(create_app({"scripted": engine}, settings)) as address, httpx.Client(base_url=address) as client:
        with contextlib.suppress(httpx.ReadTimeout):
            with client.stream("POST", "/v1/chat/completions", json=question(stream=stream), timeout=0.5) as response:
                assert stream and response.status_code == 200
                lines = response.iter_lines()  # kept: one that nobody holds closes the response
                next(lines)
                assert client.post("/v1/chat/completions", json=question()).status_code == 503
        wait_until(engine.streams[0].closed.is_set)
        engine.may_go_on.set()
        wait_until(lambda: client.post("/v1/chat/completions", json=question()).status_code == 200)
        assert '{path="/v1/chat/completions",status="499"}' in client.get("/metrics").text or stream


def test_pixels_of_questions_that_wait_are_limited(open_client, engine):
    client = open_client(ApiSettings(limits=Limits(max_pixels_in_memory=1000)))
    engine.may_go_on.clear()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, client, question()) for _ in range(2)]  # of 384 pixels each
        wait_until(lambda: len(engine.streams) == 2)
        assert "fill the memory" in refused(ask(client, question()), 503)["message"]
        engine.may_go_on.set()
        assert [answer.result().status_code for answer in answers] == [200] * 2
    assert ask(client, question()).status_code == 200


@pytest.mark.parametrize("fields", [question(images=["data:image/png;base64,AAAA"]), question(images=["file:///x"])])
def test_refused_questions_take_no_room(open_client, fields):
    client = open_client(ApiSettings(limits=Limits(max_queue=0)))
    for _ in range(3):
        refused(ask(client, fields), 400)
    wait_until(lambda: ask(client, question()).status_code == 200)
