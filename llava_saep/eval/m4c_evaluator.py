"""LLaVA's module of this name: the answer processor of the VQA challenges, and scores over lists of predictions.

A prediction is {"pred_answer": text, "gt_answers": [texts]}. The caption metric is not here: it starts a Java program.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llava_saep.evaluation.tasks._vqa_answers import (
    lower_words,
    normalize_vqa_answer,
    normalize_words,
    remove_punctuation,
    vqa_score,
)

MIN_ANLS = 0.5
"""A likeness below this counts as none."""


class EvalAIAnswerProcessor:
    """Turns an answer into the form that is compared; each step also alone."""

    def word_tokenize(self, word: str) -> str:
        """Lower case, without commas and question marks."""
        return lower_words(word)

    def process_punctuation(self, in_text: str) -> str:
        """Marks out of the text, or spaces in their place."""
        return remove_punctuation(in_text)

    def process_digit_article(self, in_text: str) -> str:
        """Number words as digits, no articles, contractions with their apostrophes."""
        return normalize_words(in_text)

    def __call__(self, item: str) -> str:
        """All steps."""
        return normalize_vqa_answer(item)


class TextVQAAccuracyEvaluator:
    """Soft accuracy against ten human answers."""

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """Mean score, in [0, 1]."""
        return _mean([vqa_score(each["pred_answer"], each["gt_answers"], "prediction") for each in pred_list])


class STVQAAccuracyEvaluator:
    """Exact match with one of the answers, after normalisation."""

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """Mean score, in [0, 1]."""
        return _mean([float(_is_among(each["pred_answer"], each["gt_answers"])) for each in pred_list])


class STVQAANLSEvaluator:
    """Average normalised Levenshtein similarity to the nearest answer."""

    def get_anls(self, s1: str, s2: str) -> float:
        """Likeness of two texts in [0, 1]; 0 when it is below one half."""
        first, second = s1.lower().strip(), s2.lower().strip()
        longest = max(len(first), len(second))
        likeness = 1 - levenshtein_distance(first, second) / longest if longest else 1.0
        return likeness if likeness >= MIN_ANLS else 0.0

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """Mean score, in [0, 1]."""
        return _mean(
            [max(self.get_anls(each["pred_answer"], truth) for truth in each["gt_answers"]) for each in pred_list]
        )


def levenshtein_distance(first: str, second: str) -> int:
    """How many characters must be put in, taken out or exchanged to turn one text into the other."""
    distances = list(range(len(second) + 1))
    for row, character in enumerate(first, 1):
        previous, distances[0] = distances[0], row
        for column, other in enumerate(second, 1):
            change = previous + (character != other)
            previous, distances[column] = (
                distances[column],
                min(change, distances[column] + 1, distances[column - 1] + 1),
            )
    return distances[-1]


def _is_among(answer: str, truths: Sequence[str]) -> bool:
    return normalize_vqa_answer(answer) in [normalize_vqa_answer(truth) for truth in truths]


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)
