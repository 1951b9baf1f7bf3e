"""Times: their order, their sums against numpy, and what is between the two looks at the clock."""

import numpy as np
import pytest
import torch

from llava_saep.bench import timing
from llava_saep.bench.timing import Timing, interleaved, timed


def test_every_round_holds_every_projector_once_in_the_same_order():
    assert list(interleaved(["a", "b"], 3)) == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b")]


@pytest.mark.parametrize("seconds", [(1.0, 2.0), (5.0, 1.0, 2.0, 4.0), (1.0, 9.0, 2.0, 2.5, 3.0)])
def test_median_and_quartiles_are_numpys(seconds):
    result = Timing(seconds)
    first, third = np.percentile(seconds, [25, 75])
    assert result.median == np.median(seconds)
    assert result.quartiles == pytest.approx((first, third))
    assert result.spread == pytest.approx((third - first) / 2 / np.median(seconds))


def test_one_repeat_has_no_spread():
    assert (Timing((3.0,)).median, Timing((3.0,)).quartiles, Timing((3.0,)).spread) == (3.0, (3.0, 3.0), None)


def test_nothing_is_known_before_the_first_repeat():
    assert (Timing().median, Timing().quartiles, Timing().spread) == (None, None, None)
    assert Timing().with_repeat(2.0).with_repeat(1.0).seconds == (2.0, 1.0)


def test_time_runs_from_an_idle_device_to_an_idle_device(monkeypatch):
    now, events = [10.0], []

    def synchronize(device):
        events.append("synchronize")
        now[0] += 0.5

    def run():
        events.append("run")
        now[0] += 2.0

    monkeypatch.setattr(timing, "synchronize", synchronize)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    # The first wait, for what came before, is not in the time; the last, for the run itself, is.
    assert timed(run, torch.device("cpu")) == 2.5
    assert events == ["synchronize", "run", "synchronize"]
