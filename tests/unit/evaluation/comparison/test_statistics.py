"""Intervals and tests against scipy, hand computations and simulations."""

import math

import numpy as np
import pytest

from llava_saep.evaluation.comparison.statistics import (
    Interval,
    accuracy_interval,
    mcnemar_p_value,
    mean_over_seeds,
    paired_bootstrap,
    student_t_quantile,
)


@pytest.mark.parametrize(("dof", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (30, 2.04227)])
def test_students_quantiles_are_those_of_the_printed_tables(dof, quantile):
    assert student_t_quantile(dof) == pytest.approx(quantile, rel=1e-5)


@pytest.mark.parametrize("dof", [*range(1, 12), 57, 200])
@pytest.mark.parametrize("probability", [0.9, 0.975, 0.999])
def test_students_quantiles_are_scipys(dof, probability):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.t.ppf(probability, dof)
    assert student_t_quantile(dof, probability) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("dof", "probability"), [(0, 0.975), (2, 0.5), (2, 1.0)])
def test_impossible_quantiles_are_refused(dof, probability):
    with pytest.raises(ValueError, match="dof >= 1"):
        student_t_quantile(dof, probability)


def test_mean_over_three_seeds_by_hand():
    interval = mean_over_seeds([0.90, 0.94, 0.98])
    half_width = 4.30265 * 0.04 / math.sqrt(3)  # the standard deviation is 0.04
    assert interval.value == pytest.approx(0.94)
    assert (interval.low, interval.high) == pytest.approx((0.94 - half_width, 0.94 + half_width), rel=1e-5)


def test_one_value_has_no_spread():
    assert mean_over_seeds([0.7]).low is None and mean_over_seeds([0.7]).high is None


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [0.1 + 0.2, 0.3, 0.3]])
def test_seeds_that_score_alike_claim_no_certainty(values):
    interval = mean_over_seeds(values)
    assert (interval.value, interval.low, interval.high) == (pytest.approx(values[0]), None, None)


def test_accuracy_of_seeds_that_are_all_right_has_no_bounds():
    assert accuracy_interval([50, 50, 50], 50) == Interval(1.0)


def test_interval_of_the_mean_holds_the_truth_95_times_in_100():
    """5,000 experiments of three seeds: a share of 0.95 has a standard error of 0.3 points."""
    rng = np.random.default_rng(0)
    samples = rng.normal(0.5, 0.1, size=(5000, 3))
    intervals = [mean_over_seeds(sample.tolist()) for sample in samples]
    held = np.mean([interval.low <= 0.5 <= interval.high for interval in intervals])
    assert held == pytest.approx(0.95, abs=0.01)


def test_accuracy_of_one_run_has_wilsons_interval():
    stats = pytest.importorskip("scipy.stats")
    interval = accuracy_interval([45], 50)
    expected = stats.binomtest(45, 50).proportion_ci(method="wilson")
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_accuracy_over_seeds_stays_a_share():
    interval = accuracy_interval([50, 50, 44], 50)
    assert interval.value == pytest.approx(0.96)
    assert interval.high == 1.0 and 0 < interval.low < 0.96
    assert accuracy_interval([0, 0, 1], 50).low == 0.0


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 3), (10, 2), (1, 30), (0, 5), (700, 900)])
def test_mcnemars_p_value_is_the_exact_sign_test(first, second):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar_p_value(first, second) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_survives_counts_whose_power_of_two_is_no_float():
    assert 0 < mcnemar_p_value(1000, 1400) < 1e-10


def pairs_of_images(rng, num_images, questions_per_image, share):
    """The answers about one image are all right or all wrong together: as hard a case as there is."""
    right = rng.random(num_images) < share
    return np.repeat(right, questions_per_image)[None, :], np.repeat(np.arange(num_images), questions_per_image)


def test_bootstrap_over_images_equals_that_of_single_answers_where_each_image_has_one():
    """Without groups a difference of shares has the standard error of its mean."""
    rng = np.random.default_rng(1)
    correct, reference = rng.random((1, 400)) < 0.8, rng.random((1, 400)) < 0.6
    difference = correct.astype(float) - reference.astype(float)
    half_width = 1.96 * difference.std() / math.sqrt(400)
    low, high = paired_bootstrap(correct, reference, range(400))
    assert (low, high) == pytest.approx((difference.mean() - half_width, difference.mean() + half_width), abs=0.006)


def test_bootstrap_knows_that_answers_about_one_image_go_together():
    """Eight equal answers per image carry as much as one: the interval is as wide as that of 100 questions."""
    rng = np.random.default_rng(2)
    correct, groups = pairs_of_images(rng, 100, 8, 0.7)
    reference = np.zeros_like(correct)
    low, high = paired_bootstrap(correct, reference, groups)
    share = correct.mean()
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / 100), rel=0.08)


def test_bootstrap_is_of_shares_where_images_have_unequal_numbers_of_questions():
    """Whatever is drawn, one side is right everywhere and the other nowhere."""
    right = np.ones((1, 6), dtype=bool)
    assert paired_bootstrap(right, ~right, [0, 1, 1, 2, 3, 4]) == (1.0, 1.0)


def test_bootstrap_of_equal_answers_is_nothing_and_repeats_itself():
    correct, groups = np.array([[True, False, True, True, True, False]]), [0, 0, 1, 2, 3, 4]
    assert paired_bootstrap(correct, correct, groups) == (0.0, 0.0)
    other = np.array([[False, False, True, False, True, True]])
    assert paired_bootstrap(correct, other, groups) == paired_bootstrap(correct, other, groups)


def test_bootstrap_over_a_few_images_covers_nearly_as_often_as_it_says():
    """Plain percentiles cover 83 % for five images. A share of 400 tries has a standard error of 1.3 points."""
    rng = np.random.default_rng(3)
    groups, num_covered, num_tries = np.repeat(np.arange(5), 8), 0, 400
    for _ in range(num_tries):
        shares = rng.random(5)  # images are easy or hard for both sides alike: the difference is 0.1 on average
        first, second = (rng.random((5, 8)) < share[:, None] for share in (0.1 + 0.9 * shares, 0.9 * shares))
        low, high = paired_bootstrap(first.reshape(1, -1), second.reshape(1, -1), groups)
        num_covered += low <= 0.1 <= high
    assert num_covered / num_tries > 0.9


def test_bootstrap_over_fewer_images_says_nothing():
    right = np.array([[True, False, True, True]])
    assert paired_bootstrap(right, ~right, [0, 1, 2, 3]) is None
    right = np.append(right, [[True]], axis=1)
    assert paired_bootstrap(right, ~right, [0, 1, 2, 3, 4]) is not None
