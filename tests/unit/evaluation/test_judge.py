"""The judge behind an HTTP endpoint: protocol, failures, patience, resuming; against a server on this machine."""

import json
import time

import pytest

from llava_saep.errors import UserError
from llava_saep.evaluation.judge import Judge, find_api_key, review_answers
from llava_saep.evaluation.tasks import JudgeRequest
from tests.fixtures.judge import chat_reply, running_endpoint


@pytest.fixture
def endpoint():
    with running_endpoint() as running:
        yield running


def judge(endpoint, **changes):
    settings = {"url": endpoint.url, "model": "rater", "first_wait_seconds": 0.01, "timeout_seconds": 5.0}
    return Judge(**{**settings, **changes})


def requests(*texts):
    return [
        JudgeRequest(
            question_id=index, system="be fair", user=text, record={"category": "x"}, max_tokens=9, temperature=0.2
        )
        for index, text in enumerate(texts)
    ]


def line(review):
    return {**review.record, "question_id": review.question_id, "content": review.reply}


def contents(reviews):
    return [each["content"] for each in reviews.lines]


def test_reviews_follow_the_order_of_the_requests_in_the_protocol_of_openai(endpoint, tmp_path):
    asked = judge(endpoint, api_key="secret")
    reviews = review_answers(requests("a", "b", "c"), asked, tmp_path / "reviews.jsonl", line)
    assert contents(reviews) == ["rated a", "rated b", "rated c"]
    assert [json.loads(text) for text in (tmp_path / "reviews.jsonl").read_text().splitlines()] == reviews.lines
    path, body, headers = endpoint.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["messages"][0] == {"role": "system", "content": "be fair"}
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("rater", 9, 0.2)
    assert "secret" not in repr(asked) + asked.description + (tmp_path / "reviews.jsonl").read_text()


def test_half_of_a_surrogate_pair_in_a_reply_costs_no_review(endpoint, tmp_path):
    endpoint.respond = lambda text, times: chat_reply("8 6 \ud83d \U0001f600")
    reviews = review_answers(requests("a"), judge(endpoint), tmp_path / "r.jsonl", line)
    assert contents(reviews) == ["8 6 \ufffd \U0001f600"]


def test_no_system_message_is_sent_where_there_is_none(endpoint, tmp_path):
    (request,) = requests("a")
    request = JudgeRequest(**{**request.__dict__, "system": ""})
    review_answers([request], judge(endpoint), tmp_path / "r.jsonl", line)
    assert [message["role"] for message in endpoint.requests[0][1]["messages"]] == ["user"]
    assert "Authorization" not in endpoint.requests[0][2]


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param((429, "slow down", {"Retry-After": "0"}), id="rate limit"),
        pytest.param((429, "slow down", {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), id="rate limit with a date"),
        pytest.param((500, "oops", {}), id="server error"),
        pytest.param((None, "", {}), id="broken connection"),
        pytest.param((200, "<html>", {}), id="no JSON"),
        pytest.param((200, '{"choices": []}', {}), id="no choice"),
        pytest.param((200, '["choices"]', {}), id="another shape"),
        pytest.param((200, '{"choices": [{"message": {"content": null}}]}', {}), id="no text"),
        pytest.param(chat_reply("  "), id="empty reply"),
    ],
)
def test_failure_that_passes_is_waited_for(endpoint, tmp_path, failure):
    endpoint.respond = lambda text, times: failure if times < 3 else chat_reply("good")
    assert contents(review_answers(requests("a"), judge(endpoint), tmp_path / "r.jsonl", line)) == ["good"]
    assert endpoint.times["a"] == 3


def test_server_that_says_how_long_to_wait_is_obeyed(endpoint, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("llava_saep.evaluation.judge.time.sleep", waits.append)
    endpoint.respond = lambda text, times: (429, "", {"Retry-After": "7"}) if times < 2 else chat_reply("good")
    review_answers(requests("a"), judge(endpoint), tmp_path / "r.jsonl", line)
    assert waits == [7.0]


def test_waits_grow_and_end(endpoint, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("llava_saep.evaluation.judge.time.sleep", waits.append)
    monkeypatch.setattr("llava_saep.evaluation.judge.random.uniform", lambda low, high: 1.0)
    endpoint.respond = lambda text, times: (503, "busy", {})
    with pytest.raises(UserError, match=r"answers nothing: 1 of 1 reviews failed, .* status 503 \(8 attempts\)"):
        asked = judge(endpoint, first_wait_seconds=1.0, max_attempts=8)
        review_answers(requests("a"), asked, tmp_path / "r.jsonl", line)
    assert waits == [1, 2, 4, 8, 16, 32, 60]


def test_failed_review_is_counted_and_asked_for_by_the_next_run(endpoint, tmp_path, caplog):
    endpoint.respond = lambda text, times: (500, "", {}) if text == "b" else chat_reply(f"rated {text}")
    path = tmp_path / "r.jsonl"
    reviews = review_answers(requests("a", "b", "c"), judge(endpoint, max_attempts=2), path, line)
    assert contents(reviews) == ["rated a", None, "rated c"] and reviews.num_failed == 1
    assert "1 of 3 reviews failed, the first one of question 1: status 500 (2 attempts)" in caplog.text
    assert len(path.read_text().splitlines()) == 2
    endpoint.respond = lambda text, times: chat_reply(f"rated {text}")
    assert contents(review_answers(requests("a", "b", "c"), judge(endpoint), path, line)) == [
        "rated a",
        "rated b",
        "rated c",
    ]
    assert endpoint.times == {"a": 1, "b": 3, "c": 1}


def test_interrupted_review_goes_on_and_a_changed_answer_is_reviewed_anew(endpoint, tmp_path):
    path = tmp_path / "r.jsonl"
    review_answers(requests("a", "b"), judge(endpoint), path, line)
    with path.open("a") as file:
        file.write('{"question_id": 2, "content": "cut sho')
    changed = requests("a", "another answer", "c")
    assert contents(review_answers(changed, judge(endpoint), path, line)) == [
        "rated a",
        "rated another answer",
        "rated c",
    ]
    assert endpoint.times == {"a": 1, "b": 1, "another answer": 1, "c": 1}
    assert len(path.read_text().splitlines()) == 3
    review_answers(changed, judge(endpoint, model="another"), path, line)
    assert endpoint.times["a"] == 2  # another judge rates differently


def test_reviews_are_on_the_disk_before_all_are_there(endpoint, tmp_path):
    path, seen = tmp_path / "r.jsonl", []

    def respond(text, times):
        if text == "c":
            deadline = time.monotonic() + 5
            while not path.read_text() and time.monotonic() < deadline:
                time.sleep(0.01)
            seen.append(path.read_text().count("\n"))
        return chat_reply("good")

    endpoint.respond = respond
    review_answers(requests("a", "b", "c"), judge(endpoint, num_parallel=1, timeout_seconds=20.0), path, line)
    assert seen[0] >= 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusal_that_no_patience_changes_ends_at_once(endpoint, tmp_path, status):
    endpoint.respond = lambda text, times: (status, "no such model", {})
    with pytest.raises(UserError, match=rf"refuses \(status {status}\): no such model. Check --judge-url"):
        review_answers(requests("a"), judge(endpoint), tmp_path / "r.jsonl", line)
    assert endpoint.times["a"] == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_request_that_the_endpoint_will_not_take_costs_the_others_nothing(endpoint, tmp_path, caplog, status):
    """A filter of contents that holds one answer back, or an answer that is too long for the judge."""
    path = tmp_path / "r.jsonl"
    endpoint.respond = lambda text, times: (status, "filtered", {}) if text == "b" else chat_reply(f"rated {text}")
    for _ in range(2):  # also where nothing but this one is left to ask
        reviews = review_answers(requests("a", "b"), judge(endpoint), path, line)
        assert contents(reviews) == ["rated a", None]
        assert reviews.num_failed == 0  # another try would end as this one
    assert f"1 of 2 reviews failed, the first one of question 1: status {status}: filtered" in caplog.text
    assert endpoint.times == {"a": 1, "b": 2}  # sent once by each run
    with pytest.raises(UserError, match=f"answers nothing: 1 of 1 .* status {status}: filtered"):
        review_answers(requests("b"), judge(endpoint), tmp_path / "other.jsonl", line)


def test_reviews_of_other_answers_and_judges_are_set_aside_and_found_again(endpoint, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"question_id": 0, "content": "by another program"}\n')
    review_answers(requests("a", "b"), judge(endpoint), path, line)
    review_answers(requests("a", "b"), judge(endpoint, model="another"), path, line)
    assert endpoint.times == {"a": 2, "b": 2}
    first = review_answers(requests("a", "b"), judge(endpoint), path, line)
    assert contents(first) == ["rated a", "rated b"] and endpoint.times == {"a": 2, "b": 2}
    assert [json.loads(text) for text in path.read_text().splitlines()] == first.lines
    assert len((tmp_path / "r.others.jsonl").read_text().splitlines()) == 5  # of the other program, and of both judges


def test_refusal_in_the_middle_keeps_the_reviews_so_far(endpoint, tmp_path):
    path = tmp_path / "r.jsonl"
    endpoint.respond = lambda text, times: (401, "expired", {}) if text == "b" else chat_reply("good")
    with pytest.raises(UserError, match="expired"):
        review_answers(requests("a", "b"), judge(endpoint, num_parallel=1), path, line)
    assert [json.loads(text)["content"] for text in path.read_text().splitlines()] == ["good"]


def test_endpoint_that_nobody_serves_is_said(tmp_path):
    asked = Judge(url="http://127.0.0.1:9", model="m", first_wait_seconds=0.01, max_attempts=2)
    with pytest.raises(UserError, match=r"the judge at http://127.0.0.1:9/chat/completions answers nothing: .*Connect"):
        review_answers(requests("a"), asked, tmp_path / "r.jsonl", line)


def test_address_may_name_the_path_and_must_be_an_address():
    whole = Judge(url="https://example.org/v1/chat/completions", model="m")
    assert whole.endpoint == Judge(url="https://example.org/v1/", model="m").endpoint == whole.url
    with pytest.raises(UserError, match="expected http:// or https://"):
        Judge(url="example.org", model="m")


def test_key_comes_from_a_file_or_the_environment(tmp_path):
    (tmp_path / "key").write_text("abc\n")
    assert find_api_key(str(tmp_path / "key"), {"OPENAI_API_KEY": "other"}) == "abc"
    assert find_api_key(None, {"OPENAI_API_KEY": "other"}) == "other"
    assert find_api_key(None, {"OPENAI_API_KEY": "other", "LLAVA_SAEP_JUDGE_KEY": "own"}) == "own"
    assert find_api_key(None, {}) is None
    (tmp_path / "key").write_text("")
    with pytest.raises(UserError, match="is empty"):
        find_api_key(str(tmp_path / "key"))
    with pytest.raises(UserError, match="cannot be read"):
        find_api_key(str(tmp_path / "absent"))


def test_reviews_that_are_being_written_are_left_to_whoever_writes_them(endpoint, tmp_path):
    """The second would pay for the same replies, and one of the two files would be lost."""
    path = tmp_path / "reviews.jsonl"
    messages = []

    def line_of_a_long_run(review):
        with pytest.raises(UserError) as caught:
            review_answers(requests("a"), judge(endpoint), path, line)
        messages.append(str(caught.value))
        return line(review)

    review_answers(requests("a"), judge(endpoint), path, line_of_a_long_run)
    assert f"another evaluation is writing {path}" in messages[0]
    assert len(endpoint.requests) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["reviews.jsonl"]
