"""What answers without looking can reach, per category: the yardsticks beside a model's accuracy."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from playground.spatial_scenes.questions import Question


def chance_per_category(train: Sequence[Question], held_out: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Accuracy on `held_out` of two blind strategies, per category and "overall".

    Returns:
        category -> {"constant": the most frequent training answer of each question template,
                     "uniform": a random pick among the training answers of that template}
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        answers[question.template][question.answer] += 1
    # Ties go to the alphabetically first answer, so that the figure does not depend on the order of the questions.
    constant = {
        template: min(counts, key=lambda answer: (-counts[answer], answer)) for template, counts in answers.items()
    }

    hits: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for question in held_out:
        known = answers.get(question.template, Counter())
        hit = float(constant.get(question.template) == question.answer)
        guess = 1 / len(known) if question.answer in known else 0.0
        for category in (question.category, "overall"):
            hits[category].append((hit, guess))
    return {
        category: {"constant": _mean([hit for hit, _ in pairs]), "uniform": _mean([guess for _, guess in pairs])}
        for category, pairs in sorted(hits.items())
    }


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)
