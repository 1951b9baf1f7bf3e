"""Losses that are no numbers, on one rank."""

import logging
import math

import pytest
import torch

from llava_saep.train import loss_guard
from llava_saep.train.loss_guard import LossGuard, MicroBatchLeftOut, NonFiniteLossError


def guard(policy):
    return LossGuard(policy, lambda index: f"sample {index}", torch.device("cpu"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_loss_stops_and_names_its_samples(value):
    with pytest.raises(NonFiniteLossError, match=rf"step 7: the loss is {value} on rank 0 \(sample 3; sample 5\)"):
        guard("stop").check_loss(torch.tensor(value), torch.tensor([3, 5]), 7)
    with pytest.raises(NonFiniteLossError, match="sample 0; .*sample 3; 6 more"):
        guard("stop").check_loss(torch.tensor(value), torch.arange(10), 7)


def test_good_losses_pass():
    for policy in ("stop", "skip"):
        guard(policy).check_loss(torch.tensor(1e30), torch.tensor([0]), 1)


def test_bad_losses_are_left_out_until_too_many_come_in_a_row(caplog, monkeypatch):
    monkeypatch.setattr(loss_guard, "MAX_SKIPPED_IN_A_ROW", 3)
    watch = guard("skip")
    bad = torch.tensor(math.nan)
    with caplog.at_level(logging.WARNING):
        for step in (1, 1, 2, 4, 5):  # two micro-batches of step 1; step 3 is good
            with pytest.raises(MicroBatchLeftOut):
                watch.check_loss(bad, torch.tensor([step]), step)
    assert watch.num_skipped == 5
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"step {n}" for n in (1, 1, 2, 4, 5)]
    with pytest.raises(NonFiniteLossError, match="3 steps in a row"):
        watch.check_loss(bad, torch.tensor([6]), 6)


@pytest.mark.parametrize("norm", [math.nan, math.inf, torch.tensor(math.nan), -1.0])
def test_bad_gradient_stops(norm):
    """DeepSpeed reports a norm that is no number as -1."""
    with pytest.raises(NonFiniteLossError, match="step 2: the gradient is not finite"):
        guard("skip").check_gradient(norm, 2)
    guard("skip").check_gradient(None, 2)
    guard("skip").check_gradient(torch.tensor(0.5), 2)
