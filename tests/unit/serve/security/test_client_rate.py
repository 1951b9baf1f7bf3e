"""Questions of one client are limited by the minute: 429, with the time after which to ask again."""

import pytest

from llava_saep.serve import rate
from llava_saep.serve.api import ApiKeys, ApiSettings
from llava_saep.serve.limits import Limits
from llava_saep.serve.rate import RequestRate, client_name
from tests.fixtures.requests import ask, question, refused

KEYS = ["first-key-0123456789", "second-key-0123456789"]


def test_a_client_that_asks_too_often_is_told_when_to_ask_again(open_client, engine):
    client = open_client(ApiSettings(limits=Limits(max_requests_per_minute=2)))
    assert [ask(client, question()).status_code for _ in range(2)] == [200, 200]
    response = ask(client, question())
    assert refused(response, 429)["code"] == "rate_limit_exceeded"
    assert 50 <= int(response.headers["retry-after"]) <= 60
    assert len(engine.asked) == 2
    assert client.get("/v1/models").status_code == 200  # what costs nothing is not counted


def test_requests_that_are_refused_count_too(open_client):
    client = open_client(ApiSettings(limits=Limits(max_requests_per_minute=2)))
    assert [ask(client, {}).status_code for _ in range(3)] == [400, 400, 429]


def test_each_key_has_a_rate_of_its_own(open_client):
    client = open_client(ApiSettings(keys=ApiKeys.of(KEYS), limits=Limits(max_requests_per_minute=1)))
    for key in KEYS:
        statuses = [ask(client, question(), {"Authorization": f"Bearer {key}"}).status_code for _ in range(2)]
        assert statuses == [200, 429]


@pytest.mark.parametrize("header", ["X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Client-IP"])
def test_a_client_cannot_choose_its_address(open_client, header):
    client = open_client(ApiSettings(limits=Limits(max_requests_per_minute=1)))
    assert [ask(client, question(), {header: f"9.9.9.{index}"}).status_code for index in range(2)] == [200, 429]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1.2.3.4", "1.2.3.4", True),
        ("1.2.3.4", "1.2.3.5", False),
        ("2001:4860::1", "2001:4860::ffff:2", True),  # one network of one client
        ("2001:4860::1", "2001:4860:0:1::1", False),
        ("::ffff:1.2.3.4", "1.2.3.4", True),
        ("testclient", "testclient", True),
    ],
)
def test_addresses_of_one_network_are_one_client(one, other, same):
    assert (client_name(one) == client_name(other)) == same


def test_no_more_clients_are_remembered_than_fit(monkeypatch):
    """The one that has been quiet longest is forgotten, not one that still asks."""
    monkeypatch.setattr(rate, "_MAX_CLIENTS", 3)
    counts = RequestRate(1, clock=lambda: 0.0)
    assert [counts.seconds_to_wait(client) for client in "abc"] == [0, 0, 0]
    assert counts.seconds_to_wait("a") > 0
    assert counts.seconds_to_wait("d") == 0  # b makes room for it
    assert counts.seconds_to_wait("a") > 0 and counts.seconds_to_wait("b") == 0
    assert len(counts._times) == 3
