"""What the trainer is told at the end of the step in which a rank was asked to stop."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from llava_saep.train.stopping import StopCallback


def decide(reason, *, step):
    """What is due after a step of a run of ten that would evaluate now."""
    callback = StopCallback(SimpleNamespace(reason=reason), torch.device("cpu"))
    control = TrainerControl(should_evaluate=True)
    callback.on_step_end(None, TrainerState(global_step=step, max_steps=10), control)
    return control.should_save, control.should_training_stop, control.should_evaluate


def test_stop_saves_at_once_and_does_not_evaluate_first():
    """Whoever sent the signal waits for seconds; held-out records can take minutes."""
    assert decide("SIGTERM", step=4) == (True, True, False)


@pytest.mark.parametrize(("reason", "step"), [(None, 4), ("SIGTERM", 10)])
def test_without_a_signal_and_after_the_last_step_all_goes_on(reason, step):
    assert decide(reason, step=step) == (False, False, True)
