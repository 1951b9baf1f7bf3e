"""One trial: start a run, do something to it at a moment that chance has chosen, and give the same command again."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import psutil

from llava_saep.bench.faults.workload import NUM_STEPS_PER_SAVE, FaultyRun, training_flags
from llava_saep.train.checkpointing import MANIFEST_NAME, list_checkpoints, why_incomplete
from llava_saep.train.interruption import STOPPED_EXIT_CODE

Fault = Literal["rank", "launcher", "command", "signal", "save", "disk"]
FAULTS = get_args(Fault)
"""What can happen: kill -9 of a rank, of the deepspeed launcher, or of `llava-saep train`; SIGTERM to the latter; kill
-9 of a rank that is saving; no more room for a rank's files."""

RUN_TIMEOUT_SECONDS = 600
END_TIMEOUT_SECONDS = 60
"""How long all processes of a disturbed run may take to end."""
DISK_FULL_BYTES = 100_000
"""Larger files cannot be written on a full disk: less than any checkpoint's weights, more than what a run says."""
_POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Plan:
    """What happens, to whom and when.

    Args:
        after_step: the fault waits until the checkpoint of this step is begun,
        delay: and then for this share of the time between two checkpoints.
        rank: which one, where the fault is a rank's.
    """

    fault: Fault
    after_step: int
    delay: float
    rank: int


@dataclass(frozen=True)
class Outcome:
    """What became of a disturbed run.

    Args:
        exit_code: of `llava-saep train`.
        seconds_to_end: from the fault until no process of the run was left; None: some were, after a minute.
        damaged: checkpoints that have a manifest and do not fit it.
        resumed_from: step of the checkpoint that the second run went on from; None: it began anew.
        loss_difference: the largest from the losses of the run that nothing happened to; None: it did not end well.
        problems: what is not as it should be; empty for a good outcome.
    """

    plan: Plan
    exit_code: int
    seconds_to_end: float | None
    damaged: tuple[str, ...]
    resumed_from: int | None
    loss_difference: float | None
    problems: tuple[str, ...]


def draw_plans(num_trials: int, faults: Sequence[Fault], run: FaultyRun, seed: int) -> list[Plan]:
    """Draw trials: the faults take turns, the moments are random; the same for the same seed."""
    rng = random.Random(seed)
    # The last checkpoints are left out: a run that is over before the fault arrives is not disturbed.
    steps = range(NUM_STEPS_PER_SAVE, run.num_steps - 2 * NUM_STEPS_PER_SAVE + 1, NUM_STEPS_PER_SAVE)
    return [
        Plan(
            fault=faults[index % len(faults)],
            after_step=rng.choice(steps),
            delay=0.0 if faults[index % len(faults)] == "save" else rng.random(),
            rank=rng.randrange(run.num_processes),
        )
        for index in range(num_trials)
    ]


@dataclass(frozen=True)
class Undisturbed:
    """The run that nothing happens to: its losses, and the time between two of its checkpoints."""

    losses: tuple[float, ...]
    seconds_per_save: float


def command_of(run: FaultyRun, inputs: Path, output_dir: Path) -> list[str]:
    """The command line that starts a run, and that goes on with it."""
    return [sys.executable, "-m", "llava_saep.cli", "train", *training_flags(run, inputs, output_dir)]


@contextmanager
def started(command: Sequence[str], log_path: Path) -> Iterator[subprocess.Popen]:
    """A command whose output goes to a file; whatever is left of it in the end is killed."""
    with log_path.open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            for each in [*_descendants(process.pid), process]:
                each.kill()
            process.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def read_losses(output_dir: Path) -> tuple[float, ...]:
    """The logged losses of a run that has ended."""
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return tuple(entry["loss"] for entry in history if "loss" in entry)


def run_undisturbed(run: FaultyRun, inputs: Path, folder: Path) -> Undisturbed:
    """Train to the end.

    Raises:
        RuntimeError: the run failed, with the end of what it said.
    """
    output_dir, log_path = folder / "undisturbed", folder / "undisturbed.log"
    with started(command_of(run, inputs, output_dir), log_path) as process:
        first = _wait_for_checkpoint(process, output_dir, NUM_STEPS_PER_SAVE)
        last = _wait_for_checkpoint(process, output_dir, run.num_steps)
        if process.wait(RUN_TIMEOUT_SECONDS) != 0:
            raise RuntimeError(f"the undisturbed run failed:\n{log_path.read_text()[-3000:]}")
    num_intervals = run.num_steps // NUM_STEPS_PER_SAVE - 1
    return Undisturbed(read_losses(output_dir), (last - first) / num_intervals)


def _wait_for_checkpoint(process: subprocess.Popen, output_dir: Path, step: int) -> float:
    """Wait until a checkpoint's folder appears, and return the time; or until the process has ended."""
    folder = output_dir / f"checkpoint-{step}"
    deadline = time.monotonic() + RUN_TIMEOUT_SECONDS
    while not folder.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return time.monotonic()


# The fault


def _ranks_of(launcher: psutil.Process) -> list[psutil.Process]:
    """The launcher's children, in the order of ranks: it starts them one after another."""
    return sorted(launcher.children(), key=lambda process: (process.create_time(), process.pid))


def strike(plan: Plan, command: subprocess.Popen) -> None:
    """Do it.

    Raises:
        psutil.Error, ValueError: the run is over.
    """
    (launcher,) = psutil.Process(command.pid).children()
    rank = _ranks_of(launcher)[plan.rank]
    if plan.fault == "disk":
        rank.rlimit(resource.RLIMIT_FSIZE, (DISK_FULL_BYTES, DISK_FULL_BYTES))
    elif plan.fault == "signal":
        command.send_signal(signal.SIGTERM)
    elif plan.fault == "command":
        command.kill()
    else:
        {"launcher": launcher, "rank": rank, "save": rank}[plan.fault].kill()


def _end_of(command: subprocess.Popen, processes: Sequence[psutil.Process]) -> tuple[int, float | None]:
    """Wait until a command and all processes below it have ended.

    Returns:
        its exit code, as a shell reports it, and the seconds that it took; None where some are left.
    """
    began = time.monotonic()
    try:
        command.wait(END_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        command.kill()
    code = command.wait()
    _, alive = psutil.wait_procs(processes, timeout=max(0.0, began + END_TIMEOUT_SECONDS - time.monotonic()))
    seconds = None if alive else time.monotonic() - began
    for process in alive:
        process.kill()
    return 128 - code if code < 0 else code, seconds


def run_trial(plan: Plan, run: FaultyRun, inputs: Path, folder: Path, name: str, undisturbed: Undisturbed) -> Outcome:
    """Disturb a run, and go on with it."""
    output_dir, log_path = folder / name, folder / f"{name}.log"
    command = command_of(run, inputs, output_dir)
    with started(command, log_path) as process:
        _wait_for_checkpoint(process, output_dir, plan.after_step)
        time.sleep(plan.delay * undisturbed.seconds_per_save)
        processes = _descendants(process.pid)
        try:
            strike(plan, process)
        except (psutil.Error, ValueError):
            problem = f"the run was over before the fault; see {log_path}"
            return Outcome(plan, process.wait(), None, (), None, None, (problem,))
        exit_code, seconds = _end_of(process, processes)
    damaged = _damaged_checkpoints(output_dir)
    with log_path.open("ab") as log:
        log.write(b"\n--- the same command again ---\n")
    resumed_from = max(
        (_step_of(path) for path in list_checkpoints(output_dir) if why_incomplete(path) is None), default=None
    )
    with started(command, log_path) as process:
        resumed_code = process.wait(RUN_TIMEOUT_SECONDS)
    difference = _difference(output_dir, undisturbed) if resumed_code == 0 else None
    problems = find_problems(plan, exit_code, seconds, damaged, resumed_from, difference)
    return Outcome(plan, exit_code, seconds, damaged, resumed_from, difference, problems)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _damaged_checkpoints(output_dir: Path) -> tuple[str, ...]:
    """Checkpoints that say of themselves that they are complete, and are not."""
    finished = (path for path in list_checkpoints(output_dir) if (path / MANIFEST_NAME).is_file())
    return tuple(path.name for path in finished if why_incomplete(path) is not None)


def _difference(output_dir: Path, undisturbed: Undisturbed) -> float | None:
    losses = read_losses(output_dir)
    if len(losses) != len(undisturbed.losses):
        return None
    return max(abs(mine - its) for mine, its in zip(losses, undisturbed.losses, strict=True))


def find_problems(
    plan: Plan,
    exit_code: int,
    seconds_to_end: float | None,
    damaged: Sequence[str],
    resumed_from: int | None,
    loss_difference: float | None,
) -> tuple[str, ...]:
    """Say what is not as it should be after a fault."""
    problems = []
    if exit_code == 0:
        problems.append("ended with code 0")
    if plan.fault == "signal" and exit_code != STOPPED_EXIT_CODE:
        problems.append(f"ended with code {exit_code} after SIGTERM, not {STOPPED_EXIT_CODE}")
    if seconds_to_end is None:
        problems.append(f"processes were left after {END_TIMEOUT_SECONDS} s")
    if damaged:
        problems.append(f"damaged: {', '.join(damaged)}")
    # What was complete when the fault struck: the checkpoint before the one that had just been begun.
    if (resumed_from or 0) < plan.after_step - NUM_STEPS_PER_SAVE:
        problems.append(f"went on from step {resumed_from}, struck after step {plan.after_step}")
    if loss_difference is None:
        problems.append("could not be resumed to its end")
    elif loss_difference != 0:
        problems.append(f"losses differ by {loss_difference:.1e}")
    return tuple(problems)
