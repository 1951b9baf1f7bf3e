"""Names and passwords: what the file may look like, and that the page asks for them."""

import asyncio

import httpx
import pytest

from llava_saep.errors import UserError
from llava_saep.serve.demo import accounts
from llava_saep.serve.demo.accounts import hash_password, is_right_password, password_check, read_accounts
from tests.fixtures.demo_page import launched
from tests.fixtures.engines import ScriptedEngine


def write(path, text, mode=0o600):
    path.write_text(text)
    path.chmod(mode)
    return path


def test_passwords_are_right_as_they_are_and_as_hashes(tmp_path):
    hashed = hash_password("päss:word")
    assert hashed != hash_password("päss:word")  # salted
    read = read_accounts(write(tmp_path / "auth", f"# people\nada:päss:word\n\nbob:{hashed}\n"))
    for name in ("ada", "bob"):
        assert is_right_password("päss:word", read[name]) and not is_right_password("pass:word", read[name])


def test_a_hash_alone_may_be_read_by_others_and_a_password_may_not(tmp_path):
    read_accounts(write(tmp_path / "hashes", f"bob:{hash_password('x')}", mode=0o644))
    with pytest.raises(UserError, match="chmod 600"):
        read_accounts(write(tmp_path / "plain", "ada:x", mode=0o640))


@pytest.mark.parametrize("text", ["", "# nobody\n", "ada", "ada:", ":x", "ada:scrypt$AAAA$BBBB", "ada:x\nada:y"])
def test_a_file_that_is_wrong_is_refused_with_its_name(tmp_path, text):
    with pytest.raises(UserError, match="--auth-file .*auth"):
        read_accounts(write(tmp_path / "auth", text))
    with pytest.raises(UserError, match="cannot be read"):
        read_accounts(tmp_path / "missing")


def test_mistakes_and_unknown_names_wait_alike(monkeypatch):
    waited = []

    async def sleep(seconds):
        waited.append(seconds)

    monkeypatch.setattr(accounts.asyncio, "sleep", sleep)
    check = password_check({"ada": hash_password("x")})
    assert [asyncio.run(check(*pair)) for pair in (("ada", "x"), ("ada", "y"), ("eve", "x"))] == [True, False, False]
    assert waited == [1.0, 1.0]


def test_without_a_password_the_page_tells_and_does_nothing():
    check = password_check({"ada": "right"})
    with launched({"scripted": ScriptedEngine()}, accounts_check=check) as (_, address):
        with httpx.Client(base_url=address, trust_env=False, timeout=30) as client:
            assert client.post("/gradio_api/queue/join", json={"data": [], "fn_index": 0}).status_code == 401
            assert client.post("/gradio_api/upload", files={"files": ("a.png", b"x")}).status_code == 401
            assert client.get("/gradio_api/file=/etc/passwd").status_code == 401
            assert "components" not in client.get("/config").json()
            assert client.post("/login", data={"username": "ada", "password": "wrong"}).status_code == 400
            assert client.post("/login", data={"username": "ada", "password": "right"}).status_code == 200
            assert client.get("/config").json()["components"]
