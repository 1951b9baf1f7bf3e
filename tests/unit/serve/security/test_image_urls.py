"""Images come with the request; no address is followed, on this machine or elsewhere."""

import base64

import pytest

from llava_saep.serve.api import ApiSettings
from llava_saep.serve.limits import Limits
from tests.fixtures.image_files import HTML, SVG, encoded, gradient
from tests.fixtures.requests import ask, data_url, question, refused


@pytest.mark.parametrize("kind", ["image/png", "IMAGE/PNG", "text/html", "application/octet-stream", ""])
def test_a_data_url_is_read_by_its_content_whatever_type_it_claims(open_client, engine, kind):
    assert ask(open_client(), question(images=[data_url(encoded(gradient()), kind)])).status_code == 200
    image = engine.asked[0][0][0]["content"][0]["image"]
    assert image.tobytes() == gradient().tobytes()


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/cat.png",
        "http://example.org/cat.png",
        "http://127.0.0.1:8000/metrics",
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "/etc/passwd",
        "../../etc/passwd",
        "C:\\Windows\\win.ini",
        "ftp://example.org/cat.png",
        "gopher://example.org/",
        "//example.org/cat.png",
        "\\\\example.org\\share\\cat.png",
        "",
        " ",
        "cat.png",
        "blob:https://example.org/1",
    ],
)
def test_no_address_is_followed(open_client, engine, url, monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("something was looked up")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    error = refused(ask(open_client(), question(images=[url])), 400)
    assert "send them as data:image/...;base64" in error["message"] and not engine.streams


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:", "expected data:image"),
        ("data:image/png;base64", "expected data:image"),
        ("data:image/png,rawbytes", "expected data:image"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,not base64!", "is not base64"),
        ("data:image/png;base64,AAA", "is not base64"),
        ("data:image/png;base64,QUJD\u00e9", "is not base64"),
        (data_url(SVG, "image/svg+xml"), "known kind"),
        (data_url(HTML), "known kind"),
        (data_url(b"/etc/passwd"), "known kind"),
    ],
)
def test_what_is_wrong_with_a_data_url_is_said(open_client, engine, url, words):
    error = refused(ask(open_client(), question(images=[url])), 400)
    assert words in error["message"] and error["param"] == "messages"


def test_line_breaks_in_base64_are_let_pass(open_client):
    content = base64.encodebytes(encoded(gradient(200, 200))).decode()
    assert "\n" in content
    assert ask(open_client(), question(images=[f"data:image/png;base64,{content}"])).status_code == 200


def test_an_images_bytes_are_limited_before_they_are_decoded(open_client, monkeypatch):
    client = open_client(ApiSettings(limits=Limits(max_image_bytes=1000)))
    monkeypatch.setattr("base64.b64decode", lambda *args, **kwargs: pytest.fail("decoded"))
    error = refused(ask(client, question(images=[data_url(b"\0" * 2000)])), 400)
    assert "has about 2,001 bytes, at most 1,000" in error["message"]


def test_pixels_of_a_conversation_are_limited_together(open_client):
    image = data_url(encoded(gradient(20, 10)))
    client = open_client(ApiSettings(limits=Limits(max_pixels_in_memory=500)))
    assert ask(client, question(images=[image, image])).status_code == 200
    assert "more than 500 pixels together" in refused(ask(client, question(images=[image] * 3)), 400)["message"]
    assert ask(client, question(images=[image, image])).status_code == 200  # nothing of the refused one is counted
