"""LLaVA's programs that let a language model compare answers: what is asked and written, and nothing asked twice."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llava_saep.errors import UserError
from llava_saep.eval import eval_gpt_review, eval_gpt_review_bench, eval_gpt_review_visual, summarize_gpt_review
from tests.fixtures.benchmarks import write_sample


@contextmanager
def fake_judge(*replies):
    """An OpenAI-compatible endpoint that gives these replies in turn; yields its address and the requests it gets."""
    requests, waiting = [], list(replies)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": waiting.pop(0)}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
        server.shutdown()


@pytest.fixture
def places(tmp_path):
    """Flags of eval_gpt_review_bench without the judge's address."""
    write_sample("llava_bench", tmp_path)
    lines = [{"question_id": i, "prompt": "p", "text": f"answer {i}", "answer_id": f"a{i}"} for i in range(3)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "--question": [tmp_path / "questions.jsonl"],
        "--context": [tmp_path / "context.jsonl"],
        "--answer-list": [tmp_path / "answers_gpt4.jsonl", tmp_path / "answers.jsonl"],
        "--output": [tmp_path / "reviews" / "reviews_m.jsonl"],
    }


def run(program, places, url, *more):
    words = [word for flag, values in places.items() for word in (flag, *values)]
    assert program.main([str(word) for word in (*words, "--judge-url", url, *more)]) == 0
    return [json.loads(line) for line in places["--output"][0].read_text().splitlines()]


def test_answers_that_do_not_fit_are_counted(places, tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    more = [{"question_id": 0, "prompt": "p", "text": "again"}, {"question_id": 9, "prompt": "p", "text": "stray"}]
    path.write_text(path.read_text() + "".join(json.dumps(line) + "\n" for line in more))
    with fake_judge("8 6", "8 6", "8 6") as (url, _):
        assert len(run(eval_gpt_review_bench, places, url)) == 3
    said = capsys.readouterr().err
    assert f"{path}: 1 answers that a later one replaces, ignored (as 0)\n" in said
    assert f"{path}: 1 answers to no question, ignored (as 9)\n" in said


def test_the_judge_is_asked_as_llava_asks_and_its_reviews_are_llavas(places, capsys):
    with fake_judge("8 6\nbecause", "9, 9\nwell", "no idea") as (url, requests):
        reviews = run(eval_gpt_review_bench, places, url, "--max-tokens", "77")
    by_question = {
        request["messages"][1]["content"].split("[Question]\n")[1].split("\n")[0]: request for request in requests
    }
    request = by_question["Describe it."]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("gpt-4-0314", 0.2, 77)
    system, user = request["messages"]
    assert system == {
        "role": "system",
        "content": "You are a helpful and precise assistant for checking the quality of the answer.",
    }
    assert user["content"].startswith(
        "[Context]\nA lake.\n\n[Question]\nDescribe it.\n\n"
        "[Assistant 1]\nreference 1\n\n[End of Assistant 1]\n\n[Assistant 2]\nanswer 1\n\n[End of Assistant 2]\n\n"
        "[System]\nWe would like to request your feedback on the performance of two AI assistants"
    )
    assert user["content"].endswith("does not affect your judgment.\n\n")
    assert [
        {key: review[key] for key in ("id", "question_id", "answer1_id", "answer2_id", "category")}
        for review in reviews
    ] == [
        {"id": i + 1, "question_id": i, "answer1_id": f"r{i}", "answer2_id": f"a{i}", "category": f"llava_bench_{name}"}
        for i, name in enumerate(("conv", "detail", "complex"))
    ]
    assert sorted(review["tuple"] for review in reviews) == [[-1, -1], [8, 6], [9, 9]]
    assert "2 of 3 answers have points" in capsys.readouterr().out
    summarize_gpt_review.main(["-f", str(places["--output"][0])])
    said = capsys.readouterr()
    assert said.out.splitlines()[:2] == ["reviews_m", "all 88.2 85.0 75.0"]
    assert "1 of 3 reviews have no points and are left out" in said.err


def test_llavas_own_rule_file_need_not_be_there(places, tmp_path):
    """Its script names the file in its repository, and what stands there is built in; another file must exist."""
    with fake_judge(*["5 5"] * 3) as (url, requests):
        run(eval_gpt_review_bench, {**places, "--rule": ["llava_saep/eval/table/rule.json"]}, url)
    assert "[System]\nWe would like" in requests[0]["messages"][1]["content"]
    with pytest.raises(UserError, match="mine.json: no such file"):
        run(eval_gpt_review_bench, {**places, "--rule": [tmp_path / "mine.json"]}, url)


def test_a_second_run_asks_for_changed_answers_alone(places):
    with fake_judge(*["5 5"] * 4) as (url, requests):
        first = run(eval_gpt_review_bench, places, url)
        assert run(eval_gpt_review_bench, places, url) == first
        assert len(requests) == 3
        answers = places["--answer-list"][1]
        answers.write_text(answers.read_text().replace("answer 2", "another"))
        run(eval_gpt_review_bench, places, url)
        assert len(requests) == 4 and "another" in requests[-1]["messages"][1]["content"]


def test_reviews_that_llava_made_are_not_overwritten(places):
    output = places["--output"][0]
    output.parent.mkdir()
    output.write_text('{"question_id": 0, "tuple": [8, 8]}\n')
    with fake_judge() as (url, requests), pytest.raises(UserError, match="holds 1 reviews that another program made"):
        run(eval_gpt_review_bench, places, url)
    assert output.read_text() == '{"question_id": 0, "tuple": [8, 8]}\n' and not requests


def test_answers_that_are_missing_are_said_before_the_judge_is_asked(places):
    places["--answer-list"][1].write_text('{"question_id": 1, "text": "x"}\n')
    with (
        fake_judge() as (url, requests),
        pytest.raises(UserError, match="2 of 3 questions have no answer, the first one 0"),
    ):
        run(eval_gpt_review_bench, places, url)
    assert not requests


def test_the_other_two_programs_ask_as_llavas_do(places, tmp_path):
    rule = {"default": {"prompt": "Rate.", "role": "Speaker"}, "conv": {"prompt": "Rate it.", "role": "Speaker"}}
    (tmp_path / "rule.json").write_text(json.dumps(rule))
    plain = {flag: values for flag, values in places.items() if flag != "--context"}
    with fake_judge(*["5 5"] * 3) as (url, requests):
        reviews = run(eval_gpt_review, {**plain, "--rule": [tmp_path / "rule.json"]}, url)
    assert {review["category"] for review in reviews} == {"conv", "detail", "complex"}
    asked = {request["messages"][1]["content"] for request in requests}
    said = "[Speaker 1]\nreference 0\n\n[End of Speaker 1]\n\n[Speaker 2]\nanswer 0\n\n[End of Speaker 2]\n\n"
    assert f"[Question]\nWhat is it?\n\n{said}[System]\nRate it.\n\n" in asked
    assert sum(text.endswith("[System]\nRate.\n\n") for text in asked) == 2
    assert {request["model"] for request in requests} == {"gpt-4"}

    boxes = {
        "image": "001.jpg",
        "captions": ["A hut.", "Wood."],
        "instances": [{"category": "hut", "bbox": [0.1, 0.2, 0.3, 0.4]}],
    }
    (tmp_path / "boxes.jsonl").write_text(json.dumps(boxes) + "\n")
    (tmp_path / "one.jsonl").write_text(places["--question"][0].read_text().splitlines()[0] + "\n")
    visual = {
        "--question": [tmp_path / "one.jsonl"],
        "--context": [tmp_path / "boxes.jsonl"],
        "--output": [tmp_path / "v.jsonl"],
    }
    with fake_judge("5 5") as (url, requests):
        run(eval_gpt_review_visual, {**places, **visual, "--rule": [tmp_path / "rule.json"]}, url)
    context = "[Context]\nA hut.\nWood.\n\nhut: [0.1, 0.2, 0.3, 0.4]\n\n[Question]\nWhat is it?\n\n"
    assert requests[0]["messages"][1]["content"].startswith(context)
