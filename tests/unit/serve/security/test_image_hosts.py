"""--allowed-image-hosts: addresses of these hosts alone, public ones, checked where the connection goes."""

import contextlib
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time

import httpx
import pytest

from llava_saep.errors import UserError
from llava_saep.serve.api import fetching
from llava_saep.serve.api.fetching import ImageFetcher, is_public

PUBLIC, PRIVATE = "93.184.216.34", "10.0.0.1"


class Internet(httpx.BaseTransport):
    """Answers requests from a table of (address, path), and keeps them."""

    def __init__(self, answers):
        self.answers = answers
        self.requests = []

    def handle_request(self, request):
        self.requests.append(request)
        answer = self.answers[request.url.host, request.url.path]
        return answer() if callable(answer) else answer


def image_response():
    return httpx.Response(200, stream=httpx.ByteStream(b"image"))


def fetcher(answers, names=None, max_bytes=1000):
    names = {"images.example": [PUBLIC]} | (names or {})
    internet = Internet(answers)
    allowed = frozenset({"images.example", "other.example", "inside.example", PUBLIC, PRIVATE})
    fetch = ImageFetcher(allowed, max_bytes=max_bytes, resolve=lambda host: names[host], transport=internet)
    return internet, lambda url: fetch.fetch(url, fetch.deadline())


def test_the_connection_goes_to_the_checked_address_under_the_hosts_name():
    """One look-up: a second one, which an attacker's name server answers differently, never happens."""
    lookups = []
    internet = Internet({(PUBLIC, "/a.png"): image_response()})
    fetch = ImageFetcher(
        frozenset({"images.example"}),
        max_bytes=10,
        resolve=lambda host: lookups.append(host) or [PUBLIC],
        transport=internet,
    )
    assert fetch.fetch("https://Images.Example/a.png?size=1#top", fetch.deadline()) == b"image"
    [request] = internet.requests
    assert lookups == ["images.example"]
    assert (request.url.host, request.url.query) == (PUBLIC, b"size=1")
    assert request.headers["host"] == "images.example" and request.extensions["sni_hostname"] == "images.example"
    assert not {"cookie", "authorization", "referer"} & set(request.headers)


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example/a.png",
        "https://images.example:8443/a.png",
        "https://user:password@images.example/a.png",
        "https://evil.example/a.png",
        "https://images.example.evil.example/a.png",
        "https://sub.images.example/a.png",
        "https://evil.example#@images.example/a.png",
        "https://evil.example\\@images.example/a.png",
        "https://evil.example/https://images.example/",
        "ftp://images.example/a.png",
        "file://images.example/etc/passwd",
        "https:images.example/a.png",
        "https:///a.png",
        "https://[::1/a.png",
        "https://images.example\n.evil.example/a.png",
        "//images.example/a.png",
    ],
)
def test_other_addresses_are_refused_without_a_look_up(url):
    internet, fetch = fetcher({}, names={})
    with pytest.raises(UserError, match="images are (not )?fetched from|no address"):
        fetch(url)
    assert not internet.requests


NOT_PUBLIC = (
    "127.0.0.1 127.8.8.8 0.0.0.0 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.2.1 198.18.0.1 "
    "224.0.0.1 240.0.0.1 255.255.255.255 ::1 :: fe80::1 fc00::1 fd00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 "
    "64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 2002:7f00:1:: 2001:db8::1 2002:a00:1:: fec0::1 ::127.0.0.1"
).split()


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_names_that_lead_inside_are_refused(address):
    assert not is_public(ipaddress.ip_address(address))
    internet, fetch = fetcher({}, names={"inside.example": [PUBLIC, address]})
    with pytest.raises(UserError, match="has an address that is not public"):
        fetch("https://inside.example/a.png")
    assert not internet.requests


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1::1", "64:ff9b::808:808"])
def test_public_addresses_are_known_as_such(address):
    assert is_public(ipaddress.ip_address(address))


def test_an_allowed_address_that_is_not_public_is_refused():
    internet, fetch = fetcher({}, names={PRIVATE: [PRIVATE]})
    with pytest.raises(UserError, match="not public"):
        fetch(f"https://{PRIVATE}/a.png")


@pytest.mark.parametrize(
    "target",
    [
        "https://inside.example/a.png",
        "http://images.example/a.png",
        "https://evil.example/a.png",
        "file:///etc/passwd",
        "https://127.0.0.1/",
        "//evil.example/x",
    ],
)
def test_redirects_pass_the_same_checks(target):
    answers = {(PUBLIC, "/"): httpx.Response(302, headers={"Location": target})}
    internet, fetch = fetcher(answers, names={"inside.example": [PRIVATE]})
    with pytest.raises(UserError):
        fetch("https://images.example/")
    assert len(internet.requests) == 1


def test_a_redirect_to_an_allowed_address_is_followed():
    answers = {
        (PUBLIC, "/"): httpx.Response(301, headers={"Location": "/b.png"}),
        (PUBLIC, "/b.png"): image_response(),
    }
    assert fetcher(answers)[1]("https://images.example/") == b"image"


def test_redirects_in_a_circle_end():
    internet, fetch = fetcher({(PUBLIC, "/"): lambda: httpx.Response(302, headers={"Location": "/"})})
    with pytest.raises(UserError, match="redirects more than 3 times"):
        fetch("https://images.example/")


class Endless(httpx.SyncByteStream):
    """A body without an end."""

    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.num_chunks = 0

    def __iter__(self):
        while True:
            time.sleep(self.seconds)
            self.num_chunks += 1
            yield b"x" * 100


def test_bytes_are_limited_while_they_come():
    body = Endless()
    _, fetch = fetcher({(PUBLIC, "/"): httpx.Response(200, stream=body)})
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        fetch("https://images.example/")
    assert body.num_chunks < 10_000


def test_compressed_answers_do_not_grow():
    import gzip

    content = gzip.compress(b"\0" * 10**6)
    _, fetch = fetcher(
        {(PUBLIC, "/"): httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=httpx.ByteStream(content))},
        max_bytes=10_000,
    )
    assert fetch("https://images.example/") == content


def test_time_is_limited_over_all_images(monkeypatch):
    monkeypatch.setattr(fetching, "FETCH_SECONDS", 0.2)
    _, fetch = fetcher({(PUBLIC, "/"): httpx.Response(200, stream=Endless(0.05))}, max_bytes=10**9)
    start = time.monotonic()
    with pytest.raises(UserError, match="seconds"):
        fetch("https://images.example/")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_hosts_refusal_is_passed_on_as_a_number(status):
    _, fetch = fetcher({(PUBLIC, "/"): httpx.Response(status, content=b"secret of the host")})
    with pytest.raises(UserError, match=f"answered with status {status}") as refused:
        fetch("https://images.example/")
    assert "secret" not in str(refused.value)


def test_settings_of_the_environment_name_no_proxy(monkeypatch):
    """A proxy would look the name up again, on its own."""
    clients = []
    real = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **kwargs: clients.append(kwargs) or real(**kwargs))
    fetcher({(PUBLIC, "/"): image_response()})[1]("https://images.example/")
    assert clients[0]["trust_env"] is False


def test_without_the_flag_nothing_is_fetched():
    with pytest.raises(UserError, match="not fetched from addresses here"):
        ImageFetcher(frozenset(), max_bytes=10, resolve=lambda host: pytest.fail("looked up")).fetch(
            "https://a.example", 0
        )


@pytest.fixture
def https_server(tmp_path, monkeypatch):
    """A host with a certificate, where connections to PUBLIC end; a function from its name to what it was asked."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to make a certificate")
    with contextlib.ExitStack() as open_sockets:
        listener = open_sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
        connect = socket.create_connection
        asked = {}

        def connect_here(address, *args, **kwargs):
            asked["address"] = address
            return connect(listener.getsockname(), *args, **kwargs)

        monkeypatch.setattr(socket, "create_connection", connect_here)

        def answer(context):
            with contextlib.suppress(OSError):  # a client that does not trust the certificate hangs up
                connection, _ = listener.accept()
                with context.wrap_socket(connection, server_side=True) as secured:
                    asked["request"] = secured.recv(65_536)
                    secured.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nimage")

        def start(certified_name):
            made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
            made += ["-keyout", "key", "-out", "cert", "-days", "2", "-subj", "/CN=test"]
            made += ["-addext", f"subjectAltName=DNS:{certified_name}"]
            subprocess.run(made, cwd=tmp_path, check=True, capture_output=True)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
            context.sni_callback = lambda sock, name, context: asked.update(server_name=name)
            thread = threading.Thread(target=answer, args=(context,), daemon=True)
            thread.start()
            trust = ssl.create_default_context(cafile=tmp_path / "cert")
            fetch = ImageFetcher(
                frozenset({"images.example"}),
                max_bytes=10,
                resolve=lambda host: [PUBLIC],
                transport=httpx.HTTPTransport(verify=trust),
            )
            return fetch, asked

        yield start


def test_the_certificate_must_be_the_names(https_server):
    """Over real TLS: to the checked address, under the host's name."""
    fetch, asked = https_server("images.example")
    assert fetch.fetch("https://images.example/a.png", fetch.deadline()) == b"image"
    assert asked["address"] == (PUBLIC, 443) and asked["server_name"] == "images.example"
    assert (
        asked["request"].startswith(b"GET /a.png HTTP/1.1\r\n") and b"\r\nHost: images.example\r\n" in asked["request"]
    )


@pytest.mark.parametrize("certified_name", ["other.example", PUBLIC])
def test_a_certificate_of_another_name_is_refused(https_server, certified_name):
    fetch, asked = https_server(certified_name)
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch.fetch("https://images.example/a.png", fetch.deadline())
    assert "request" not in asked
