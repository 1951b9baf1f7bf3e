"""Answering a question file: format, order, resuming, the blind run."""

import json
import os

import pytest

from llava_saep.errors import UserError
from llava_saep.evaluation.questions import Question
from llava_saep.evaluation.runner import (
    answer_questions,
    check_images,
    model_fingerprint,
    question_messages,
    read_answers,
)

QUESTIONS = [Question(question_id=i, text=f"question {i}", image=f"{i}.png", answer="yes") for i in range(5)]


class Model:
    """Stands in for Predictor.generate: says what it was asked, and remembers the sizes of its batches."""

    def __init__(self, fail_after=None):
        self.batch_sizes = []
        self.fail_after = fail_after

    def __call__(self, conversations):
        if self.fail_after is not None and len(self.batch_sizes) >= self.fail_after:
            raise KeyboardInterrupt
        self.batch_sizes.append(len(conversations))
        return ["answer to " + messages[0]["content"][-1]["text"] for messages in conversations]


def answer(model, path, questions=QUESTIONS, **changes):
    settings = {"model_id": "m", "fingerprint": "f", "batch_size": 2} | changes
    return answer_questions(questions, model, image_folder=path.parent, answers_path=path, **settings)


def test_answers_are_written_in_llavas_format(tmp_path):
    path = tmp_path / "sub" / "answers.jsonl"
    answers = answer(Model(), path)
    assert answers == [f"answer to question {i}" for i in range(5)] == list(read_answers(path).values())
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["question_id"] for record in records] == list(range(5))
    assert set(records[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert records[3]["prompt"] == "question 3"
    assert len({record["answer_id"] for record in records}) == 5


def test_interrupted_run_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer(Model(fail_after=1), path)
    with path.open("a") as file:
        file.write('{"question_id": 2, "text": "cut sho')
    model = Model()
    assert answer(model, path) == [f"answer to question {i}" for i in range(5)]
    assert model.batch_sizes == [2, 1]
    assert len(path.read_text().splitlines()) == 5


@pytest.mark.parametrize("change", [{"fingerprint": "other weights"}, {"blind": True}])
def test_answers_of_other_weights_or_of_the_blind_run_are_not_reused(tmp_path, change):
    path = tmp_path / "answers.jsonl"
    answer(Model(), path)
    model = Model()
    answer(model, path, **change)
    assert sum(model.batch_sizes) == 5


def test_changed_wording_is_asked_anew(tmp_path):
    path = tmp_path / "answers.jsonl"
    answer(Model(), path)
    model = Model()
    changed = [Question(question_id=0, text="another question", image="0.png"), *QUESTIONS[1:]]
    assert answer(model, path, changed)[0] == "answer to another question"
    assert sum(model.batch_sizes) == 1
    assert list(read_answers(path)) == list(range(5))  # in the order of the questions, as scorers expect them


def test_questions_that_share_an_id_are_all_answered(tmp_path):
    """In LLaVA's files of TextVQA and MME the id is the image's, and several questions are about it."""
    path = tmp_path / "answers.jsonl"
    questions = [Question(question_id="a.png", text=text, image="a.png") for text in ("one", "two", "one")]
    expected = ["answer to one", "answer to two", "answer to one"]
    assert answer(Model(), path, questions) == expected
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == expected
    model = Model()
    assert answer(model, path, questions) == expected
    assert model.batch_sizes == []


def test_blind_question_differs_by_the_image_alone(tmp_path):
    seeing = question_messages(QUESTIONS[1], tmp_path)[0]["content"]
    blind = question_messages(QUESTIONS[1], tmp_path, blind=True)[0]["content"]
    assert seeing[0] == {"type": "image", "image": str(tmp_path / "1.png")}
    assert seeing[1:] == blind


def test_missing_images_are_found_before_the_model_is_asked(tmp_path):
    (tmp_path / "0.png").touch()
    with pytest.raises(UserError, match=r"4 images of the question file are missing, the first one .*1\.png"):
        check_images(QUESTIONS, tmp_path)


def test_fingerprint_follows_the_weights(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    before = model_fingerprint(tmp_path)
    assert model_fingerprint(tmp_path) == before
    (tmp_path / "answers.jsonl").write_text("no part of the model")
    assert model_fingerprint(tmp_path) == before
    os.utime(weights, ns=(1, 1))
    assert model_fingerprint(tmp_path) != before


def test_answer_file_with_a_broken_line_names_the_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": 1, "text": "yes"}\n{"question_id": 2}\n')
    with pytest.raises(UserError, match="line 2: expected a JSON object"):
        read_answers(path)
