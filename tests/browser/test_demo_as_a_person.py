"""The demo as a person uses it: pictures, questions, streaming, stopping, going back, and coming back."""

import json
import re

import pytest
from PIL import Image

from tests.browser.conftest import ANSWER, MARKUP
from tests.browser.demo_server import DESKTOP, PHONE, demo_server
from tests.fixtures.tiny import write_image


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return write_image(tmp_path_factory.mktemp("pictures") / "picture.png", height=40, width=60)


def test_a_question_about_a_picture_is_answered_and_counted(page, picture):
    page.ask("What is shown?", picture)
    page.wait_for_answers(1)
    assert page.questions == ["What is shown?"]
    assert page.answers == [ANSWER]
    assert re.match(r"9 image tokens of \d+ · \d+ written · first after \d+\.\d\d s", page.statistics[0])
    assert page.page.locator("#chat [data-testid=user] img").count() == 1
    page.ask("And now?")
    page.wait_for_answers(2)
    assert page.questions == ["What is shown?", "And now?"]


def test_answer_streams_and_stopping_ends_the_models_work(page, picture):
    page.load_model("writes")
    page.ask("Write.", picture)
    page.stop_button.wait_for()
    page.wait_until(lambda: page.answers and len(page.answers[0]) > 20)
    early = page.answers[0]
    page.wait_until(lambda: len(page.answers[0]) > len(early) + 20)
    assert page.answers[0].startswith(early)
    page.stop_button.click()
    page.wait_for_answers(1)
    assert "stopped" in page.statistics[0]
    stopped = page.answers[0]
    page.page.wait_for_timeout(700)
    assert page.answers[0] == stopped
    assert int(re.search(r"(\d+) written", page.statistics[0])[1]) < 512  # where the slider would have ended it
    # A model that went on would let the next question wait for it.
    page.ask("Again.")
    page.wait_until(lambda: len(page.answers) == 2 and len(page.answers[1]) > 20)
    page.stop_button.click()
    page.wait_for_answers(2)
    assert "waited" not in page.statistics[1]


def test_likes_are_there_without_a_flag_and_are_written(page, likes):
    page.ask("Is it good?")
    page.wait_for_answers(1)
    page.page.locator("#chat button[aria-label='Like']").last.click()
    assert "Whoever runs this page will find it" in page.warning()
    (line,) = [json.loads(line) for line in likes.read_text().splitlines()]
    assert line["liked"] is True and line["messages"][1]["content"] == ANSWER


def test_regenerate_undo_edit_and_clear(page, picture):
    page.ask("First?", picture)
    page.wait_for_answers(1)
    page.ask("Second?")
    page.wait_for_answers(2)
    first_try = page.statistics[1]
    page.press_in_chat("Retry")
    page.wait_until(
        lambda: len(page.statistics) == 2 and page.statistics[1] != first_try
    )  # all of the prompt is re-used
    page.wait_for_answers(2)
    assert page.questions == ["First?", "Second?"]
    page.press_in_chat("Undo")
    page.wait_until(lambda: page.questions == ["First?"])
    page.wait_until(lambda: page.page.locator("#question textarea").input_value() == "Second?")
    page.page.fill("#question textarea", "")
    page.page.locator("#edit-opener").click()
    page.page.locator("#edit-text textarea").fill("Changed?")
    page.page.locator("#edit-submit").click()
    page.wait_until(lambda: page.questions == ["Changed?"])
    page.wait_for_answers(1)
    assert page.page.locator("#chat [data-testid=user] img").count() == 1
    page.press_in_chat("Clear")
    page.wait_until(lambda: not page.questions and not page.answers)


def test_what_cannot_be_changed_yet_is_said(page):
    page.page.locator("#edit-opener").click()
    assert "There is no question to change yet." in page.warning()


def test_chats_are_there_after_a_reload_for_their_visitor_alone(page, picture, open_page):
    page.ask("Will this stay?", picture)
    page.wait_for_answers(1)
    page.page.reload()
    page.wait_until_ready()
    page.wait_until(lambda: page.questions == ["Will this stay?"] and page.answers == [ANSWER])
    page.page.locator("#new-chat").click()
    page.wait_until(lambda: not page.questions)
    page.page.locator("#chats label", has_text="Will this stay?").click()
    page.wait_until(lambda: page.questions == ["Will this stay?"])
    stranger = open_page()
    stranger.wait_until_ready()
    assert not stranger.questions
    assert "Will this stay?" not in stranger.page.locator("body").inner_text()


def test_markup_of_visitor_and_model_is_shown_as_text(page, picture):
    typed = "<b>bold</b> <img src=/nothing.png onerror=alert(1)> ![x](http://127.0.0.1:9/x.png) <script>1</script>"
    loaded = []
    page.page.on("request", lambda request: loaded.append(request.url))
    page.page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    page.load_model("writes")
    page.ask(typed, picture)
    page.wait_until(lambda: page.answers and len(page.answers[0]) > 40)
    page.stop_button.click()
    page.wait_for_answers(1)
    assert page.questions == [typed]
    assert page.answers[0].startswith(MARKUP)
    assert page.page.locator("#chat .message-content :is(b, img, script)").count() == 0
    assert not [url for url in loaded if url.endswith(("/x", "/nothing.png", "/x.png"))]
    page.open_section("Look inside")
    page.words.first.wait_for()
    assert page.page.locator("#inside :is(#inside-tokens, #inside-facts, #inside-answer) img").count() == 0


def test_what_is_wrong_with_a_picture_is_said(page, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("<html>no picture</html>")
    page.attach(text)
    page.ask("What is this?")
    said = page.warning()
    assert "image" in said or "picture" in said
    assert str(tmp_path) not in said and "Traceback" not in said
    assert page.page.locator("#question textarea").input_value() == "What is this?"
    page.page.reload()
    page.wait_until_ready()
    large = tmp_path / "large.png"
    Image.new("1", (3000, 2000)).save(large)
    page.ask("What is this?", large)
    said = page.warning()
    assert "too many pixels" in said
    assert not page.answers


def test_model_that_cannot_be_loaded_leaves_the_others_as_they_were(page, picture):
    page.choose_model("damaged")
    page.page.locator("#load").click()
    said = page.warning()
    assert "/damaged" not in said.replace("damaged/", "") and "Traceback" not in said
    page.ask("Does it answer?", picture)
    assert "damaged" in page.warning()
    page.choose_model("answers")
    page.ask("Does it answer?", picture)
    page.wait_for_answers(1)
    assert page.answers == [ANSWER]


def test_click_on_a_word_shows_where_the_model_looked(page, picture):
    page.ask("What is shown?", picture)
    page.wait_for_answers(1)
    page.open_section("Look inside")
    page.words.first.wait_for()
    assert "".join(page.words.all_inner_texts()) == ANSWER.replace(" ", "")
    page.wait_until(lambda: "saep makes a grid of 3 × 3 tokens" in page.caption())
    facts = page.page.locator("#inside-facts").inner_text()
    assert "9 tokens per image" in facts and "first token after" in facts and "tokens/s" in facts
    seen = {page.drawing()}
    for index in (0, 1):
        page.choose_word(index)
        page.wait_until(lambda: page.drawing() not in seen)
        seen.add(page.drawing())
    page.page.keyboard.press("Tab")
    page.page.keyboard.press("Space")
    page.wait_for_word(2)
    seen.add(page.drawing())
    page.page.locator("#inside-layers input").click()
    page.page.get_by_role("option", name="Layer 1").click()
    page.wait_until(lambda: page.drawing() not in seen)


def test_question_can_be_asked_where_one_looks(page, picture):
    page.open_section("Look inside")
    page.ask("What is shown?", picture, field="#inside-question")
    page.words.first.wait_for()
    page.wait_until(lambda: "grid of 3 × 3 tokens" in page.caption())
    page.ask("Without a picture?", field="#inside-question")
    page.wait_until(lambda: "Add a picture" in page.page.locator("#inside-written").inner_text())


def test_two_models_write_side_by_side_and_stop_together(page, picture):
    page.open_section("Compare")
    page.choose_model("answers", "#compare-model-left")
    page.choose_model("writes", "#compare-model-right")
    page.ask("What is shown?", picture, field="#compare-question")
    page.wait_until(lambda: ANSWER in page.column("left"))
    page.wait_until(lambda: page.column("right").count(MARKUP) > 3)
    page.page.locator("#compare-stop").click()
    page.wait_until(lambda: "stopped" in page.column("right"))
    assert "complete" in page.column("left")
    for side, tokens in (("left", 9), ("right", 36)):
        said = page.column(side)
        assert re.search(rf"Image tokens\s+{tokens}\s", said) and re.search(r"First token\s+\d+\.\d\d s", said)
        assert re.search(r"Speed\s+[\d.]+ tokens/s", said)
    assert page.page.locator("#compare-right img").count() == 0


def test_one_model_that_fails_leaves_the_other_answering(page, picture):
    page.open_section("Compare")
    page.choose_model("damaged", "#compare-model-left")
    page.choose_model("answers", "#compare-model-right")
    page.ask("What is shown?", picture, field="#compare-question")
    page.wait_until(lambda: ANSWER in page.column("right"))
    assert page.page.locator("#compare-left [role=alert]").is_visible()
    assert "Traceback" not in page.column("left")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_section_fits_the_window(open_page, picture, viewport, scheme):
    page = open_page(viewport=viewport, color_scheme=scheme)
    page.wait_until_ready()
    background = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert brightness < 60 if scheme == "dark" else brightness > 200
    page.ask("What is shown?", picture)
    page.wait_for_answers(1)
    assert page.overflow() <= 0
    page.open_section("Look inside")
    page.words.first.wait_for()
    page.choose_word(0)
    assert page.overflow() <= 0
    page.open_section("Compare")
    page.page.locator("#compare-chat").click()
    page.wait_until(lambda: ANSWER in page.column("left"))
    assert page.overflow() <= 0


def test_page_is_closed_to_whoever_has_no_account(models_folder, open_page, tmp_path):
    accounts = tmp_path / "accounts"
    accounts.write_text("ada:correct horse battery staple\n")
    accounts.chmod(0o600)
    flags = ["--model-path", str(models_folder / "answers"), "--auth-file", str(accounts), "--temperature", "0"]
    with demo_server(flags, tmp_path / "log") as address:
        page = open_page(address)
        page.page.get_by_label("username").fill("ada")
        page.page.get_by_label("password").fill("wrong")
        page.page.get_by_role("button", name="Login").click()
        page.page.get_by_text("Incorrect Credentials").wait_for()
        assert not page.page.locator("#question").count()
        page.page.get_by_label("username").fill("ada")
        page.page.get_by_label("password").fill("correct horse battery staple")
        page.page.get_by_role("button", name="Login").click()
        page.wait_until_ready()
        page.ask("Am I in?")
        page.wait_for_answers(1)
        assert page.answers == [ANSWER]
