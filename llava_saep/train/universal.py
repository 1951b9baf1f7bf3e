"""Going on with another number of ranks: DeepSpeed's shards become whole tensors, which any number of ranks can load.

The conversion is DeepSpeed's own (`ds_to_universal`). Its loader mixes up two things under ZeRO-3 (seen in 0.19.8),
which are put right after it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llava_saep.train.checkpointing import removing_what_fails

logger = logging.getLogger(__name__)


def convert(checkpoint: Path, output_dir: Path) -> Path:
    """Write the shards of a checkpoint as one tensor per parameter and state; the folder appears in one step.

    Frozen parameters are in neither. Call it on one rank. It needs about as much room on the disk as the shards, twice
    while it runs.

    Returns:
        the folder that DeepSpeed loads in place of the checkpoint, inside `output_dir`.
    Raises:
        SavingError: the disk is full.
    """
    from deepspeed.checkpoint import ds_to_universal

    target = output_dir / f".universal-{checkpoint.name}"
    partial = target.with_name(f"{target.name}.partial")
    for folder in (target, partial):
        shutil.rmtree(folder, ignore_errors=True)
    tag = (checkpoint / "latest").read_text().strip()
    logger.info("putting together the optimizer's shards of %s for another number of ranks", checkpoint)
    # One worker: others would be forked from a process that has threads and a process group.
    options = argparse.Namespace(
        input_folder=str(checkpoint / tag),
        output_folder=str(partial / tag),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with removing_what_fails(partial), contextlib.redirect_stdout(io.StringIO()):
        (partial / tag).mkdir(parents=True)
        ds_to_universal.main(options)
    os.replace(partial, target)
    return target


@contextmanager
def keeping_optimizer_apart(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Undo what loading under ZeRO-3 mixes up.

    DeepSpeed gives every group the first group's hyperparameters, and all parameters one and the same step counter,
    which then counts once for each of them. Hyperparameters follow from this run's flags; the learning rate is left to
    the schedule (`set_learning_rates`).
    """
    before = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, before, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def set_learning_rates(optimizer: torch.optim.Optimizer, learning_rates: Iterable[Any]) -> None:
    """Give each group the rate that its schedule has come to."""
    for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = learning_rate
