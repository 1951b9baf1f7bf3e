"""Thousands of malformed requests to a real server: each gets a 4xx, it stays up, its memory does not grow."""

import socket
import threading
import time

import httpx
import psutil
import pytest

from tests.fixtures.malformed import MAX_REQUEST_BYTES, malformed_requests, raw_garbage
from tests.fixtures.requests import question
from tests.fixtures.servers import ServeProcess

FLAGS = ["--max-requests-per-minute", "1000000", "--max-request-bytes", str(MAX_REQUEST_BYTES)]
GOOD = question(model="model", max_tokens=5, temperature=0)


@pytest.fixture(scope="module")
def server(model_folder, tmp_path_factory):
    with ServeProcess(["--model-path", str(model_folder), *FLAGS], tmp_path_factory.mktemp("log") / "log") as server:
        yield server
        assert server.terminate() == 0
        assert "Traceback" not in server.log.read_text() and "internal error" not in server.log.read_text()


def ask_good(server):
    response = httpx.post(f"{server.address}/v1/chat/completions", json=GOOD, timeout=60)
    assert response.status_code == 200
    return response.json()["choices"]


def send(client, request):
    response = client.request(request.method, request.path, content=request.content, headers=request.headers)
    assert 400 <= response.status_code < 500, (request.kind, response.status_code, request.content[:300])
    assert response.json()["error"]["message"], request.kind


def send_raw(server, content):
    """Send bytes and return all that comes back until the server closes the connection."""
    url = httpx.URL(server.address)
    answer = b""
    with socket.create_connection((url.host, url.port), timeout=30) as connection:
        try:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65_536):
                answer += chunk
        except OSError:
            pass  # it closed while there was more to come
    return answer


@pytest.mark.slow
def test_thousands_of_malformed_requests_are_refused(server):
    before = ask_good(server)
    process = psutil.Process(server.process.pid)
    with httpx.Client(base_url=server.address, timeout=60) as client:
        for request in malformed_requests(1000, seed=1):
            send(client, request)
        warm = process.memory_info().rss
        for request in malformed_requests(3000, seed=2):
            send(client, request)
    grown = process.memory_info().rss - warm
    print(f"{warm / 2**20:.1f} MB, then {grown / 2**20:+.1f} MB")
    assert ask_good(server) == before
    # 3000 requests bring some 150 MB. What is left is malloc's: a leak of a tenth of them would show.
    assert grown < 15 * 2**20, f"{grown / 2**20:.1f} MB more after 3000 requests"


@pytest.mark.slow
def test_garbage_is_refused_or_hung_up_on(server):
    """Where a line is HTTP enough to be answered, the answer is a 4xx; the rest is at most a closed connection."""
    before = ask_good(server)
    for content in raw_garbage(400, seed=3):
        answer = send_raw(server, content)
        assert not answer or answer.startswith(b"HTTP/1.1 4"), (content[:200], answer[:200])
    assert ask_good(server) == before


@pytest.mark.slow
def test_endless_bodies_are_cut_off(server):
    """Chunked, without a Content-Length; several at once, and no memory is taken for them."""
    process = psutil.Process(server.process.pid)
    ask_good(server)
    before, answers = process.memory_info().rss, []

    def send_endlessly():
        url = httpx.URL(server.address)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        with socket.create_connection((url.host, url.port), timeout=30) as connection:
            connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            num_bytes, deadline = 0, time.monotonic() + 30
            try:
                while time.monotonic() < deadline:
                    connection.sendall(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
                    num_bytes += 65_536
            except (ConnectionResetError, BrokenPipeError):
                answers.append(num_bytes)

    threads = [threading.Thread(target=send_endlessly) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4 and min(answers) >= MAX_REQUEST_BYTES
    assert process.memory_info().rss - before < 30 * 2**20
    ask_good(server)


@pytest.mark.slow
def test_requests_that_are_never_finished_do_not_keep_others_out(server):
    """More connections than the server has threads, each with half a head, or a head and half a body."""
    url = httpx.URL(server.address)
    halves = (
        b"POST /v1/chat",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n",
    )
    connections = []
    try:
        for index in range(200):
            connection = socket.create_connection((url.host, url.port), timeout=30)
            connection.sendall(halves[index % 2])
            connections.append(connection)
        ask_good(server)
        connections[0].settimeout(25)
        assert connections[0].recv(1) == b""  # a head that does not come ends the connection after 15 seconds
    finally:
        for connection in connections:
            connection.close()
    ask_good(server)
