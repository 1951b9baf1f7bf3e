"""Safe by default: what the launched page serves, lets in and says, looked at from outside."""

import asyncio
import dataclasses
import io
import json
import os
import re
import time

import httpx
import pytest
from PIL import Image

from llava_saep.serve.demo.history import new_token
from llava_saep.serve.demo.protection import Protection, UploadRoom
from tests.fixtures.demo_page import controls, file_data, question, texts

EVIL = (
    "<img src=http://evil.example/a.png> <script>alert(1)</script> ![x](http://evil.example/b.png) "
    "[l](javascript:alert(1)) <details open ontoggle=alert(1)>x</details> $\\href{http://evil.example}{x}$ "
    "<svg/onload=alert(1)> </div> &lt;b&gt; a < b & c"
)


@pytest.fixture
def browser():
    return {"token": new_token(), "chat": None}


def test_nothing_of_the_page_comes_from_another_host(page):
    visitor = page.open()
    html = visitor.http.get("/").text
    styles = re.findall(r'href="(\./[^"]+\.css[^"]*)"', html) + ["/theme.css"]
    assert not re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*', html)
    for style in styles:
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", visitor.http.get(style.removeprefix(".")).text)


def test_the_browser_is_told_to_ask_no_other_host(page):
    headers = page.open().http.get("/").headers
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy and "img-src 'self' data: blob:;" in policy
    assert "http:" not in policy and "*" not in policy
    assert headers["referrer-policy"] == "no-referrer" and headers["x-content-type-options"] == "nosniff"


def test_the_server_asks_no_other_host(page, picture, browser, asked_hosts):
    visitor = page.open()
    visitor.ask("Look at http://evil.example/a.png", file_data(visitor.upload(picture).json()[0]), browser=browser)
    assert page.engine.asked and asked_hosts == []  # since before the page was built


def test_share_links_analytics_and_apis_are_off(page):
    visitor = page.open()
    config = visitor.config
    assert config["analytics_enabled"] is False and config["mcp_server"] is False and config["space_id"] is None
    assert all(one["api_visibility"] == "private" for one in config["dependencies"])
    assert visitor.http.get("/gradio_api/mcp/sse").status_code == 404
    submit = visitor.find("question", "submit")
    assert visitor.http.post(f"/gradio_api/run/{submit}", json={"data": []}).status_code >= 400


def test_another_origin_is_not_let_in(page):
    answer = page.open().http.get("/config", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_texts_of_users_and_models_never_become_markup(page, browser):
    page.engine.pieces = [EVIL]
    shown = texts(page.open().ask(EVIL, browser=browser).last[1]["value"])[:2]
    for text in shown:
        assert not re.search(r"<[a-zA-Z/!?]", text)
        assert "a < b & c" in text and "&amp;lt;b&amp;gt;" in text
    chat = next(c for c in page.open().config["components"] if c["props"].get("elem_id") == "chat")["props"]
    assert chat["sanitize_html"] and not chat["render_markdown"] and chat["latex_delimiters"] == []


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../etc/passwd", "http://127.0.0.1:1/x.png"])
def test_forged_file_paths_are_refused(page, browser, path):
    visitor = page.open()
    outcome = visitor.ask("Read it", file_data(path), browser=browser)
    assert not outcome.succeeded and page.engine.asked == []
    assert visitor.http.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_a_forged_token_is_no_path(page):
    visitor = page.open()
    for token in ("../../etc", "/etc/passwd", "a" * 63, 7, None, {"a": 1}):
        outcome = visitor.ask("Hi", browser={"token": token, "chat": "../../etc/passwd"})
        assert outcome.succeeded
    inside = page.services.history.folder
    assert all(re.fullmatch("[0-9a-f]{64}", path.name) for path in inside.iterdir())


def picture_bytes(size, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, format=kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<html><script>alert(1)</script>", "no image of a known kind"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image of a known kind"),
        (picture_bytes((40, 40))[:60], "damaged or cut off"),
        (picture_bytes((400, 400)), "400 x 400 pixels, at most 100,000 are allowed"),
        (b"", "empty"),
    ],
)
def test_files_that_are_no_usable_picture_are_refused_by_their_content(page, browser, tmp_path, data, message):
    visitor = page.open()
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    uploaded = visitor.upload(path)
    assert uploaded.status_code == 200
    outcome = visitor.ask("What is this?", file_data(uploaded.json()[0]), browser=browser)
    assert message in outcome.warnings[0] and "/" not in outcome.warnings[0]
    assert page.engine.asked == [] and outcome.last[1]["value"] == []


def test_other_kinds_of_files_are_refused_by_their_name(page, browser, tmp_path):
    visitor = page.open()
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    uploaded = visitor.upload(path, mime_type="text/plain").json()[0]
    assert not visitor.ask("Read it", file_data(uploaded), browser=browser).succeeded


def test_files_and_bodies_above_their_size_are_refused(page, tmp_path):
    visitor = page.open()
    path = tmp_path / "large.png"
    path.write_bytes(bytes(250_000))
    assert visitor.upload(path).status_code == 413
    path.write_bytes(bytes(600_000))
    assert visitor.upload(path).status_code == 413
    submit = visitor.find("question", "submit")
    assert visitor.join(submit, ["x" * 500_000]).status_code == 413

    def endless():
        for _ in range(100):
            yield b" " * 10_000

    answer = visitor.http.post(
        "/gradio_api/queue/join", content=endless(), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413


def test_uploads_end_where_their_room_is_full(page, browser, picture, monkeypatch):
    visitor = page.open()
    uploaded = file_data(visitor.upload(picture).json()[0])
    visitor.ask("What is this?", uploaded, browser=browser)
    uploads = page.services.uploads
    monkeypatch.setattr(uploads, "max_bytes", uploads._count() + 40_000)
    assert visitor.upload(picture).status_code == 200
    monkeypatch.setattr(uploads, "max_bytes", uploads._count())
    refused = visitor.upload(picture)
    assert refused.status_code == 507 and "no room" in refused.text


def test_uploads_that_are_arriving_share_the_room(tmp_path):
    passed, may_end = [], asyncio.Event()

    async def app(scope, receive, send):
        passed.append(scope)
        await may_end.wait()

    async def upload(protection):
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "path": "/gradio_api/upload", "headers": [(b"content-length", b"60")]}
        await protection(scope, None, send)
        return sent

    async def run():
        protection = Protection(app, max_request_bytes=100, uploads=UploadRoom(tmp_path, 100))
        first = asyncio.create_task(upload(protection))
        while not passed:
            await asyncio.sleep(0.01)
        second = await upload(protection)
        may_end.set()
        await first
        await upload(protection)
        return second

    second = asyncio.run(run())
    assert second[0]["status"] == 507 and len(passed) == 2


def test_files_count_at_least_a_block_and_what_broke_off_goes(tmp_path):
    room = UploadRoom(tmp_path, 100_000)
    for name in ("tmpabandoned", "a", "b", "tmparriving"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("tmpabandoned", "a"):
        os.utime(tmp_path / name, (time.time() - 3600,) * 2)
    assert room.has_room_for(0) and not room.has_room_for(2000)  # 3 x 32,768 are taken
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "tmparriving"]


@pytest.mark.parametrize(
    "path",
    "process_recording deep_link info openapi.json component_server proxy=http://127.0.0.1/ vibe-code call/ask run/ask "
    "stream/a/1/2/playlist.m3u8 token custom_component/a/b/c/d /monitoring/summary".split(),
)
def test_what_the_page_does_not_use_is_not_served(page, picture, path):
    visitor = page.open()
    address = path if path.startswith("/") else f"/gradio_api/{path}"
    with open(picture, "rb") as file:
        answers = [visitor.http.get(address), visitor.http.post(address, files={"files": ("a.png", file)})]
    assert [(answer.status_code, answer.text) for answer in answers] == [(404, "the page has nothing there")] * 2


def test_a_question_that_comes_too_soon_keeps_no_picture(page, picture, browser, monkeypatch):
    monkeypatch.setattr(page.services, "_rate", type(page.services._rate)(0))
    visitor = page.open()
    uploaded = file_data(visitor.upload(picture).json()[0])
    both = {"text": "Which?", "files": [uploaded]}
    for element, data in (
        ("question", question("Which?", uploaded, browser=browser)),
        ("compare-question", [both, "scripted", "scripted", browser, *controls()]),
        ("inside-question", [both, browser, "scripted"]),
    ):
        visitor.call(visitor.find(element, "submit"), data)
    assert page.engine.asked == [] and not page.services.history.visitor(browser["token"]).folder.exists()


def test_half_a_character_breaks_nothing(page, browser):
    visitor = page.open()
    body = {"data": question("a\ud83d", browser=browser), "fn_index": visitor.find("question", "submit")}
    body |= {"session_hash": visitor.session, "event_data": None}
    joined = visitor.http.post(
        "/gradio_api/queue/join", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    outcome = visitor.wait(joined.json()["event_id"])
    assert texts(outcome.last[1]["value"])[0] == "a\ufffd"


def test_too_many_pictures_and_too_long_questions_are_refused(page, picture, browser):
    visitor = page.open()
    files = [file_data(visitor.upload(picture).json()[0]) for _ in range(3)]
    assert "at most 2 go with a question" in visitor.ask("?", *files, browser=browser).warnings[0]
    assert "at most 32,000 are allowed" in visitor.ask("x" * 32_001, browser=browser).warnings[0]
    assert page.engine.asked == []


def test_an_answer_is_never_longer_than_the_server_and_the_context_allow(page, browser, monkeypatch):
    visitor = page.open()
    data = question("Hi", browser=browser)
    data[-1] = 10**6
    assert not visitor.call(visitor.find("question", "submit"), data).succeeded
    monkeypatch.setattr(
        type(page.engine), "description", dataclasses.replace(page.engine.description, context_length=500)
    )
    data[-1] = 2048
    visitor.call(visitor.find("question", "submit"), data)
    assert [options.max_new_tokens for _, options, _ in page.engine.asked] == [250]


def test_a_client_that_asks_too_often_is_told_when_to_come_back(page, browser, monkeypatch):
    monkeypatch.setattr(page.services, "_rate", type(page.services._rate)(1))
    visitor = page.open()
    visitor.ask("One", browser=browser)
    refused = visitor.ask("Two", browser=browser)
    assert re.search(r"At most 60 questions a minute .* in \d+ seconds", refused.warnings[0])
    assert len(page.engine.asked) == 1


def test_more_questions_than_may_wait_are_refused(page, browser, monkeypatch):
    monkeypatch.setattr(page.services, "_num_running", page.services.settings.limits.max_queue + 1)
    assert "wait for the model already" in page.open().ask("One", browser=browser).warnings[0]


def test_an_unexpected_error_tells_a_number_and_nothing_else(page, browser, caplog):
    page.engine.error = RuntimeError("secret /srv/models/key")
    outcome = page.open().ask("One", browser=browser)
    (warning,) = outcome.warnings
    number = re.fullmatch(r"Internal error (\w{8})\. Whoever runs this page finds .* log\.", warning).group(1)
    assert "secret" not in str(outcome) and number in caplog.text and "secret" in caplog.text


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b'{"fn_index": "x"}', b'{"data": 1, "fn_index": 0}', b"\xff\xfe", b"null"]
)
def test_malformed_requests_are_refused_and_the_page_stays_up(page, body):
    visitor = page.open()
    answer = visitor.http.post("/gradio_api/queue/join", content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500 and "Traceback" not in answer.text
    assert httpx.get(page.address, trust_env=False).status_code == 200
