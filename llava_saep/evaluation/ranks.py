"""Several ranks answer one file of questions: they agree on who answers what, and meet again when all have finished.

In between no rank waits for another, and every answer is on the disk at once: one that dies loses a batch.
"""

from __future__ import annotations

import datetime
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from llava_saep.errors import UserError
from llava_saep.program import EXIT_CALLERS_MISTAKE

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_WAITING = datetime.timedelta(days=2)
"""How long a rank waits for the slowest one. A rank that dies is noticed at once, by its closed connection."""
_GRACE_SECONDS = 3.0


class RankError(UserError):
    """A mistake that one rank met alone, such as a damaged image among its own questions."""


@contextmanager
def process_group() -> Iterator[None]:
    """Let ranks that a launcher started find each other; one process alone needs nothing.

    Raises:
        UserError: the environment names several ranks, and no place where they meet.
    """
    from llava_saep.train import distributed

    if distributed.world_size() == 1:
        yield
        return
    import torch

    if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise UserError(
            f"WORLD_SIZE is {distributed.world_size()}, but RANK, MASTER_ADDR or MASTER_PORT is not set; start several "
            "processes with torchrun or deepspeed, or unset WORLD_SIZE"
        )
    # Lists of positions and file names are all that is exchanged, so gloo serves on GPUs as well.
    torch.distributed.init_process_group("gloo", timeout=MAX_WAITING)
    try:
        yield
    finally:
        distributed.leave_process_group()


def from_rank_zero(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank.

    Raises:
        UserError: on rank 0, as `make`; the other ranks end with the same exit code and say nothing.
    """
    from llava_saep.train import distributed

    if not distributed.is_rank_zero():
        succeeded, value = distributed.broadcast_object((False, None))
        if not succeeded:
            raise SystemExit(EXIT_CALLERS_MISTAKE)
        return value
    try:
        value = make()
    except UserError:
        distributed.broadcast_object((False, None))
        raise
    return distributed.broadcast_object((True, value))[1]


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank, once all are there.

    Raises:
        RankError: another rank has ended.
    """
    from llava_saep.train import distributed

    try:
        return distributed.gather_objects(value)
    except RuntimeError as error:
        raise RankError(
            "another rank has ended before its questions were answered. Every answer so far is kept: give the same "
            f"command again, on any number of ranks ({str(error).splitlines()[0]})"
        ) from error


def device_of_rank(device: str | None) -> str | None:
    """The device to use: as asked, but the GPU of this rank where several share a machine and none is numbered."""
    import torch

    from llava_saep.train import distributed

    if device in (None, "cuda") and distributed.world_size() > 1 and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return device


def let_others_speak() -> None:
    """Stay for a moment: the launcher ends all ranks as soon as one has failed, also the one that says why."""
    time.sleep(_GRACE_SECONDS)
