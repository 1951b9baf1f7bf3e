"""Chat completions in OpenAI's forms, over an engine whose answer is known."""

import json

import pytest

from llava_saep.errors import OverloadedError, UserError
from llava_saep.generation import GenerationOptions
from llava_saep.serve.api import ApiSettings
from llava_saep.serve.limits import Limits
from tests.fixtures.engines import ScriptedEngine, wait_until
from tests.fixtures.image_files import gradient
from tests.fixtures.requests import ask, question, refused


def events(response):
    """The chunks of a stream, which must end with [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def test_a_completion_has_openais_form(open_client, engine):
    answer = ask(open_client(), question()).json()
    assert answer["object"] == "chat.completion" and answer["model"] == "scripted"
    assert answer["id"].startswith("chatcmpl-")
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"] == "Hello there"
    assert choice["finish_reason"] == "stop"
    assert answer["usage"] == {
        "prompt_tokens": 20,
        "completion_tokens": 2,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 4, "image_tokens": 9},
    }
    assert engine.streams[0].closed.is_set()


def test_the_engine_gets_the_conversation_with_its_images(open_client, engine):
    fields = question("And here?")
    fields["messages"] = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]},
        *fields["messages"],
    ]
    ask(open_client(), fields)
    [(messages, _, max_seconds)] = engine.asked
    assert messages[:3] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]},
    ]
    image, text = messages[3]["content"]
    assert image["image"].tobytes() == gradient().tobytes()
    assert text == {"type": "text", "text": "And here?"}
    assert max_seconds == Limits().max_generation_seconds


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, GenerationOptions(max_new_tokens=512, temperature=1.0)),
        ({"temperature": 0, "max_tokens": 7}, GenerationOptions(max_new_tokens=7)),
        ({"temperature": 1e-9, "max_completion_tokens": 8}, GenerationOptions(max_new_tokens=8)),
        (
            {"temperature": 0.5, "top_p": 0.9, "seed": 3, "n": 1, "user": "me", "tools": None, "unheard_of": [1]},
            GenerationOptions(temperature=0.5, top_p=0.9, seed=3),
        ),
    ],
)
def test_fields_become_generation_options(open_client, engine, fields, options):
    assert ask(open_client(), question(**fields)).status_code == 200
    assert engine.asked[0][1] == options


def test_a_stream_has_openais_chunks(open_client, engine):
    chunks = events(ask(open_client(), question(stream=True)))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hello"},
        {"content": " there"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert not any("usage" in chunk for chunk in chunks)
    assert engine.streams[0].closed.is_set()


def test_usage_ends_a_stream_where_it_is_asked_for(open_client):
    *others, usage = events(ask(open_client(), question(stream=True, stream_options={"include_usage": True})))
    assert others[-1]["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["usage"] is None for chunk in others)
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 22


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_string(open_client, engine, stream):
    engine.pieces = ["one t", "wo\nth", "ree"] + ["more"] * 50
    response = ask(open_client(), question(stream=stream, stop=["\nthree", "four"]))
    if stream:
        chunks = events(response)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        [choice] = response.json()["choices"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason) == ("one two", "stop")
    wait_until(engine.streams[0].closed.is_set)
    assert len(engine.streams[0].left) == 50  # the model did not write on


@pytest.mark.parametrize(("reason", "details"), [("length", None), ("time_limit", "time_limit")])
def test_an_answer_that_was_cut_off_says_so(open_client, engine, reason, details):
    engine.reason = reason
    [choice] = ask(open_client(), question()).json()["choices"]
    assert choice["finish_reason"] == "length" and choice.get("finish_details") == details


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"n": 2}, "n", "not supported"),
        ({"n": True}, "n", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 3000}, "max_tokens", "at most 2048"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"max_tokens": 10**30}, "max_tokens", "at most 2048"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"stop": [""]}, "stop", "up to 4 texts"),
        ({"stop": list("abcde")}, "stop", "up to 4 texts"),
        ({"stop": 3}, "stop", "valid"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "Hello"}, "messages", "valid list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0", "'system', 'developer', 'user', 'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "messages.0.content.0", "'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "required"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "unicode"),
        ({"model": None}, "model", "valid string"),
    ],
)
def test_what_is_wrong_in_a_request_is_named(open_client, engine, fields, param, words):
    error = refused(ask(open_client(), question(**fields)), 400)
    assert error["param"] == param and words in error["message"] and error["type"] == "invalid_request_error"
    assert not engine.asked


def test_an_unknown_model_is_named_with_those_that_there_are(open_client):
    error = refused(ask(open_client(), question(model="gpt-4")), 404)
    assert error["code"] == "model_not_found" and "'gpt-4'" in error["message"] and "scripted" in error["message"]


def test_a_system_message_is_refused_where_the_model_has_no_place_for_it(open_client, engine):
    engine.takes_system = False
    fields = question()
    fields["messages"].insert(0, {"role": "system", "content": "Be short."})
    assert "no place for a system message" in refused(ask(open_client(), fields), 400)["message"]


def test_the_engines_refusal_reaches_the_client(open_client, engine):
    engine.error = UserError("the conversation has 600 tokens")
    assert refused(ask(open_client(), question()), 400)["message"] == "the conversation has 600 tokens"
    engine.error = OverloadedError("all replicas are busy", retry_after_seconds=6.5)
    response = ask(open_client(), question())
    assert refused(response, 503)["code"] == "overloaded" and response.headers["retry-after"] == "7"


def test_models_are_listed(open_client):
    client = open_client()
    [model] = client.get("/v1/models").json()["data"]
    assert model["id"] == "scripted" and model["object"] == "model" and model["tokens_per_image"] == 9
    assert client.get("/v1/models/scripted").json() == model
    assert refused(client.get("/v1/models/other"), 404)["code"] == "model_not_found"


def test_health_needs_nothing(open_client):
    assert open_client().get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/", 404), ("GET", "/v1/chat/completions", 405)])
def test_unknown_paths_and_methods_are_refused_in_the_same_form(open_client, method, path, status):
    refused(open_client().request(method, path), status)


def test_several_models_are_told_apart(open_client):
    from starlette.testclient import TestClient

    from llava_saep.serve.api import create_app

    engines = {"a": ScriptedEngine(["I am a"]), "b": ScriptedEngine(["I am b"])}
    with TestClient(create_app(engines, ApiSettings())) as client:
        for name in "ab":
            text = ask(client, question(model=name)).json()["choices"][0]["message"]["content"]
            assert text == f"I am {name}"
