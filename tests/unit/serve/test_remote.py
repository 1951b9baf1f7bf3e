"""An engine over the network: what it sends, what it makes of answers, and that errors say what to do."""

import asyncio
import base64
import io
import json
import logging
import threading
import time

import pytest
import uvicorn
from PIL import Image

from llava_saep.errors import UserError
from llava_saep.generation import GenerationOptions
from llava_saep.serve import chat
from llava_saep.serve.access import API_KEY_VARIABLE
from llava_saep.serve.remote import Endpoint, image_data_url, read_api_key, remote_engines

QUESTION = [{"role": "user", "content": "Say hello."}]
MODEL = {"id": "tiny", "object": "model", "projector": "saep", "tokens_per_image": 9, "context_length": 512}


class FakeServer:
    """A server of OpenAI's protocol with answers written in the test; remembers what it was sent and who hung up."""

    def __init__(self):
        self.models = [MODEL]
        self.events = [piece("hello"), piece(" there"), finish("stop"), "[DONE]"]
        self.pause_seconds = 0.0
        self.refusal = None
        self.requests = []
        self.headers = []
        self.hung_up = threading.Event()

    async def __call__(self, scope, receive, send):
        assert scope["type"] == "http"
        self.headers.append(dict(scope["headers"]))
        body, message = b"", {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            body += message["body"]
        if self.refusal is not None:
            await respond(send, *self.refusal)
        elif scope["path"] == "/v1/models":
            await respond(send, 200, {"object": "list", "data": self.models})
        else:
            self.requests.append(json.loads(body))
            await self.stream(receive, send)

    async def stream(self, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        hang_up = asyncio.create_task(receive())
        for event in self.events:
            data = event if isinstance(event, str) else json.dumps(event)
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
            done, _ = await asyncio.wait([hang_up], timeout=self.pause_seconds)
            if done:
                self.hung_up.set()
                return
        await send({"type": "http.response.body", "body": b""})


async def respond(send, status, body, headers=()):
    headers = [(b"content-type", b"application/json"), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def piece(text):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


def finish(reason):
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


@pytest.fixture
def server():
    fake = FakeServer()
    config = uvicorn.Config(fake, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    fake.url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    yield fake
    running.should_exit = True
    thread.join()


@pytest.fixture
def engine(server):
    engine = remote_engines(Endpoint(url=server.url))["tiny"]
    yield engine
    engine.close()


def test_answer_arrives_in_the_servers_pieces_with_its_counts(server, engine):
    usage = {"prompt_tokens": 20, "completion_tokens": 3}
    usage["prompt_tokens_details"] = {"cached_tokens": 5, "image_tokens": 9}
    server.events.insert(-1, {"choices": [], "usage": usage})
    stream = engine.stream(QUESTION)
    assert list(stream) == ["hello", " there"]
    statistics = stream.statistics
    assert (statistics.prompt_tokens, statistics.completion_tokens) == (20, 3)
    assert (statistics.cached_tokens, statistics.image_tokens) == (5, 9)
    assert statistics.finish_reason == "stop"
    assert 0 < statistics.first_token_seconds <= statistics.seconds


def test_only_line_feeds_end_an_events_line(server, engine):
    """Unicode has other line ends, which JSON may hold as they are."""
    server.events[0] = json.dumps(piece("a\u2028b\x85c\u2029"), ensure_ascii=False)
    assert list(engine.stream(QUESTION)) == ["a\u2028b\x85c\u2029", " there"]


def test_reason_that_openai_has_no_word_for_is_kept(server, engine):
    server.events[2]["choices"][0] |= {"finish_reason": "length", "finish_details": "time_limit"}
    stream = engine.stream(QUESTION)
    list(stream)
    assert stream.statistics.finish_reason == "time_limit"


def test_pieces_are_handed_on_before_the_answer_is_complete(server, engine):
    server.pause_seconds = 0.4
    stream, started = engine.stream(QUESTION), time.monotonic()
    assert next(stream) == "hello"
    assert time.monotonic() - started < 0.4
    stream.close()


def test_conversation_and_options_are_sent_as_the_protocol_has_them(server, engine, tmp_path):
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (8, 6), "red").save(path)
    drawn = Image.new("RGB", (4, 4), "blue")
    parts = [{"type": "image", "image": path}, {"type": "image", "image": drawn}, {"type": "text", "text": "<image>?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    list(engine.stream(messages, GenerationOptions(max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3)))
    (request,) = server.requests
    assert request["model"] == "tiny" and request["stream"] is True
    assert (request["max_tokens"], request["temperature"], request["top_p"], request["seed"]) == (7, 0.5, 0.9, 3)
    system, user = request["messages"]
    assert system == messages[0]
    urls = [part["image_url"]["url"] for part in user["content"][:2]]
    assert base64.b64decode(urls[0].removeprefix("data:image/jpeg;base64,")) == path.read_bytes()
    sent = Image.open(io.BytesIO(base64.b64decode(urls[1].removeprefix("data:image/png;base64,"))))
    assert sent.tobytes() == drawn.tobytes()
    assert user["content"][2] == parts[2]


def test_closing_hangs_up_though_a_thread_waits_for_the_next_piece(server, engine):
    server.pause_seconds = 30
    stream, pieces = engine.stream(QUESTION), []
    reader = threading.Thread(target=lambda: pieces.extend(stream))
    reader.start()
    time.sleep(0.3)
    stream.close()
    reader.join(timeout=5)
    assert not reader.is_alive() and pieces == ["hello"]
    assert server.hung_up.wait(5), "the server was not told"
    assert stream.statistics.finish_reason == "cancelled"
    stream.close()


def test_time_limit_ends_an_answer(server, engine):
    server.pause_seconds = 30
    stream = engine.stream(QUESTION, max_seconds=0.3)
    assert list(stream) == ["hello"]
    assert stream.statistics.finish_reason == "time_limit"
    assert server.hung_up.wait(5)


def test_answers_of_several_threads_do_not_mix(server, engine):
    server.pause_seconds = 0.02
    answers = []
    threads = [threading.Thread(target=lambda: answers.append("".join(engine.stream(QUESTION)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["hello there"] * 8


@pytest.mark.parametrize(
    "status, body, headers, expected",
    [
        (400, {"error": {"message": "message 0 has role 'x'"}}, [], "message 0 has role 'x'"),
        (422, {"detail": "not that way"}, [], "not that way"),
        (503, {"error": {"message": "the queue is full"}}, [(b"retry-after", b"4")], "full; try again in 4 seconds"),
        (429, {"error": {"message": "too many"}}, [(b"retry-after", b"60")], "too many; try again in 60 seconds"),
        (401, {"error": {"message": "no key"}}, [], "no key; name the server's key with --api-key-file"),
        (500, ["?"], [], "the server answers 500"),
        (307, {}, [(b"location", b"http://127.0.0.1:1/")], "the server answers 307"),
    ],
)
def test_refusal_is_told_in_the_servers_words(server, engine, status, body, headers, expected):
    server.refusal = (status, body, headers)
    with pytest.raises(UserError, match=expected):
        engine.stream(QUESTION)


def test_error_in_the_middle_of_an_answer_comes_after_the_pieces_before_it(server, engine):
    server.events = [piece("hel"), {"error": {"message": "internal error 12ab"}}]
    stream = engine.stream(QUESTION)
    assert next(stream) == "hel"
    with pytest.raises(UserError, match="internal error 12ab"):
        next(stream)
    assert list(stream) == []


@pytest.mark.parametrize("rest, expected", [([], "before the answer's end"), (["{"], "its reply is malformed")])
def test_answer_that_breaks_off_is_an_error(server, engine, rest, expected):
    server.events = [piece("hel"), *rest]
    with pytest.raises(UserError, match=expected):
        list(engine.stream(QUESTION))


def test_server_that_is_gone_is_named_without_its_address(server, engine):
    engine._client.base_url = "http://127.0.0.1:9"
    with pytest.raises(UserError, match="cannot be reached") as refusal:
        engine.stream(QUESTION)
    assert "127.0.0.1" not in str(refusal.value)


def test_key_is_sent_and_shown_nowhere(server):
    endpoint = Endpoint(url=f"{server.url}/v1/", api_key="secret")
    list(remote_engines(endpoint)["tiny"].stream(QUESTION))
    assert [headers[b"authorization"] for headers in server.headers] == [b"Bearer secret"] * 2
    assert "secret" not in repr(endpoint)


def test_key_over_an_unencrypted_network_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        Endpoint(url="http://192.0.2.1:8000", api_key="secret")
    assert "unencrypted" in caplog.text and "secret" not in caplog.text


def test_description_is_what_the_server_tells(server, engine):
    assert engine.description.projector == "saep"
    assert engine.description.tokens_per_image == 9
    server.models = [{"id": "other"}]
    foreign = remote_engines(Endpoint(url=server.url))["other"].description
    assert (foreign.projector, foreign.tokens_per_image, foreign.takes_system) == ("unknown", 0, True)


def test_wrong_addresses_say_what_is_expected(server):
    for url in ("127.0.0.1:8000", "ftp://host/", "http://"):
        with pytest.raises(UserError, match="expected the address of a server"):
            Endpoint(url=url)
    with pytest.raises(UserError, match="no connection"):
        remote_engines(Endpoint(url="http://127.0.0.1:9"))
    server.models = []
    with pytest.raises(UserError, match="no model loaded"):
        remote_engines(Endpoint(url=server.url))


def test_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv(API_KEY_VARIABLE, "from-environment\n")
    assert read_api_key(None) == "from-environment"
    file = tmp_path / "key"
    file.write_text("from-file\n")
    assert read_api_key(file) == "from-file"
    file.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_api_key(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_api_key(tmp_path / "absent")


def test_file_that_is_no_image_is_named_without_its_folder(tmp_path):
    (tmp_path / "notes.png").write_text("<html>")
    with pytest.raises(UserError, match=r"^notes.png: the file cannot be read as an image"):
        image_data_url(tmp_path / "notes.png")


def test_image_in_a_format_that_servers_do_not_take_is_sent_as_png(tmp_path):
    Image.new("CMYK", (4, 4)).save(tmp_path / "scan.tiff")
    url = image_data_url(tmp_path / "scan.tiff")
    assert Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))).mode == "RGB"


def test_demo_offers_the_models_of_a_server(server):
    from llava_saep.serve.demo.program import build_catalog, build_parser

    server.models = [MODEL, {"id": "other"}]
    catalog = build_catalog(build_parser().parse_args(["--api", server.url]))
    assert catalog.loaded_ids == ["tiny", "other"]
    assert "".join(catalog.engine("tiny").stream(QUESTION)) == "hello there"
    with pytest.raises(UserError, match="runs elsewhere"):
        catalog.unload("tiny")
    catalog.close()
    with pytest.raises(UserError, match="no model: give .* --api"):
        build_catalog(build_parser().parse_args([]))


def test_terminal_chat_asks_a_server(server, capsys):
    assert chat.main(["--api", server.url, "--query", "Say hello.", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "hello there\n"
    assert server.requests[-1]["max_tokens"] == 256, "half of the context is left to the prompt"
    server.models = [MODEL, {"id": "other"}]
    assert chat.main(["--api", server.url, "--model-path", "other", "--query", "Say hello."]) == 0
    assert server.requests[-1]["model"] == "other"
    for flags, expected in (
        ([], "several models; say which with --model-path NAME: tiny, other"),
        (["--model-path", "absent"], "no model 'absent'; there is tiny, other"),
        (["--debug"], "--debug shows prompts"),
    ):
        with pytest.raises(UserError, match=expected):
            chat.main(["--api", server.url, *flags])
    with pytest.raises(UserError, match="give --model-path FOLDER, or --api"):
        chat.main([])
