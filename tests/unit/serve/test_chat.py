"""The terminal chat: its commands and its memory, with an engine that records what it is asked."""

import functools
import io
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from PIL import Image

from llava_saep.commands.serve import build_parser as build_server_parser
from llava_saep.errors import UserError
from llava_saep.generation import AnswerStatistics, AnswerStream, EngineSettings, GenerationOptions
from llava_saep.serve.chat import ChatSession, build_parser, chat_loop, run_command
from llava_saep.serve.demo.program import build_parser as build_demo_parser
from llava_saep.serve.engine_flags import engine_settings_from, loading_arguments_from
from tests.fixtures.tiny import write_image


class RecordedAnswer(AnswerStream):
    """Two pieces, and statistics of their own."""

    def __init__(self, pieces):
        self.pieces = iter(pieces)
        self.is_closed = False

    def __next__(self):
        return next(self.pieces)

    def close(self):
        self.is_closed = True

    @property
    def statistics(self):
        return AnswerStatistics(
            prompt_tokens=50,
            image_tokens=9,
            cached_tokens=40,
            completion_tokens=11,
            finish_reason="cancelled" if self.is_closed else "length",
            waiting_seconds=0.0,
            first_token_seconds=0.25,
            seconds=0.75,
        )


class RecordingEngine:
    """Answers with the number of messages that it was given."""

    def __init__(self):
        self.seen = []
        self.description = SimpleNamespace(template="v1", takes_system=True)

    def stream(self, messages, options):
        self.seen.append(messages)
        return RecordedAnswer(["answer ", str(len(messages))])


@pytest.fixture
def session():
    return ChatSession(RecordingEngine(), GenerationOptions())


def run(session, text):
    output = io.StringIO()
    chat_loop(session, io.StringIO(text), output, interactive=False)
    return output.getvalue()


def test_turns_are_remembered_and_images_go_with_the_next_question_only(session, tmp_path):
    image = write_image(tmp_path / "an image.png")
    output = run(session, f"/image '{image}'\nwhat?\n\nand now?\n")
    first, second = session.engine.seen
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]
    assert first == [{"role": "user", "content": content}]
    assert second[0] == first[0] and second[1] == {"role": "assistant", "content": "answer 1"}
    assert second[2]["content"] == [{"type": "text", "text": "and now?"}]
    assert output.endswith("ASSISTANT: answer 1\nASSISTANT: answer 3\n")


def test_undo_takes_back_question_and_answer(session):
    run(session, "one\ntwo\n/undo\n")
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    assert "nothing to take back" in run(session, "/undo\n/undo\n")


def test_clear_keeps_the_system_prompt(session):
    run(session, "/system Be brief.\none\n/clear\n")
    assert session.messages == [{"role": "system", "content": "Be brief."}]


def test_template_without_system_prompt_refuses_one(session):
    session.engine.description.takes_system = False
    assert "no place for a system prompt" in run(session, "/system Be brief.\n")
    assert session.messages == []


def test_mistakes_are_answered_and_the_chat_goes_on(session, tmp_path):
    output = run(session, f"/image {tmp_path}/none.png\n/nonsense\nhello\n/exit\nnot read\n")
    assert "none.png" in output and "unknown or incomplete command '/nonsense'" in output
    assert len(session.engine.seen) == 1


def test_failed_answer_leaves_the_conversation_as_it_was(session, tmp_path):
    image = write_image(tmp_path / "a.png")
    run(session, f"/image {image}\n")

    def fail(messages, options):
        raise UserError("too long")

    session.engine.stream = fail
    assert "too long" in run(session, "what?\n")
    assert session.messages == [] and session.waiting_images == [image]


def test_unclosed_quote_is_explained(session):
    with pytest.raises(UserError, match="quote paths"):
        run_command(session, "/image 'a b", io.StringIO())


@pytest.fixture
def address(tmp_path):
    """The address of a folder that this machine serves."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_image_can_be_named_by_its_address(session, tmp_path, address):
    image = write_image(tmp_path / "a.png")
    session.add_image(f"{address}/a.png")
    (shown,) = session.waiting_images
    assert shown.tobytes() == Image.open(image).tobytes()


def test_address_without_an_image_is_named(session, tmp_path, address):
    (tmp_path / "page.html").write_text("<p>no image</p>")
    output = run(session, f"/image {address}/page.html\n/image {address}/none.png\n/image http://127.0.0.1:1/a.png\n")
    assert f"{address}/page.html: cannot be read as an image" in output
    assert f"{address}/none.png: cannot be fetched (HTTP Error 404" in output
    assert "http://127.0.0.1:1/a.png: cannot be fetched" in output
    assert session.waiting_images == []


def test_prompt_is_shown_when_it_is_asked_for(session):
    session.shows_prompts = True
    session.engine.predictor = SimpleNamespace(prompt_text=lambda messages: f"the text of {len(messages)}")
    assert run(session, "one\n").endswith("{'prompt': 'the text of 1', 'outputs': 'answer 1'}\n")


def test_last_question_is_answered_again(session):
    assert "no question to answer again" in run(session, "/again\n")
    output = run(session, "one\ntwo\n/again\n")
    assert session.engine.seen[-1] == session.engine.seen[-2]
    assert output.endswith("ASSISTANT: answer 3\nASSISTANT: answer 3\n")
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2


def test_stats_tell_tokens_and_times_of_the_last_answer(session):
    assert "no answer yet" in run(session, "/stats\n")
    output = run(session, "one\n/stats\n")
    assert "prompt: 50 tokens, 9 of images; 40 were known from earlier turns" in output
    assert "answer: 11 tokens; its length is limited (--max-new-tokens)" in output
    assert "first token after 0.25 s, then 20.0 tokens per second" in output  # ten tokens in half a second


def test_interrupted_answer_stays_as_far_as_it_came(session):
    def interrupted():
        yield "so far"
        raise KeyboardInterrupt

    answer = RecordedAnswer(interrupted())
    session.engine.stream = lambda messages, options: answer
    assert run(session, "one\n/stats\n").startswith("ASSISTANT: so far [stopped]\n")
    assert answer.is_closed and session.messages[-1] == {"role": "assistant", "content": "so far"}


def test_history_shows_images_by_their_names(session, tmp_path):
    image = write_image(tmp_path / "a.png")
    output = run(session, f"/image {image}\nwhat?\n/image {image}\n/history\n")
    assert f"USER: [{image}] what?\nASSISTANT: answer 1\nwaiting: [{image}] \n" in output


def test_saved_chat_goes_on_with_its_images(session, tmp_path):
    image = write_image(tmp_path / "a.png")
    session.waiting_images = [image, Image.open(image).convert("RGB")]
    file = tmp_path / "chat.json"
    run(session, f"/system Be brief.\nwhat?\n/save {file}\n")
    other = ChatSession(RecordingEngine(), GenerationOptions())
    output = run(other, f"/load {file}\nand?\n")
    assert "Going on from" in output and "SYSTEM: Be brief." in output
    assert [message["role"] for message in other.messages] == ["system", "user", "assistant", "user", "assistant"]
    by_path, inside, text = other.messages[1]["content"]
    assert by_path["image"] == image and text == {"type": "text", "text": "what?"}
    assert inside["image"].tobytes() == Image.open(image).convert("RGB").tobytes()
    assert "exists already" in run(session, f"/save {file}\n")
    image.unlink()
    assert "is gone" in run(session, f"/load {file}\n")


@pytest.mark.parametrize("content", ["", "[]", '{"messages": 3}', '{"messages": [{"role": "robot", "content": "x"}]}'])
def test_file_that_is_no_chat_is_named(session, tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    run(session, "one\n")
    assert "is no chat that /save has written" in run(session, f"/load {tmp_path}/a.json\n")
    assert len(session.messages) == 2


def test_engine_flags_become_settings():
    parse = build_parser().parse_args
    assert engine_settings_from(parse(["--model-path", "m"])) == EngineSettings()
    given = "--model-path m --kv-cache static --compile --kv_cache_tokens 900 --cached-chats 1 --cached-bytes 5".split()
    expected = EngineSettings(cache="static", compile=True, max_length=900, max_conversations=1, max_cache_bytes=5)
    assert engine_settings_from(parse(given)) == expected
    with pytest.raises(UserError, match="needs --kv-cache static"):
        engine_settings_from(parse(["--model-path", "m", "--compile"]))


@pytest.mark.parametrize("build", [build_parser, build_demo_parser, build_server_parser])
def test_flags_load_a_model_in_the_same_way_for_chat_page_and_server(build):
    given = "--model-path m --device cpu --model-base b --conv-mode v1 --trust-projector-code --cached-chats 1".split()
    assert loading_arguments_from(build().parse_args(given)) == {
        "device": "cpu",
        "trust_projector_code": True,
        "quantization": None,
        "model_base": "b",
        "template": "v1",
        "settings": EngineSettings(max_conversations=1),
    }
    with pytest.raises(UserError, match="choose one"):
        loading_arguments_from(build().parse_args([*given, "--load-4bit", "--load-8bit"]))


def test_terminal_obeys_no_answer(session, monkeypatch):
    """Escape sequences can write into the clipboard, or show a prompt that is none."""
    pieces = ["a\x1b]52;c;", "eA==\x07b\x9b2J\r\x7f", "\tc\n\u00e9\u4e2d"]
    monkeypatch.setattr(session.engine, "stream", lambda messages, options: RecordedAnswer(pieces))
    output = io.StringIO()
    assert session.ask("Well?", output) == "".join(pieces)
    run_command(session, "/history", output)
    assert "a]52;c;eA==b2J\tc\n\u00e9\u4e2d\n" in output.getvalue()
    assert not set(output.getvalue()) & set("\x1b\x07\x9b\r\x7f")
