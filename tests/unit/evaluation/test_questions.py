"""Question files: what is read, and what each mistake in one says."""

import json

import pytest

from llava_saep.errors import UserError
from llava_saep.evaluation.questions import Question, read_questions


def write(path, *lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n", encoding="utf-8"
    )
    return path


def test_llava_question_file_is_read_in_order(tmp_path):
    path = write(
        tmp_path / "q.jsonl",
        {"question_id": 7, "image": "a.png", "text": "What?", "category": "default"},
        {"question_id": "b", "text": "Is 3 left of 4?", "category": "relation", "answer": "yes", "reference": "so yes"},
    )
    assert read_questions(path) == [
        Question(question_id=7, text="What?", image="a.png", category="default"),
        Question(question_id="b", text="Is 3 left of 4?", category="relation", answer="yes", reference="so yes"),
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{not json"], "line 1: is not JSON"),
        (['{"text": "x", "question_id": ' + "1" * 5000 + "}"], "line 1: is not JSON"),
        (["[" * 100_000], "line 1: is not JSON"),
        (["[1]"], "line 1: expected a JSON object"),
        ([{"text": "x"}], "question_id must be a string or an integer, found None"),
        ([{"question_id": True, "text": "x"}], "question_id must be"),
        ([{"question_id": 1}], "text must be a text that is not empty, found None"),
        ([{"question_id": 1, "text": "x", "answer": " "}], "answer must be a text that is not empty"),
        ([{"question_id": 1, "text": "x", "answer": "?"}], "line 1: answer '\\?' holds no word to compare with"),
        ([{"question_id": 1, "text": "x"}, {"question_id": 1, "text": "y"}], "question_id 1 occurs twice"),
        ([{"question_id": 7, "text": "x"}, {"question_id": "7", "text": "y"}], "question_id '7' occurs twice"),
        ([""], "holds no questions"),
    ],
)
def test_each_mistake_names_its_place(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_questions(write(tmp_path / "q.jsonl", *lines))


def test_line_separators_inside_of_texts_are_no_ends_of_lines(tmp_path):
    path = tmp_path / "q.jsonl"
    line = json.dumps({"question_id": 1, "text": "a\u2028b\x85c"}, ensure_ascii=False)
    # With a byte order mark and Windows' line ends, as its editors save.
    path.write_bytes(f"\ufeff{line}\r\n".encode())
    assert read_questions(path) == [Question(question_id=1, text="a\u2028b\x85c")]


def test_categories_may_be_numbers(tmp_path):
    """LLaVA reads no category, so files made for it may hold anything there."""
    (question,) = read_questions(write(tmp_path / "q.jsonl", {"question_id": 1, "text": "x", "category": 3}))
    assert question.category == "3"


def test_absent_file_is_the_callers_mistake(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jsonl: no such file"):
        read_questions(tmp_path / "absent.jsonl")
