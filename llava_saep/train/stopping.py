"""Ending the loop on every rank after the same step, with a checkpoint, when one of them was told to stop."""

from __future__ import annotations

import logging

import torch
from transformers import TrainerCallback

from llava_saep.train import distributed
from llava_saep.train.interruption import StopWatch

logger = logging.getLogger(__name__)


class RunStopped(Exception):
    """The run was told to stop, and has."""


class StopCallback(TrainerCallback):
    """Ends training after the step in which any rank was told to stop, with a checkpoint.

    Args:
        watch: this rank's.
        device: where the ranks' flags are compared; an accelerator's process group takes no others.
    """

    def __init__(self, watch: StopWatch, device: torch.device) -> None:
        self.watch = watch
        self.device = device
        self.has_stopped = False

    def on_step_end(self, args, state, control, **kwargs):
        """Agree with the other ranks; after the last step there is nothing left to stop."""
        if (
            distributed.is_true_anywhere(self.watch.reason is not None, self.device)
            and state.global_step < state.max_steps
        ):
            self.has_stopped = control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # whoever sent the signal may not wait for so long

    def on_save(self, args, state, control, **kwargs):
        """Say what was done, before the launcher ends this process."""
        if self.has_stopped:
            self.watch.end()
            logger.warning(
                "stopped after step %d of %d because of %s; the checkpoint is complete, and the same command goes on "
                "from it",
                state.global_step,
                state.max_steps,
                self.watch.reason or "another rank's signal",
            )
