"""The chat of the launched page, used over HTTP as a browser would."""

import hashlib
import json
import time

import pytest
from PIL import Image

from llava_saep.errors import UserError
from llava_saep.serve.demo.history import new_token
from tests.fixtures.demo_page import controls, file_data, question, texts
from tests.fixtures.engines import wait_until

ANSWER = "Hello there"


def rows_of(outcome):
    """Rows of the chatbot after an event; it is the second output."""
    return outcome.last[1]["value"]


@pytest.fixture
def browser():
    return {"token": new_token(), "chat": None}


def test_a_question_with_pictures_is_answered_piece_by_piece(page, picture, browser):
    visitor = page.open()
    uploaded = [file_data(visitor.upload(picture).json()[0]) for _ in range(2)]
    outcome = visitor.ask("What is this?", *uploaded, browser=browser)
    assert outcome.succeeded and not outcome.warnings
    assert texts(rows_of(outcome))[:2] == ["What is this?", ANSWER]
    (messages, options, max_seconds) = page.engine.asked[0]
    assert [part["type"] for part in messages[0]["content"]] == ["image", "image", "text"]
    with Image.open(picture) as sent:
        assert messages[0]["content"][0]["image"].tobytes() == sent.convert("RGB").tobytes()
    assert (options.temperature, options.max_new_tokens) == (0.0, 16)
    assert max_seconds == page.services.settings.limits.max_generation_seconds


def test_numbers_stand_under_the_answer(page, browser):
    line = texts(rows_of(page.open().ask("Hi", browser=browser)))[2]
    assert line == "9 image tokens of 20 · 4 re-used · 2 written · first after 0.50 s · 0.7 tokens/s · waited 1.0 s"


def test_a_follow_up_sends_the_whole_conversation(page, browser):
    visitor = page.open()
    visitor.ask("One", browser=browser)
    visitor.ask("Two", browser=browser)
    roles = [message["role"] for message in page.engine.asked[1][0]]
    assert roles == ["user", "assistant", "user"]
    assert page.engine.asked[1][0][1]["content"] == ANSWER


def test_stop_ends_the_answer_at_the_engine_and_keeps_what_came(page, browser):
    visitor = page.open()
    page.engine.pieces = ["Hello"] + [" more"] * 1000
    page.engine.may_go_on.clear()
    joined = visitor.join(visitor.find("question", "submit"), question("Hi", browser=browser))
    wait_until(lambda: page.engine.streams)
    assert visitor.join(visitor.find("stop", "click"), []).status_code == 200
    wait_until(page.engine.streams[0].closed.is_set)
    outcome = visitor.wait(joined.json()["event_id"])
    assert "stopped" in texts(rows_of(outcome))[-1]


def test_a_visitor_who_leaves_stops_the_model(page, browser):
    visitor = page.open()
    page.engine.may_go_on.clear()
    with visitor.http.stream("GET", f"/gradio_api/heartbeat/{visitor.session}") as open_page:
        beats = open_page.iter_lines()  # once it is let go, the connection ends
        next(beats)
        visitor.join(visitor.find("question", "submit"), question("Hi", browser=browser))
        wait_until(lambda: page.engine.streams)
    wait_until(page.engine.streams[0].closed.is_set, seconds=20)


def test_regenerate_asks_the_last_question_again(page, browser):
    visitor = page.open()
    visitor.ask("One", browser=browser)
    page.engine.pieces = ["Other"]
    again = [None, browser, "scripted", *controls(temperature=0.5)]
    outcome = visitor.call(visitor.find("chat", "retry"), again, {"index": 0, "value": "forged"})
    assert texts(rows_of(outcome))[:2] == ["One", "Other"]
    assert len(page.engine.asked[1][0]) == 1 and page.engine.asked[1][1].temperature == 0.5


def test_undo_returns_words_and_pictures_to_the_field(page, picture, browser):
    visitor = page.open()
    visitor.ask("One", file_data(visitor.upload(picture).json()[0]), browser=browser)
    outcome = visitor.call(visitor.find("chat", "undo"), [None, browser], {"index": 0, "value": ""})
    assert rows_of(outcome) == []
    field = outcome.last[2]
    assert field["text"] == "One"
    returned = visitor.http.get(f"/gradio_api/file={field['files'][0]['path']}")
    assert returned.content == picture.read_bytes()


def test_an_edited_question_is_asked_anew_and_what_followed_goes(page, picture, browser):
    visitor = page.open()
    visitor.ask("One", file_data(visitor.upload(picture).json()[0]), browser=browser)
    visitor.ask("Two", browser=browser)
    visitor.call(visitor.find("edit-opener", "click"), [None])
    edit = visitor.find("edit-submit", "click", 1)
    outcome = visitor.call(edit, [0, "First", None, browser, "scripted", *controls()])
    assert texts(rows_of(outcome))[:2] == ["First", ANSWER] and len(texts(rows_of(outcome))) == 3
    assert [part["type"] for part in page.engine.asked[2][0][0]["content"]] == ["image", "text"]


def test_a_refused_question_leaves_the_chat_as_it_was_and_the_words_in_the_field(page, browser):
    visitor = page.open()
    visitor.ask("One", browser=browser)
    page.engine.error = UserError("the conversation is too long")
    outcome = visitor.ask("Two", browser=browser)
    assert outcome.warnings == ["the conversation is too long"]
    assert texts(rows_of(outcome))[:2] == ["One", ANSWER] and outcome.last[2]["text"] == "Two"


def test_history_survives_a_reload_and_another_browser_sees_nothing(page, browser):
    page.open().ask("Remember me", browser=browser)
    kept = {**browser, "chat": None}
    again = page.open()
    restored = again.call(again.of_page(), [kept])
    choices = restored.last[4]["choices"]
    assert [title for title, _ in choices] == ["Remember me"]
    opened = again.call(again.find("chats", "input"), [choices[0][1], None, kept])
    assert texts(rows_of(opened))[:2] == ["Remember me", ANSWER]
    stranger = page.open()
    assert stranger.call(stranger.of_page(), [{"token": new_token(), "chat": choices[0][1]}]).last[1]["value"] == []


def test_a_deleted_chat_and_its_pictures_are_gone(page, picture, browser):
    visitor = page.open()
    visitor.ask("Look", file_data(visitor.upload(picture).json()[0]), browser=browser)
    folder = page.services.history.visitor(browser["token"]).folder
    assert [path for path in folder.rglob("*") if path.is_file()]
    visitor.call(visitor.find("delete-chat", "click"), [None, browser])
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_likes_are_appended_with_model_and_pictures_by_hash(page, picture, browser):
    visitor = page.open()
    visitor.ask("Look", file_data(visitor.upload(picture).json()[0]), browser=browser)
    for liked in (True, False):
        visitor.call(visitor.find("chat", "like"), [None, browser], {"index": 1, "value": "forged", "liked": liked})
    lines = [json.loads(line) for line in page.likes.read_text().splitlines()][-2:]
    assert [line["liked"] for line in lines] == [True, False]
    assert lines[0]["model"] == "scripted" and lines[0]["messages"][1]["content"] == ANSWER
    assert lines[0]["messages"][0]["images"] == [hashlib.sha256(picture.read_bytes()).hexdigest()]
    assert time.strptime(lines[0]["time"], "%Y-%m-%dT%H:%M:%SZ")


def begin(page, visitor, browser):
    """Ask something, and wait until the model has it; it does not answer yet."""
    page.engine.may_go_on.clear()
    joined = visitor.join(visitor.find("question", "submit"), question("One", browser=browser))
    wait_until(lambda: page.engine.streams)
    return joined.json()["event_id"]


def test_a_new_chat_is_not_overwritten_by_the_answer_that_was_being_written(page, browser):
    visitor = page.open()
    begun = begin(page, visitor, browser)
    shown = visitor.call(visitor.find("new-chat", "click"), [None, browser]).last
    assert page.engine.streams[0].closed.is_set()
    assert shown[1]["value"] == [] and [title for title, _ in shown[4]["choices"]] == ["One"]
    page.engine.may_go_on.set()
    visitor.ask("Two", browser=browser)
    assert [len(messages) for messages, _, _ in page.engine.asked] == [1, 1]
    assert begun


def test_a_chat_that_is_deleted_while_it_is_answered_does_not_come_back(page, picture, browser):
    visitor = page.open()
    begin(page, visitor, browser)
    visitor.call(visitor.find("delete-chat", "click"), [None, browser])
    assert page.services.history.visitor(browser["token"]).conversations() == []


def test_a_second_question_waits_for_the_answer_to_the_first(page, browser):
    visitor = page.open()
    begun = begin(page, visitor, browser)
    refused = visitor.join(visitor.find("question", "submit"), question("Two", browser=browser)).json()["event_id"]
    assert visitor.wait(refused).warnings == ["An answer is being written; stop it, or wait for its end."]
    assert begun and len(page.engine.asked) == 1


def test_undo_takes_back_a_question_that_is_being_answered(page, browser):
    visitor = page.open()
    visitor.ask("Zero", browser=browser)
    page.engine.streams.clear()
    begin(page, visitor, browser)
    undone = visitor.call(visitor.find("chat", "undo"), [None, browser], {"index": 0, "value": ""})
    assert page.engine.streams[0].closed.is_set()
    assert texts(rows_of(undone))[:2] == ["Zero", ANSWER] and undone.last[2]["text"] == "One"
    (saved,) = page.services.history.visitor(browser["token"]).conversations()
    assert [message.text for message in saved.messages] == ["Zero", ANSWER]


def test_undo_of_an_answer_that_is_written_once_more_takes_its_question_back(page, browser):
    visitor = page.open()
    visitor.ask("One", browser=browser)
    page.engine.streams.clear()
    page.engine.may_go_on.clear()
    visitor.join(visitor.find("chat", "retry"), [None, browser, "scripted", *controls()])
    wait_until(lambda: page.engine.streams)
    undone = visitor.call(visitor.find("chat", "undo"), [None, browser], {"index": 0, "value": ""})
    assert rows_of(undone) == [] and undone.last[2]["text"] == "One"
    assert page.services.history.visitor(browser["token"]).conversations() == []


def test_stopping_a_comparison_leaves_the_chat_writing(page, browser):
    visitor = page.open()
    begun = begin(page, visitor, browser)
    assert visitor.call(visitor.find("compare-stop", "click"), []).succeeded
    assert not page.engine.streams[0].closed.is_set()
    page.engine.may_go_on.set()
    assert texts(rows_of(visitor.wait(begun)))[1] == ANSWER


def test_who_likes_an_answer_is_told_who_will_see_it(page, browser):
    visitor = page.open()
    visitor.ask("One", browser=browser)
    like = visitor.find("chat", "like")
    told = [
        visitor.call(like, [None, browser], {"index": 1, "value": "", "liked": liked}).warnings
        for liked in ("Like", "Dislike", None)
    ]
    seen_by = "Whoever runs this page will find it, with the chat up to this answer."
    assert told == [[seen_by], [seen_by], []]
