"""A rank notices that it is to stop, whatever it is doing, and workers outlive signals that are not meant for them."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llava_saep.train import interruption
from llava_saep.train.interruption import STOPPED_EXIT_CODE, StopWatch, find_launchers, has_lost_parent


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_is_noticed_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with StopWatch() as watch:
        watch.accept_signals()
        assert watch.reason is None
        os.kill(os.getpid(), number)
        wait_for(lambda: watch.reason is not None)
        assert watch.reason == signal.Signals(number).name
    assert signal.getsignal(number) is before
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


# The module by itself: importing the package, and with it transformers, takes each process many seconds.
IMPORT = f"import sys; sys.path.append({str(Path(interruption.__file__).parent)!r}); import interruption\n"


def run_python(code, **kwargs):
    return subprocess.Popen([sys.executable, "-c", IMPORT + textwrap.dedent(code)], text=True, **kwargs)


def test_signal_has_its_effect_before_there_is_anything_to_save():
    process = run_python(
        """
        import os, signal, time
        with interruption.StopWatch():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
        """
    )
    assert process.wait(60) == -signal.SIGTERM


def test_worker_outlives_the_jobs_signal_and_follows_its_parents():
    """Also the signal that comes before the worker has started: a new epoch has new workers."""
    process = run_python(
        """
        import os, signal, time
        from torch.utils.data import DataLoader
        from interruption import StopWatch, shielded

        class Slow:
            def __len__(self):
                return 3
            def __getitem__(self, index):
                time.sleep(0.2)
                return index

        with StopWatch() as watch:
            watch.accept_signals()
            batches = iter(DataLoader(Slow(), num_workers=1, worker_init_fn=shielded(None)))
            (worker,) = batches._workers
            if os.fork() == 0:  # someone else than the parent
                for _ in range(20):
                    os.kill(worker.pid, signal.SIGTERM)
                    time.sleep(0.02)
                os._exit(0)
            assert [int(batch) for batch in batches] == [0, 1, 2]
            os.wait()
            batches = iter(DataLoader(Slow(), num_workers=1, worker_init_fn=shielded(None)))
            next(batches)
            (worker,) = batches._workers
            worker.terminate()
            worker.join(10)
            assert worker.exitcode == 0, worker.exitcode
        os._exit(0)
        """,
        stderr=subprocess.PIPE,
    )
    assert process.wait(90) == 0, process.stderr.read()


# Without a launcher


def write_launcher(tmp_path, rank_code):
    """A program with a launcher's name that starts a rank and waits for it; the rank writes its pid to a file."""
    rank = tmp_path / "rank.py"
    rank.write_text(IMPORT + rank_code)
    launcher = tmp_path / "torchrun"
    launcher.write_text(f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, {str(rank)!r}]))")
    return launcher


RANK = """
import os, pathlib, time
interruption.ORPHAN_SECONDS = 1.0
with interruption.StopWatch() as watch:
    if {is_training}:
        watch.accept_signals()
    here = pathlib.Path(__file__).parent
    (here / "pid.tmp").write_text(str(os.getpid()))
    os.replace(here / "pid.tmp", here / "pid")
    time.sleep(60)
"""


@pytest.mark.parametrize("is_training", [False, True])
def test_rank_ends_by_itself_when_its_launcher_is_killed(is_training, tmp_path):
    """Before training at once; in a step that does not end, after a while."""
    launcher = subprocess.Popen([sys.executable, str(write_launcher(tmp_path, RANK.format(is_training=is_training)))])
    wait_for((tmp_path / "pid").exists, seconds=60)
    rank = int((tmp_path / "pid").read_text())
    assert not has_lost_parent(rank, launcher.pid)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not os.path.exists(f"/proc/{rank}") or open(f"/proc/{rank}/stat").read().split()[2] == "Z")


def test_rank_ends_when_told_to_stop_after_another_has_failed(tmp_path, monkeypatch):
    """It waits for the other one in a step that cannot end, and the launcher would give it half a minute."""
    monkeypatch.setenv("LOCAL_SIZE", "2")
    launcher = subprocess.Popen([sys.executable, str(write_launcher(tmp_path, RANK.format(is_training=True)))])
    wait_for((tmp_path / "pid").exists, seconds=60)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    assert launcher.wait(20) == STOPPED_EXIT_CODE


def test_launchers_are_known_by_their_names_and_shells_are_none(tmp_path, monkeypatch):
    """A run goes on when the terminal in which it was started is closed."""
    commands = {
        10: ["/usr/bin/python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "train.py"],
        11: ["/usr/bin/python", "/venv/bin/deepspeed", "--num_gpus", "2", "train.py"],
        12: ["bash", "/home/me/llava-saep/run.sh"],
        13: ["/usr/bin/python", "/venv/bin/llava-saep", "train"],
    }

    class Process:
        def __init__(self, pid):
            self.pid = pid

        def cmdline(self):
            return commands[self.pid]

        def parents(self):
            return [Process(pid) for pid in sorted(commands)]

    monkeypatch.setattr(interruption.psutil, "Process", Process)
    assert find_launchers(9) == [10, 11]
