"""Scoring of freely generated answers: pure functions of words and counts."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llava_saep.evaluation.questions import Question
from llava_saep.evaluation.words import normalized_words

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal distribution."""


def ends_with_answer(generated: str, answer: str) -> bool:
    """Whether the last words of a generated text are the words of the answer.

    Raises:
        ValueError: the answer holds no word, so that every text would end with it.
    """
    expected = normalized_words(answer)
    if not expected:
        raise ValueError(f"the answer {answer!r} holds no word to compare with")
    return normalized_words(generated)[-len(expected) :] == expected


def wilson_interval(num_correct: int, num_questions: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (E. B. Wilson, 1927); unlike the normal one it is sound near 0 and 1.

    Returns:
        (lower, upper), both in [0, 1].
    Raises:
        ValueError: no questions, or more correct answers than questions.
    """
    if num_questions < 1 or not 0 <= num_correct <= num_questions:
        raise ValueError(f"{num_correct} of {num_questions} is no proportion")
    share = num_correct / num_questions
    shrink = 1 + z * z / num_questions
    center = (share + z * z / (2 * num_questions)) / shrink
    half_width = z / shrink * math.sqrt(share * (1 - share) / num_questions + z * z / (4 * num_questions**2))
    return max(0.0, center - half_width), min(1.0, center + half_width)


def chance_accuracy(questions: Sequence[Question]) -> float:
    """Accuracy, in [0, 1], of giving each category's most frequent answer to all of its questions."""
    by_category: dict[str, Counter[tuple[str, ...]]] = {}
    for question in questions:
        by_category.setdefault(question.category, Counter())[tuple(normalized_words(question.answer or ""))] += 1
    return sum(answers.most_common(1)[0][1] for answers in by_category.values()) / len(questions)


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many questions of one category were answered rightly, and what guessing would reach (`chance`, in [0, 1])."""

    category: str
    num_questions: int
    num_correct: int
    chance: float

    @property
    def accuracy(self) -> float:
        """Share of right answers, in [0, 1]."""
        return self.num_correct / self.num_questions

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return wilson_interval(self.num_correct, self.num_questions)


OVERALL = "overall"
"""Name of the row that takes all questions together."""


def score_answers(
    questions: Iterable[Question], answers: Mapping[str | int, str], chance: Mapping[str, float] | None = None
) -> list[Score]:
    """Score generated answers against the final words that are expected, per category and together.

    Args:
        questions: those without an `answer` are left out.
        answers: generated text by question_id.
        chance: what guessing reaches per category, in [0, 1], where it is known better than `chance_accuracy` can tell.
    Returns:
        One score per category, in order of first appearance, and a last one named "overall"; empty when no question
        can be scored.
    Raises:
        ValueError: a question that can be scored has no generated answer.
    """
    scored = [question for question in questions if question.answer is not None]
    missing = [question.question_id for question in scored if question.question_id not in answers]
    if missing:
        raise ValueError(f"{len(missing)} of {len(scored)} questions have no answer, the first one {missing[0]!r}")
    if not scored:
        return []
    categories = list(dict.fromkeys(question.category for question in scored))
    scores = [_score(name, [q for q in scored if q.category == name], answers, chance or {}) for name in categories]
    return [*scores, _score(OVERALL, scored, answers, chance or {})]


def _score(
    category: str, questions: Sequence[Question], answers: Mapping[str | int, str], chance: Mapping[str, float]
) -> Score:
    return Score(
        category=category,
        num_questions=len(questions),
        num_correct=sum(ends_with_answer(answers[q.question_id], q.answer or "") for q in questions),
        chance=chance[category] if category in chance else chance_accuracy(questions),
    )
