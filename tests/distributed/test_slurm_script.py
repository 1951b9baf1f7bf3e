"""playground/cluster/train.sbatch with stand-ins for Slurm's programs: ranks get its signals, and the job goes on."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fixtures.training import deepspeed_json, logged, training_flags

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(400)]

REPOSITORY = Path(__file__).resolve().parents[2]

SRUN = """#!{python}
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
ranks = [
    subprocess.Popen(command, env={{**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}})
    for rank in range(int(os.environ["SLURM_NTASKS"]))
]
open(os.environ["PIDS"], "w").write(" ".join(str(rank.pid) for rank in ranks))
codes = [rank.wait() for rank in ranks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$ASKED"; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job with two tasks on this machine."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        job_id = (probe.getsockname()[1] - 20_000) % 20_000  # a port of its own
    job = {"SLURM_JOB_ID": str(job_id), "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2"}
    own = {"PIDS": str(tmp_path / "pids"), "ASKED": str(tmp_path / "asked"), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, **job, **own, "PATH": path, "DS_ACCELERATOR": "cpu"}


def submit(command, environment, log):
    script = REPOSITORY / "playground" / "cluster" / "train.sbatch"
    return subprocess.Popen([script, *command], cwd=REPOSITORY, env=environment, stdout=log, stderr=log)


def test_job_is_queued_again_after_its_time_and_goes_on(slurm, bases, conversations, tmp_path):
    out = tmp_path / "out"
    flags = training_flags(
        bases, conversations, out, deepspeed=deepspeed_json(2), per_device_train_batch_size=2, max_steps=200
    )
    command = ["deepspeed", "llava_saep/train/train_mem.py", *flags]
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        job = submit(command, slurm, file)
        deadline = time.monotonic() + 150
        while ": loss " not in log.read_text() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in (tmp_path / "pids").read_text().split():
            os.kill(int(pid), signal.SIGUSR1)
        assert job.wait(timeout=100) == 143, log.read_text()[-4000:]
    assert (tmp_path / "asked").read_text().split() == ["requeue", slurm["SLURM_JOB_ID"]]
    (checkpoint,) = out.glob("checkpoint-*")
    num_steps = int(checkpoint.name.removeprefix("checkpoint-")) + 2
    with log.open("w") as file:
        assert submit([*command, "--max_steps", str(num_steps)], slurm, file).wait(timeout=150) == 0
    assert f"resuming from {checkpoint}" in log.read_text()
    assert len(logged(out, "loss")) == num_steps


def test_recipe_runs_as_the_ranks_themselves(slurm, tmp_path):
    """Its `deepspeed` is the rank; a mistake in the flags is said once, and the job is not queued again."""
    command = ["playground/recipes/saep.sh", "pretrain", "--data_path", str(tmp_path / "missing.json")]
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        job = submit(command, {**slurm, "PER_GPU": "32"}, file)
        assert job.wait(timeout=150) == 2, log.read_text()[-4000:]
    assert log.read_text().count("missing.json: no such file") == 1
    assert not (tmp_path / "asked").exists()
