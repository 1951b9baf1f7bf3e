"""What a client is told of errors holds no path, no trace and nothing of the program; the log has it under an id."""

import logging
import re

import pytest

from llava_saep.serve.api.errors import ApiError
from tests.fixtures.engines import wait_until
from tests.fixtures.requests import ask, question, refused

SECRET = "/srv/models/secret/weights.safetensors: line 3 of modeling.py"


@pytest.mark.parametrize("where", ["error", "error_after_pieces"])
def test_an_unexpected_error_is_an_id_to_the_client_and_a_trace_to_the_log(open_client, engine, where, caplog):
    setattr(engine, where, RuntimeError(SECRET))
    with caplog.at_level(logging.ERROR, "llava_saep"):
        response = ask(open_client(), question())
    error = refused(response, 500)
    error_id = re.fullmatch(r"internal error (\w{12}); the server's log says more", error["message"]).group(1)
    assert error_id in caplog.text and SECRET in caplog.text and "Traceback" in caplog.text
    assert "srv" not in response.text and "Traceback" not in response.text
    assert response.headers["content-type"] == "application/json"


def test_an_error_in_a_stream_ends_it_without_done(open_client, engine, caplog):
    engine.error_after_pieces = RuntimeError(SECRET)
    response = ask(open_client(), question(stream=True))
    assert response.status_code == 200 and "[DONE]" not in response.text and "srv" not in response.text
    assert '"internal error ' in response.text and SECRET in caplog.text
    wait_until(engine.streams[0].closed.is_set)


def test_the_next_question_is_answered(open_client, engine):
    client = open_client()
    for _ in range(20):  # more than the queue holds: no place is lost
        engine.error = RuntimeError(SECRET)
        refused(ask(client, question()), 500)
    engine.error = None
    wait_until(lambda: ask(client, question()).status_code == 200)


def test_headers_do_not_name_the_software(open_client):
    response = open_client().get("/health")
    assert "server" not in response.headers and "x-powered-by" not in response.headers


def test_long_values_are_not_echoed_back(open_client):
    response = ask(open_client(), question(model="x" * 100_000))
    refused(response, 404)
    assert len(response.text) < 1000
    response = ask(open_client(), question() | {"messages": [{"role": "y" * 100_000, "content": ""}]})
    refused(response, 400)
    assert len(response.text) < 1000


def test_no_message_is_long():
    assert len(ApiError(400, "x" * 10_000).body["error"]["message"]) < 1000
