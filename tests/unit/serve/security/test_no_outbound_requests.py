"""Nothing here asks other hosts for anything: not at start, not for an answer, not for what a client points to."""

import socket

import pytest
from starlette.testclient import TestClient

from llava_saep.generation import LocalEngine
from llava_saep.serve.api import create_app
from tests.fixtures.model import write_model
from tests.fixtures.requests import ask, question, refused


@pytest.fixture
def outgoing(monkeypatch):
    """Connections and look-ups that were tried; none succeeds."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    return tried


def test_the_guard_of_this_test_works(outgoing):
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", 1))
    with pytest.raises(OSError):
        socket.socket().connect(("127.0.0.1", 1))
    assert len(outgoing) == 2


def test_loading_and_answering_need_no_network(outgoing, tmp_path, monkeypatch):
    folder = write_model(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    engine = LocalEngine.from_pretrained(folder, device="cpu", model_id="scripted")
    with TestClient(create_app({"scripted": engine})) as client:
        for fields in (question(max_tokens=3), question(max_tokens=3, stream=True)):
            assert ask(client, fields).status_code == 200
        for url in ("https://example.org/a.png", "http://169.254.169.254/", "file:///etc/passwd", "//example.org/a"):
            refused(ask(client, question(images=[url])), 400)
        for path in ("/v1/models", "/health", "/metrics", "/docs", "/openapi.json"):
            client.get(path)
    engine.close()
    assert outgoing == []


def test_no_page_of_the_api_names_other_hosts(open_client):
    client = open_client()
    for path in ("/", "/docs", "/redoc", "/openapi.json"):
        response = client.get(path)
        assert response.status_code == 404 and "http" not in response.text
