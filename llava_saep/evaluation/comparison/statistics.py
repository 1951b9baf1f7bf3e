"""How sure a difference is: intervals over seeds, and paired intervals over questions. Pure functions of numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

from llava_saep.evaluation.metrics import wilson_interval

NUM_BOOTSTRAP_SAMPLES = 4000
FEWEST_IMAGES = 5
"""With fewer the images that can be drawn differ too little for any interval of them to cover 95 %."""
_LARGEST_QUANTILE = 1e4
_ALIKE = 1e-9
"""Shares that differ by less are equal but for rounding: of any number of questions asked here, one counts more."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; both bounds None where the observations tell nothing about spread."""

    value: float
    low: float | None = None
    high: float | None = None


@cache
def student_t_quantile(dof: int, probability: float = 0.975) -> float:
    """Quantile of Student's t with a whole number of degrees of freedom, for a probability above a half.

    Raises:
        ValueError: fewer than one degree of freedom, or a probability outside (0.5, 1).
    """
    if dof < 1 or not 0.5 < probability < 1:
        raise ValueError(f"expected dof >= 1 and 0.5 < probability < 1, got {dof} and {probability}")
    low, high = 0.0, _LARGEST_QUANTILE
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inner_mass(middle, dof) < 2 * probability - 1 else (low, middle)
    return (low + high) / 2


def _t_inner_mass(t: float, dof: int) -> float:
    """Probability of [-t, t]: the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(dof))
    cosine, sine = math.cos(angle), math.sin(angle)
    if dof % 2 == 0:
        term = total = 1.0
        for k in range(1, dof // 2):
            term *= (2 * k - 1) / (2 * k) * cosine**2
            total += term
        return sine * total
    term = total = cosine if dof > 1 else 0.0
    for k in range(1, (dof - 1) // 2):
        term *= 2 * k / (2 * k + 1) * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total)


def mean_over_seeds(values: Sequence[float]) -> Interval:
    """Mean with the 95 % interval of Student's t; without bounds for one value, or where all are alike.

    The interval says how much the mean over other seeds would vary, with these very questions. A few seeds that score
    alike do not say that all others would too, which an interval of no width would claim.
    """
    mean = sum(values) / len(values)
    if max(values) - min(values) < _ALIKE:
        return Interval(mean)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half_width = student_t_quantile(len(values) - 1) * math.sqrt(variance / len(values))
    return Interval(mean, mean - half_width, mean + half_width)


def accuracy_interval(num_correct: Sequence[int], num_questions: int) -> Interval:
    """Accuracy over runs that were asked the same questions: `mean_over_seeds`, or Wilson's for a single run.

    Args:
        num_correct: of each run.
    Returns:
        shares, the bounds cut to [0, 1].
    """
    if len(num_correct) == 1:
        return Interval(num_correct[0] / num_questions, *wilson_interval(num_correct[0], num_questions))
    interval = mean_over_seeds([count / num_questions for count in num_correct])
    if interval.low is None or interval.high is None:
        return interval
    return Interval(interval.value, max(0.0, interval.low), min(1.0, interval.high))


def paired_bootstrap(
    correct: np.ndarray, reference: np.ndarray, groups: Sequence[int], *, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of a difference in accuracy when other images had been asked about; None for a few images.

    Whole images are drawn again, since the questions about one are answered rightly or wrongly together. Plain
    percentiles of what was drawn are too narrow for small numbers of images; these are expanded as in Hesterberg, "What
    Teachers Should Know About the Bootstrap" (2015), which covers 93 % for five images where plain ones cover 83 %.

    Args:
        correct, reference: (runs, questions) of 0 and 1; the same questions, and as many runs of each.
        groups: the image of each question, as a number.
    """
    difference = (correct.astype(float) - reference.astype(float)).mean(axis=0)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    num_groups = int(group.max()) + 1
    if num_groups < FEWEST_IMAGES:
        return None
    sums = np.bincount(group, weights=difference, minlength=num_groups)
    sizes = np.bincount(group, minlength=num_groups)
    weights = np.random.default_rng(seed).multinomial(
        num_groups, np.full(num_groups, 1 / num_groups), size=NUM_BOOTSTRAP_SAMPLES
    )
    tail = NormalDist().cdf(-math.sqrt(num_groups / (num_groups - 1)) * student_t_quantile(num_groups - 1))
    low, high = np.quantile((weights @ sums) / (weights @ sizes), [tail, 1 - tail])
    return float(low), float(high)


def mcnemar_p_value(num_only_first: int, num_only_second: int) -> float:
    """Exact two-sided McNemar test: how likely so unequal a split is when each disagreement is a fair coin's."""
    num_disagreements = num_only_first + num_only_second
    if not num_disagreements:
        return 1.0
    smaller = min(num_only_first, num_only_second)
    # In logarithms: 2**-n is zero to a float from n = 1,075 on.
    logs = [
        math.lgamma(num_disagreements + 1) - math.lgamma(k + 1) - math.lgamma(num_disagreements - k + 1)
        for k in range(smaller + 1)
    ]
    tail = sum(math.exp(log - num_disagreements * math.log(2)) for log in logs)
    return min(1.0, 2 * tail)
