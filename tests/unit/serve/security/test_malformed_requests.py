"""Hundreds of malformed requests, each answered with a 4xx, and a good one afterwards. tests/serving has thousands."""

from starlette.testclient import TestClient

from llava_saep.generation import LocalEngine
from llava_saep.serve.api import ApiSettings, create_app
from llava_saep.serve.limits import Limits
from tests.fixtures.malformed import MAX_REQUEST_BYTES, malformed_requests
from tests.fixtures.model import write_model
from tests.fixtures.requests import ask, question

LIMITS = Limits(max_requests_per_minute=10**6, max_request_bytes=MAX_REQUEST_BYTES)


def test_malformed_requests_are_refused_and_leave_no_mark(tmp_path):
    engine = LocalEngine.from_pretrained(write_model(tmp_path), device="cpu", model_id="scripted")
    fields = question(max_tokens=5, temperature=0)
    with TestClient(
        create_app({"scripted": engine}, ApiSettings(limits=LIMITS)), raise_server_exceptions=False
    ) as client:
        before = ask(client, fields).json()["choices"]
        for request in malformed_requests(312, seed=0):
            response = client.request(request.method, request.path, content=request.content, headers=request.headers)
            assert 400 <= response.status_code < 500, (request.kind, response.status_code, request.content[:300])
            assert response.json()["error"]["message"]
        assert ask(client, fields).json()["choices"] == before
    engine.close()
