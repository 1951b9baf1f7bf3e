"""Scores against cases worked out by hand."""

import pytest

from llava_saep.evaluation.metrics import (
    chance_accuracy,
    ends_with_answer,
    normalized_words,
    score_answers,
    wilson_interval,
)
from llava_saep.evaluation.questions import Question


def question(question_id, answer, category="relation"):
    return Question(question_id=question_id, text="?", category=category, answer=answer)


@pytest.mark.parametrize(
    ("generated", "answer", "right"),
    [
        ("7 is top left , 3 is bottom right , yes", "yes", True),
        ("Yes.", "yes", True),
        ("yes , I think no", "yes", False),
        ("the 3 is at the top left", "top left", True),
        ("the 3 is at the bottom left", "top left", False),
        ("left", "top left", False),
        ("13", "3", False),
        ("", "yes", False),
        ("the Top-Left !", "top-left", True),
    ],
)
def test_only_the_final_words_count(generated, answer, right):
    assert ends_with_answer(generated, answer) is right


def test_punctuation_and_case_do_not_count():
    assert normalized_words("  Yes , it's the Top-Left (7)!") == ["yes", "it's", "the", "top-left", "7"]


def test_answer_without_a_word_is_refused_because_everything_would_match():
    with pytest.raises(ValueError, match="holds no word"):
        ends_with_answer("anything", " . ")


@pytest.mark.parametrize(
    ("num_correct", "num_questions", "expected"),
    [
        # z = 1.96: centre (0.5 + 0.019208) / 1.038416, half width 1.96 / 1.038416 * sqrt(0.0025 + 0.00009604)
        (50, 100, (0.40383, 0.59617)),
        # No success in ten: lower 0, upper z^2 / (n + z^2) = 3.84146 / 13.84146
        (0, 10, (0.0, 0.27753)),
        (10, 10, (0.72247, 1.0)),
    ],
)
def test_wilson_interval_equals_hand_computation(num_correct, num_questions, expected):
    assert wilson_interval(num_correct, num_questions) == pytest.approx(expected, abs=2e-5)


def test_interval_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(0, 0)


def test_chance_gives_each_category_its_most_frequent_answer():
    questions = [
        question(1, "yes"),
        question(2, "No"),
        question(3, "no."),
        question(4, "3", "count"),
        question(5, "4", "count"),
    ]
    assert chance_accuracy(questions) == pytest.approx((2 + 1) / 5)


def test_scores_per_category_and_together():
    questions = [
        question(1, "yes"),
        question(2, "no"),
        question(3, "4", "count"),
        Question(question_id=4, text="unscored"),
    ]
    scores = score_answers(questions, {1: "so yes", 2: "yes", 3: "4"})
    assert [(s.category, s.num_correct, s.num_questions) for s in scores] == [
        ("relation", 1, 2),
        ("count", 1, 1),
        ("overall", 2, 3),
    ]


def test_missing_answer_is_an_error_and_not_a_wrong_answer():
    with pytest.raises(ValueError, match="1 of 2 questions have no answer, the first one 2"):
        score_answers([question(1, "yes"), question(2, "no")], {1: "yes"})


def test_nothing_to_score_gives_no_scores():
    assert score_answers([Question(question_id=1, text="?")], {}) == []
