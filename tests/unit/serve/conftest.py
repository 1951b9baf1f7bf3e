"""Applications in front of engines whose answers are known."""

import pytest
from starlette.testclient import TestClient

from llava_saep.serve.api import ApiSettings, create_app
from tests.fixtures.engines import ScriptedEngine


@pytest.fixture
def engine():
    return ScriptedEngine()


@pytest.fixture
def open_client(engine):
    """A function from settings to a client of an application with them."""
    clients = []

    def make(settings: ApiSettings | None = None, **kwargs) -> TestClient:
        client = TestClient(create_app({"scripted": engine}, settings), raise_server_exceptions=False, **kwargs)
        clients.append(client)
        return client.__enter__()

    yield make
    engine.may_go_on.set()
    for client in clients:
        client.__exit__(None, None, None)
