"""The training loop that both stand-ins share: AdamW, linear warm-up, cosine decay, a progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

_WARMUP_SHARE = 0.03
_FINAL_FACTOR = 0.02
_SMOOTHING = 0.98


def train_steps(
    parameters: Iterable[nn.Parameter],
    loss_of_step: Callable[[int], Tensor],
    *,
    num_steps: int,
    learning_rate: float,
    label: str,
    weight_decay: float = 0.01,
    report: Callable[[int], None] | None = None,
    report_every: int = 500,
) -> float:
    """Minimise `loss_of_step(step)`; returns the exponentially smoothed loss at the end.

    Args:
        report: called with the number of finished steps, every `report_every` steps.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    warmup = max(1, int(num_steps * _WARMUP_SHARE))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, warmup, num_steps))
    smoothed = 0.0
    progress = tqdm(range(num_steps), desc=label, unit="step", mininterval=5.0)
    for step in progress:
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        smoothed = loss.item() if step == 0 else _SMOOTHING * smoothed + (1 - _SMOOTHING) * loss.item()
        progress.set_postfix(loss=f"{smoothed:.3f}", refresh=False)
        if report is not None and (step + 1) % report_every == 0:
            report(step + 1)
    return smoothed


def _lr_factor(step: int, warmup: int, num_steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return _FINAL_FACTOR + (1 - _FINAL_FACTOR) * 0.5 * (1 + math.cos(math.pi * progress))
