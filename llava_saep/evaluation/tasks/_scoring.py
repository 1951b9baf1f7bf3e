"""Numbers that several benchmarks report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from llava_saep.evaluation.metrics import Z_95, wilson_interval

from ._base import CategoryRow, Metric

K = TypeVar("K")
V = TypeVar("V")


def share_metric(name: str, num_correct: int, n: int) -> Metric:
    """A proportion of questions with Wilson's interval; undefined for no questions."""
    if n == 0:
        return Metric(name=name, value=None, n=0)
    return Metric(name=name, value=num_correct / n, n=n, interval=wilson_interval(num_correct, n))


def mean_metric(name: str, scores: Sequence[float]) -> Metric:
    """Mean of scores in [0, 1] with the normal interval of a mean; plain proportions get Wilson's."""
    if all(score in (0, 1) for score in scores):
        return share_metric(name, int(sum(scores)), len(scores))
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / max(1, len(scores) - 1)
    half_width = Z_95 * math.sqrt(variance / len(scores))
    return Metric(
        name=name, value=mean, n=len(scores), interval=(max(0.0, mean - half_width), min(1.0, mean + half_width))
    )


def grouped(keys: Iterable[K], values: Iterable[V]) -> dict[K, list[V]]:
    """Values by key, keys in order of first appearance."""
    groups: dict[K, list[V]] = {}
    for key, value in zip(keys, values, strict=True):
        groups.setdefault(key, []).append(value)
    return groups


def mean_rows(scores: Mapping[str, Sequence[float]], name: str = "accuracy") -> tuple[CategoryRow, ...]:
    """One row per category with the mean of its scores."""
    return tuple(
        CategoryRow(category=category, metrics=(mean_metric(name, values),)) for category, values in scores.items()
    )
