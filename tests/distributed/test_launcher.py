"""The real `deepspeed` launcher: two ranks train, and a mistake ends in one message and exit code 2."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_saep.model.loading import load_model
from tests.fixtures.training import logged, training_flags

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

REPOSITORY = Path(__file__).resolve().parents[2]


DEEPSPEED = ("deepspeed.launcher.runner", "--num_gpus", "2")
TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "2")


def launch(argv, folder, launcher=DEEPSPEED, timeout_seconds=200):
    """Run the script on two ranks from another folder than the repository's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", *launcher, "--master_port", str(port)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(REPOSITORY / "llava_saep" / "train" / "train_mem.py"), *argv],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )


@pytest.mark.parametrize(
    "launcher", [pytest.param(DEEPSPEED, id="deepspeed"), pytest.param(TORCHRUN, id="torchrun", marks=pytest.mark.slow)]
)
def test_launcher_trains_two_ranks_with_llavas_path_of_a_shipped_config(launcher, bases, conversations, tmp_path):
    argv = training_flags(
        bases,
        conversations,
        tmp_path / "out",
        deepspeed="./scripts/zero2.json",
        per_device_train_batch_size=2,
        max_steps=2,
    )
    result = launch(argv, tmp_path, launcher)
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(logged(tmp_path / "out", "loss")) == 2
    assert load_model(tmp_path / "out").config.projector["name"] == "saep"
    assert result.stderr.count("what is trained:") == 1  # rank 0 alone


def test_launcher_ends_with_code_two_and_one_message_after_a_mistake(bases, conversations, tmp_path):
    out = tmp_path / "out"
    argv = training_flags(bases, conversations, out, mm_projector_type="sape", deepspeed="zero2.json")
    started = time.monotonic()
    result = launch(argv, tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("error:") == 1
    assert "'sape'. Did you mean 'saep'?" in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()
    assert time.monotonic() - started < 120
