"""Bearer keys: who is let in, where keys come from, and that nothing about them leaks."""

import logging

import pytest

from llava_saep.errors import UserError
from llava_saep.serve.api import ApiKeys, ApiSettings, read_api_keys
from llava_saep.serve.limits import Limits
from tests.fixtures.requests import ask, question, refused

KEY, OTHER = "first-key-0123456789", "second-key-0123456789"
SETTINGS = ApiSettings(keys=ApiKeys.of([KEY, OTHER]))


def with_key(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_each_key_is_let_in(open_client, key):
    client = open_client(SETTINGS)
    assert ask(client, question(), with_key(key)).status_code == 200
    assert client.get("/metrics", headers=with_key(key)).status_code == 200


@pytest.mark.parametrize(
    "header",
    [{}, with_key(""), with_key(KEY[:-1]), with_key(KEY + "x"), with_key(KEY.upper()), {"Authorization": KEY}]
    + [{"Authorization": f"Basic {KEY}"}, with_key(f"{KEY} {OTHER}"), {"Authorization": b"Bearer \xff\xfe"}],
)
def test_everything_else_is_refused_before_the_request_is_read(open_client, engine, header):
    response = ask(open_client(SETTINGS), question(), header)
    error = refused(response, 401)
    assert response.headers["www-authenticate"] == "Bearer" and error["code"] == "invalid_api_key"
    assert KEY not in response.text and not engine.asked


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/x", "/metrics", "/", "/docs", "/health/", "//health"])
def test_nothing_but_health_is_shown_without_a_key(open_client, path):
    client = open_client(SETTINGS)
    assert client.get(path, follow_redirects=False).status_code == 401
    assert client.get("/health").json() == {"status": "ok"}  # no model's name


def test_guessing_keys_is_slowed_down(open_client):
    client = open_client(ApiSettings(keys=SETTINGS.keys, limits=Limits(max_requests_per_minute=3)))
    statuses = [client.get("/v1/models", headers=with_key(f"guess-{index}")).status_code for index in range(5)]
    assert statuses == [401, 401, 401, 429, 429]
    assert client.get("/v1/models", headers=with_key(KEY)).status_code == 200


def test_keys_come_from_a_file_and_the_environment(tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text(f"# of the lab\n{KEY}\n\n")
    file.chmod(0o600)
    keys = read_api_keys(file, {"LLAVA_SAEP_API_KEY": OTHER})
    assert all(keys.identify(f"Bearer {key}") for key in (KEY, OTHER)) and not keys.identify("Bearer # of the lab")
    assert not caplog.records
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING, "llava_saep"):
        read_api_keys(file, {})
    assert "can be read by other users" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no key"), ("short", "has 5 characters"), ("with blank 0123456789", "holds blanks")],
)
def test_weak_keys_are_refused_with_a_way_to_make_one(tmp_path, content, message):
    (tmp_path / "keys").write_text(content)
    with pytest.raises(UserError, match=f"{message}.*secrets.token_urlsafe"):
        read_api_keys(tmp_path / "keys", {})


def test_an_empty_variable_does_not_open_the_server():
    with pytest.raises(UserError, match="has 0 characters"):
        read_api_keys(None, {"LLAVA_SAEP_API_KEY": ""})


def test_neither_keys_nor_their_digests_are_printed():
    assert "keys=ApiKeys()," in repr(SETTINGS)


def test_keys_are_compared_in_constant_time(monkeypatch):
    """Each key goes through hmac's comparison, the first match included."""
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or real(a, b))
    SETTINGS.keys.identify(f"Bearer {KEY}")
    assert compared == list(SETTINGS.keys.digests)
