"""A loss that is no finite number: noticed on all ranks together, before anything is applied.

A single such loss makes every weight NaN, and the next checkpoint with them. So each micro-batch's loss is looked at
before the backward pass, and ranks agree on what to do: one that stopped alone would leave the others waiting.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from llava_saep.errors import UserError
from llava_saep.train import distributed

logger = logging.getLogger(__name__)

OnNanLoss = Literal["stop", "skip"]

MAX_SKIPPED_IN_A_ROW = 10
"""So many steps that are left out one after the other mean a model that is broken, not a bad sample."""

_MAX_NAMED = 4
"""Samples of a rank that a message names."""


class NonFiniteLossError(UserError):
    """A loss or gradient was NaN or infinite; every rank raises it at the same point."""


class MicroBatchLeftOut(Exception):
    """This micro-batch shall not be learnt from; every rank raises it at the same point."""


class LossGuard:
    """Watches the losses of a run.

    Args:
        policy: "stop" ends the run, "skip" leaves the micro-batch out, of all ranks.
        describe: names samples by their indices.
        device: on which ranks compare what they found.
    """

    def __init__(self, policy: OnNanLoss, describe: Callable[[int], str], device: torch.device) -> None:
        self.policy = policy
        self.num_skipped = 0
        """Micro-batches that were left out so far."""
        self._describe = describe
        self._device = device
        self._last_skipped_step = -1
        self._num_in_a_row = 0

    def check_loss(self, loss: Tensor, indices: Tensor, step: int) -> None:
        """Look at the loss of a micro-batch; every rank must.

        Args:
            loss: a single number.
            indices: (samples,), this rank's in the micro-batch.
            step: the optimizer step that it belongs to, counted from 1.
        Raises:
            NonFiniteLossError: it is no finite number on some rank, and the policy is "stop", or says "skip" too often.
            MicroBatchLeftOut: so it is, and the policy is "skip".
        """
        # Asked for on the device, so that it is waited for once.
        if not distributed.is_true_anywhere(~torch.isfinite(loss), self._device):
            return
        value, finding = loss.item(), None
        if not math.isfinite(value):
            finding = f"{value} on rank {distributed.rank()} ({self._name(indices.tolist())})"
        found = [finding for finding in distributed.gather_objects(finding) if finding is not None]
        problem = f"step {step}: the loss is {'; '.join(found)}"
        if self.policy == "stop":
            raise NonFiniteLossError(
                f"{problem}. Nothing of this step was applied. Look at these samples, lower --learning_rate, or leave "
                "such steps out with --on_nan_loss skip"
            )
        self._count(step, problem)
        raise MicroBatchLeftOut

    def check_gradient(self, norm: float | Tensor | None, step: int) -> None:
        """Look at the norm of the whole gradient, before anything of this step is saved.

        Raises:
            NonFiniteLossError: it is no finite number; DeepSpeed writes -1 for that.
        """
        value = 0.0 if norm is None else float(norm)
        if math.isfinite(value) and value >= 0:
            return
        raise NonFiniteLossError(
            f"step {step}: the gradient is not finite, though the loss is. Nothing of this step was saved; lower "
            "--learning_rate, or train with --bf16 False to see whether it is a matter of precision"
        )

    def _name(self, indices: Sequence[int]) -> str:
        named = [self._describe(index) for index in indices[:_MAX_NAMED]]
        if len(indices) > _MAX_NAMED:
            named.append(f"{len(indices) - _MAX_NAMED} more")
        return "; ".join(named)

    def _count(self, step: int, problem: str) -> None:
        self.num_skipped += 1
        is_next = step <= self._last_skipped_step + 1
        if step != self._last_skipped_step:
            self._num_in_a_row = self._num_in_a_row + 1 if is_next else 1
        self._last_skipped_step = step
        logger.warning("%s. It is left out (%d so far)", problem, self.num_skipped)
        if self._num_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteLossError(
                f"{problem}. {MAX_SKIPPED_IN_A_ROW} steps in a row had such a loss, so it is not the data: go on from "
                "an earlier checkpoint with a lower --learning_rate"
            )
