"""Conversations, history, pictures and opinions, without a page."""

import json
import os
import stat
import threading
import time

import pytest
from PIL import Image

from llava_saep.errors import UserError
from llava_saep.serve.demo import history as history_module
from llava_saep.serve.demo.conversation import Conversation
from llava_saep.serve.demo.feedback import FeedbackFile
from llava_saep.serve.demo.history import QUESTION_SECONDS, History, new_token
from llava_saep.serve.demo.launching import storage_secret
from llava_saep.serve.limits import Limits
from tests.fixtures.tiny import write_image


@pytest.fixture
def history(tmp_path):
    return History(tmp_path / "history", tmp_path / "previews", Limits(), max_bytes=10**9)


def chat(text="Hi", *pictures):
    return Conversation.new().with_question(text, pictures).with_answer("Yes", "m", {"seconds": 1.0})


def test_a_conversation_is_the_same_after_a_restart(history, tmp_path):
    token, kept = new_token(), chat("Wörds\nand <b>")
    history.visitor(token).save(kept)
    again = History(tmp_path / "history", tmp_path / "other", Limits(), max_bytes=10**9)
    assert again.visitor(token).conversations() == [kept]
    assert again.visitor(token, "ada").conversations() == []  # another user of the same browser


def test_files_are_for_their_owner_alone_and_tell_no_token(history):
    token = new_token()
    history.visitor(token).save(chat())
    files = [path for path in history.folder.rglob("*") if path.is_file()]
    assert files and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    assert token not in str(files)


def test_the_key_of_what_browsers_keep_outlives_the_server(tmp_path):
    assert storage_secret(tmp_path) == storage_secret(tmp_path)
    assert storage_secret(None) != storage_secret(None)


def test_a_damaged_chat_is_left_out(history, caplog):
    visitor = history.visitor(new_token())
    visitor.save(chat())
    broken = visitor.folder / "chats" / "broken.json"
    broken.write_text('{"chat_id": 1}')
    assert len(visitor.conversations()) == 1 and "broken.json" in caplog.text


def test_the_oldest_chats_and_visitors_make_room(history, monkeypatch):
    monkeypatch.setattr(history_module, "MAX_CHATS", 2)
    first, second = history.visitor(new_token()), history.visitor(new_token())
    for text in ("one", "two", "three"):
        first.save(chat(text))
    assert [saved.title for saved in first.conversations()] == ["three", "two"]
    second.save(chat())
    history.max_bytes = second.num_bytes()
    history.make_room(second)
    assert first.conversations() == [] and len(second.conversations()) == 1


def test_a_picture_that_another_chat_shows_stays(history, tmp_path):
    visitor = history.visitor(new_token())
    names = [visitor.pictures.add(write_image(tmp_path / f"{seed}.png", seed=seed).read_bytes()) for seed in (1, 2)]
    both, one = chat("both", *names), chat("one", names[0])
    visitor.save(both)
    visitor.save(one)
    visitor.delete(both.chat_id)
    assert visitor.pictures.open(names[0]).size == (24, 24)
    with pytest.raises(UserError, match="removed from the server"):
        visitor.pictures.open(names[1])


def age(folder, seconds):
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def test_pictures_of_no_chat_go_after_the_time_of_a_question(history, tmp_path):
    visitor = history.visitor(new_token())
    names = [visitor.pictures.add(write_image(tmp_path / f"{seed}.png", seed=seed).read_bytes()) for seed in (1, 2, 3)]
    visitor.save(chat("one", names[0]))
    age(history.folder, QUESTION_SECONDS + 1)
    visitor.pictures.add((tmp_path / "2.png").read_bytes())  # sent again, and being asked about
    history.make_room(visitor)
    assert {path.name for path in visitor.pictures.folder.iterdir()} == set(names[:2])


def test_a_visitor_who_is_too_large_alone_loses_the_oldest_chats(history):
    visitor = history.visitor(new_token())
    for text in ("one", "two", "three"):
        visitor.save(chat(text))
    history.max_bytes = visitor.num_bytes() - 1
    history.make_room(visitor)
    assert [saved.title for saved in visitor.conversations()] == ["three", "two"]
    history.max_bytes = 1
    history.make_room(visitor)
    assert [saved.title for saved in visitor.conversations()] == ["three"]


def test_previews_count_and_go_with_their_chat(history, tmp_path):
    visitor = history.visitor(new_token())
    name = visitor.pictures.add(write_image(tmp_path / "a.png").read_bytes())
    kept = chat("one", name)
    visitor.save(kept)
    before = visitor.num_bytes()
    files = [visitor.pictures.preview(name), visitor.pictures.as_upload(name)]
    assert visitor.num_bytes() == before + sum(path.stat().st_size for path in files)
    visitor.delete(kept.chat_id)
    assert visitor.num_bytes() == 0


def test_pictures_are_not_decoded_where_others_fill_the_memory(history, tmp_path):
    pictures = history.visitor(new_token()).pictures
    data = write_image(tmp_path / "a.png").read_bytes()  # 24 x 24
    with history.pixels.held(Limits().max_pixels_in_memory - 24 * 24 + 1):
        with pytest.raises(UserError, match="fill the server's memory"):
            pictures.add(data)
        assert not pictures.folder.exists()
    name = pictures.add(data)
    with history.pixels.held(Limits().max_pixels_in_memory - 24 * 24):
        pictures.preview(name)
        with pictures.decoded(name), pytest.raises(UserError, match="fill the server's memory"):
            pictures.add(data)


def test_half_a_character_becomes_a_sign_for_it():
    asked = chat("a\ud83d b \U0001f600 \ud83d\ude00").messages[0].text
    assert asked == "a\ufffd b \U0001f600 \U0001f600"


def test_a_preview_is_small_and_upright(history, tmp_path):
    image = Image.new("RGB", (2000, 1000), "blue")
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "photo.jpg", exif=exif)
    pictures = history.visitor(new_token()).pictures
    with Image.open(pictures.preview(pictures.add((tmp_path / "photo.jpg").read_bytes()))) as preview:
        assert preview.size == (384, 768)


def test_an_edit_drops_what_followed_and_keeps_the_pictures():
    long = chat("one", "p").with_question("two").with_answer("No", "m", None)
    edited = long.with_edited_question(0, " other ")
    assert [(m.text, m.pictures) for m in edited.messages] == [("other", ("p",))]
    for index, text in ((1, "x"), (9, "x"), (-1, "x"), (2, " ")):
        with pytest.raises(UserError):
            long.with_edited_question(index, text)


def test_opinions_of_many_servers_do_not_mix(tmp_path, history):
    path, pictures = tmp_path / "likes.jsonl", history.visitor(new_token()).pictures
    judged = chat("x" * 19_996 + "\n\r\u2028\x85")

    def append():
        for _ in range(25):
            FeedbackFile(path).append(judged, 1, True, pictures)

    threads = [threading.Thread(target=append) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 100 and all(line["messages"][0]["content"] == judged.messages[0].text for line in lines)


def test_pictures_of_judged_chats_are_kept_where_asked(tmp_path, history):
    pictures = history.visitor(new_token()).pictures
    data = write_image(tmp_path / "a.png").read_bytes()
    name = pictures.add(data)
    FeedbackFile(tmp_path / "likes.jsonl", tmp_path / "kept").append(chat("x", name), 1, False, pictures)
    assert (tmp_path / "kept" / name).read_bytes() == data
