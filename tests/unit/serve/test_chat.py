"""The terminal chat: its commands and its memory, with a predictor that records what it is asked."""

import io
from types import SimpleNamespace

import pytest

from llava_saep.errors import UserError
from llava_saep.generation import GenerationOptions
from llava_saep.serve.chat import ChatSession, chat_loop, run_command
from tests.fixtures.tiny import write_image


class RecordingPredictor:
    """Answers with the number of messages that it was given."""

    def __init__(self):
        self.seen = []
        self.template = SimpleNamespace(name="v1", takes_system=True)

    def stream(self, messages, options):
        self.seen.append(messages)
        yield "answer "
        yield str(len(messages))


@pytest.fixture
def session():
    return ChatSession(RecordingPredictor(), GenerationOptions())


def run(session, text):
    output = io.StringIO()
    chat_loop(session, io.StringIO(text), output, interactive=False)
    return output.getvalue()


def test_turns_are_remembered_and_images_go_with_the_next_question_only(session, tmp_path):
    image = write_image(tmp_path / "an image.png")
    output = run(session, f"/image '{image}'\nwhat?\n\nand now?\n")
    first, second = session.predictor.seen
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
    session.predictor.template.takes_system = False
    assert "no place for a system prompt" in run(session, "/system Be brief.\n")
    assert session.messages == []


def test_mistakes_are_answered_and_the_chat_goes_on(session, tmp_path):
    output = run(session, f"/image {tmp_path}/none.png\n/nonsense\nhello\n/exit\nnot read\n")
    assert "none.png" in output and "unknown or incomplete command '/nonsense'" in output
    assert len(session.predictor.seen) == 1


def test_failed_answer_leaves_the_conversation_as_it_was(session, tmp_path):
    image = write_image(tmp_path / "a.png")
    run(session, f"/image {image}\n")

    def fail(messages, options):
        raise UserError("too long")
        yield

    session.predictor.stream = fail
    assert "too long" in run(session, "what?\n")
    assert session.messages == [] and session.waiting_images == [image]


def test_unclosed_quote_is_explained(session):
    with pytest.raises(UserError, match="quote paths"):
        run_command(session, "/image 'a b", io.StringIO())
