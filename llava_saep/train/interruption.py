"""Stopping with nothing lost: a signal, or the end of the launcher, ends a run with a checkpoint of its current step.

Signals are read by a thread. Python runs a signal's handler in the main thread alone, which may be waiting for a rank
that is gone; without the thread such a rank would sit out the launcher's patience. The same thread notices when the
launcher has disappeared, since ranks whose launcher was killed would train on with nobody to stop them.
"""

from __future__ import annotations

import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

STOPPED_EXIT_CODE = 143
"""128 + SIGTERM: what a rank ends with when it was told to stop; giving the same command again goes on."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ORPHAN_SECONDS = 30.0
"""How long a rank without a launcher may take to reach the end of its step and save; as the launcher allows it."""

_POLL_SECONDS = 0.5
_LAUNCHERS = frozenset(
    (
        *("deepspeed", "torchrun", "llava-saep"),
        *("deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run", "llava_saep.cli"),
    )
)
"""Programs and modules that start ranks. A shell is none: a run goes on when its terminal is closed (nohup)."""


# The launcher and the other ranks


def _is_launcher(process: psutil.Process) -> bool:
    """Whether a process was started as `deepspeed ...` or `python -m deepspeed.launcher.launch ...` or the like."""
    try:
        words = process.cmdline()[:5]
    except psutil.Error:
        return False
    return any(word in _LAUNCHERS or Path(word).name in _LAUNCHERS for word in words)


def find_launchers(pid: int) -> list[int]:
    """Processes above `pid` that started it as a rank, the nearest first: `launch` and, above it, `deepspeed`."""
    launchers = []
    for parent in psutil.Process(pid).parents():
        if not _is_launcher(parent):
            break
        launchers.append(parent.pid)
    return launchers


def has_lost_parent(pid: int, parent: int) -> bool:
    """Whether a process is gone, or is no longer the child of the one that started it."""
    try:
        return psutil.Process(pid).ppid() != parent
    except psutil.Error:
        return True


def count_ranks(launcher: int) -> int:
    """How many processes that a launcher started are running."""
    try:
        children = psutil.Process(launcher).children()
    except psutil.Error:
        return 0
    return sum(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def num_local_ranks() -> int:
    """How many ranks were started on this machine, by what the launchers set; 1 without one."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))


# This rank


class StopWatch:
    """Notices that this rank is to stop. Enter it early in the main thread; a `Trainer` callback asks it at each step.

    Before `accept_signals` there is nothing to save: signals have their default effect, and a rank whose launcher is
    gone ends at once.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why this rank is to stop, None as long as it is not."""
        self._launchers: list[int] = []
        self._is_training = False
        self._deadline = float("inf")
        self._previous: dict[int, Any] = {}
        self._read_end, self._write_end = -1, -1
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StopWatch:
        self._launchers = find_launchers(os.getpid())
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._thread = threading.Thread(target=self._watch, name="stop-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous:
            signal.set_wakeup_fd(-1)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        os.write(self._write_end, b"\0")  # no signal has this number: the thread ends
        self._thread.join()
        os.close(self._read_end)
        os.close(self._write_end)

    def accept_signals(self) -> None:
        """Let SIGTERM and SIGUSR1 ask for a stop at the end of the step from now on.

        Elsewhere than in the main thread, where Python allows no handlers, they keep their effect.
        """
        self._is_training = True
        if threading.current_thread() is not threading.main_thread():
            return
        # The watching thread, which is older, receives them. Data loader workers inherit this at birth: one that is
        # just starting, before it can shield itself, would die of the signal and take the rank with it.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, lambda *_: None)  # the wakeup descriptor has the number

    def end(self) -> None:
        """What was asked for is done: other ranks may end now."""
        self._is_training = False
        self._launchers = []

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self._read_end], [], [], _POLL_SECONDS)
            numbers = os.read(self._read_end, 64) if ready else b""
            if 0 in numbers:
                return
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._ask_to_stop(signal.Signals(number).name)
            self._look_at_launchers()
            if time.monotonic() > self._deadline:
                _exit(f"no end of the step within {ORPHAN_SECONDS:.0f} s after the launcher was gone")

    def _look_at_launchers(self) -> None:
        launchers = self._launchers
        if not launchers:
            return
        is_orphan = os.getppid() != launchers[0]
        if is_orphan or any(has_lost_parent(*pair) for pair in zip(launchers, launchers[1:], strict=False)):
            if not self._is_training:
                _exit("the launcher is gone, and training has not begun")
            self._ask_to_stop("the end of its launcher")
        if is_orphan:
            self._deadline = min(self._deadline, time.monotonic() + ORPHAN_SECONDS)
        elif self.reason is not None and count_ranks(launchers[0]) < num_local_ranks():
            # The launcher ends the ranks that are left: they can save nothing without the one that failed.
            _exit("another rank has failed")

    def _ask_to_stop(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason


def _exit(reason: str) -> None:
    """End this process from a thread, whatever the main thread waits for."""
    print(f"rank {os.environ.get('RANK', '0')} ends: {reason}", file=sys.stderr, flush=True)
    os._exit(STOPPED_EXIT_CODE)


# Data loader workers


def _end_with_parent_alone() -> None:
    """In a worker: follow SIGTERM from the parent, and no one else's.

    A launcher, or Slurm, sends SIGTERM to all processes of a job. A worker that obeyed would take the rank with it,
    which still needs batches to finish its step.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, name="sigterm", daemon=True).start()


def _start_worker(worker_init: Callable[[int], None] | None, worker_id: int) -> None:
    _end_with_parent_alone()
    if worker_init is not None:
        worker_init(worker_id)


def shielded(worker_init: Callable[[int], None] | None) -> Callable[[int], None]:
    """A DataLoader's `worker_init_fn` that does the same in a worker that outlives signals to the whole job."""
    return functools.partial(_start_worker, worker_init)
