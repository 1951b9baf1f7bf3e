"""What /metrics counts."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llava_saep.errors import UserError
from tests.fixtures.engines import wait_until
from tests.fixtures.requests import ask, question


def samples(client):
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value for family in families for sample in family.samples
    }


@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_counted_with_their_tokens_and_times(open_client, stream):
    client = open_client()
    for _ in range(3):
        ask(client, question(stream=stream))
    found = samples(client)
    assert found["llava_saep_requests_total", "/v1/chat/completions", "200"] == 3
    assert found["llava_saep_prompt_tokens_total", "scripted"] == 60
    assert found["llava_saep_image_tokens_total", "scripted"] == 27
    assert found["llava_saep_completion_tokens_total", "scripted"] == 6
    assert found["llava_saep_cached_tokens_total", "scripted"] == 12
    assert found["llava_saep_answers_total", "scripted", "stop"] == 3
    assert found["llava_saep_waiting_seconds_sum", "scripted"] == 3
    assert found["llava_saep_time_to_first_token_seconds_sum", "scripted"] == 4.5
    assert found["llava_saep_answer_seconds_sum", "scripted"] == 9
    assert found["llava_saep_queue_length", "scripted"] == 0
    assert found["llava_saep_requests_in_progress",] == 1  # this one


def test_refusals_are_counted_by_status(open_client, engine):
    client = open_client()
    engine.error = UserError("no")
    ask(client, question())
    client.get("/made/up/1")
    client.get("/made/up/2")
    found = samples(client)
    assert found["llava_saep_requests_total", "/v1/chat/completions", "400"] == 1
    assert found["llava_saep_requests_total", "404", "other"] == 2


def test_the_queue_is_counted(open_client, engine):
    from concurrent.futures import ThreadPoolExecutor

    client = open_client()
    engine.may_go_on.clear()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, client, question()) for _ in range(4)]
        wait_until(lambda: len(engine.streams) == 4)
        assert samples(client)["llava_saep_queue_length", "scripted"] == 3
        engine.may_go_on.set()
        assert all(answer.result().status_code == 200 for answer in answers)
    assert samples(client)["llava_saep_queue_length", "scripted"] == 0
