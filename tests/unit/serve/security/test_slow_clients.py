"""Clients that send or read at their leisure, or leave, hold neither a connection nor the model."""

import json
import socket

import pytest

from llava_saep.serve.api import create_app, server
from tests.fixtures.engines import ScriptedEngine, wait_until
from tests.fixtures.requests import question
from tests.fixtures.servers import serving


@pytest.fixture
def engine():
    engine = ScriptedEngine()
    yield engine
    engine.may_go_on.set()


@pytest.fixture
def address(engine, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(server, "READING_SECONDS", 0.3)
    with serving(create_app({"scripted": engine})) as url:
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


def put_question(address, **fields) -> socket.socket:
    connection = socket.create_connection(address, timeout=10)
    body = json.dumps(question(images=[], **fields)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    return connection


@pytest.mark.parametrize("rest", [b"", b"Host: localhost\r\nX-Filler: "])
def test_a_head_that_does_not_end_is_given_up(address, rest):
    """Neither silence nor a byte now and then keeps the connection."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n" + rest)
        connection.settimeout(0.05)
        wait_until(lambda: is_closed(connection, rest[:1]), seconds=10)


def is_closed(connection: socket.socket, filler: bytes) -> bool:
    """Send a little more, and see whether the server is still there."""
    try:
        connection.sendall(filler)
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_a_client_that_does_not_read_its_answer_is_cut_off(address, engine):
    engine.pieces = ["x" * 10_000] * 3000  # more than the system's own buffers take
    with put_question(address, stream=True):
        wait_until(lambda: engine.streams and engine.streams[0].closed.is_set(), seconds=20)
    assert engine.streams[0].left


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_model(address, engine, stream):
    engine.may_go_on.clear()
    connection = put_question(address, stream=stream)
    wait_until(lambda: engine.streams)
    assert not engine.streams[0].closed.wait(0.1)
    connection.close()
    wait_until(engine.streams[0].closed.is_set)
