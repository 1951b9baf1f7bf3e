"""Published vulnerabilities of LLaVA's servers, each asked for here.

CVE-2024-9309 and CVE-2024-12068: the controller fetched whatever address a worker registered (SSRF). CVE-2024-12065: a
path in a request was opened (local file inclusion). CVE-2024-10225: a long multipart boundary kept a process busy.
"""

import time

import pytest

from tests.fixtures.requests import ask, question, refused

LLAVAS_ROUTES = (
    "register_worker refresh_all_workers list_models get_worker_address receive_heart_beat worker_generate_stream "
    "worker_get_status worker_generate file upload gradio_api/file=/etc/passwd proxy=http://127.0.0.1"
).split()


@pytest.mark.parametrize("route", LLAVAS_ROUTES)
@pytest.mark.parametrize("prefix", ["/", "/v1/"])
def test_no_route_registers_workers_or_reads_files(open_client, route, prefix, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: pytest.fail("looked up"))
    monkeypatch.setattr("socket.socket.connect", lambda *args, **kwargs: pytest.fail("connected"))
    registration = {"worker_name": "http://169.254.169.254/", "check_heart_beat": True, "worker_status": None}
    client = open_client()
    for method in ("GET", "POST", "PUT"):
        assert client.request(method, prefix + route, json=registration).status_code in (404, 405)


def test_there_are_no_other_routes_than_these(open_client):
    routes = {(route.path, *sorted(route.methods)) for route in open_client().app.routes}
    assert routes == {
        ("/v1/chat/completions", "POST"),
        ("/v1/models", "GET", "HEAD"),
        ("/v1/models/{model:path}", "GET", "HEAD"),
        ("/health", "GET", "HEAD"),
        ("/metrics", "GET", "HEAD"),
    }


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/../../etc/passwd",
        "/v1/models/%2e%2e%2fetc%2fpasswd",
        "/v1/models//etc/passwd",
        "/..%2f..%2fetc",
    ],
)
def test_paths_in_addresses_name_no_files(open_client, path):
    response = open_client().get(path)
    assert response.status_code == 404 and "root:" not in response.text


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}],
        [{"type": "image", "image": "/etc/passwd"}],
        [{"type": "image_url", "image_url": {"path": "/etc/passwd"}}],
        [{"type": "file", "file": {"file_id": "/etc/passwd"}}],
        [{"type": "text", "text": "x", "image": "/etc/passwd"}, {"type": "image", "path": "/etc/passwd"}],
    ],
)
def test_paths_in_requests_are_not_opened(open_client, engine, content, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: pytest.fail("opened"))
    fields = {"model": "scripted", "messages": [{"role": "user", "content": content}]}
    assert ask(open_client(), fields).status_code == 400
    assert not engine.streams


def test_a_part_with_a_text_and_an_image_is_a_text_alone(open_client, engine):
    part = {"type": "text", "text": "x", "image": "/etc/passwd", "path": "/etc/passwd"}
    ask(open_client(), {"model": "scripted", "messages": [{"role": "user", "content": [part]}]})
    assert engine.asked[0][0][0]["content"] == [{"type": "text", "text": "x"}]


@pytest.mark.parametrize("boundary", ["-" * 10**6, "x" * 50_000 + "\\", '"' * 10_000])
def test_multipart_is_refused_at_its_header(open_client, boundary):
    content = b"--x\r\nContent-Disposition: form-data\r\n\r\n" + b"\r\n--" * 10**5
    start = time.perf_counter()
    response = open_client().post(
        "/v1/chat/completions",
        content=content,
        headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    refused(response, 415)
    assert time.perf_counter() - start < 2


def test_a_model_cannot_be_named_by_its_path(open_client):
    assert refused(ask(open_client(), question(model="/etc")), 404)["code"] == "model_not_found"
