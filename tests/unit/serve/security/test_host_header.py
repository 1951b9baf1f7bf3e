"""A server for this machine alone answers to no other name: a web page cannot reach it by pointing its name here."""

import pytest
from starlette.testclient import TestClient

from llava_saep.commands.serve import _settings, build_parser
from llava_saep.serve.api import ApiSettings, create_app
from llava_saep.serve.limits import Limits
from tests.fixtures.requests import ask, question, refused


@pytest.fixture
def client(engine):
    with TestClient(create_app({"scripted": engine}, ApiSettings(local_names_only=True))) as client:
        yield client


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "LOCALHOST", "[::1]:8000", "127.1.2.3"]
)
def test_local_names_are_answered(client, host):
    assert ask(client, question(), {"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "8.8.8.8", "", "[::2]"]
)
def test_other_names_are_refused(client, engine, host):
    assert refused(ask(client, question(), {"Host": host}), 403)["code"] == "unknown_host"
    assert not engine.asked


@pytest.mark.parametrize(
    ("flags", "key", "local"),
    [
        ("", "", True),
        ("--host ::1", "", True),
        ("", "a-key-of-enough-characters", False),
        ("--host 0.0.0.0 --allow-unauthenticated-network-access", "", False),
    ],
)
def test_only_servers_without_keys_on_loopback_need_it(flags, key, local, monkeypatch, tmp_path):
    (tmp_path / "keys").write_text(key)
    flags = [*flags.split(), *(["--api-key-file", str(tmp_path / "keys")] if key else [])]
    monkeypatch.delenv("LLAVA_SAEP_API_KEY", raising=False)
    args = build_parser().parse_args(["--model-path", "x", *flags])
    assert _settings(args, Limits(), None).local_names_only == local


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_page_of_another_origin_cannot_post_without_asking(client, engine, kind):
    """Browsers send these types across origins without a question; application/json they ask about first."""
    assert refused(ask(client, question(), {"Content-Type": kind, "Host": "localhost"}), 415)
    preflight = {"Host": "localhost", "Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    response = client.options("/v1/chat/completions", headers=preflight)
    assert response.status_code == 405 and "access-control-allow-origin" not in response.headers
    assert not engine.asked
