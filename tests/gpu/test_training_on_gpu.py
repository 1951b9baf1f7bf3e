"""Short runs through the command line on one GPU (NCCL) against the same run on the CPU.

All runs start together and each test looks at one of them: a process spends its time on imports, not on the GPU.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llava_saep.commands.train import TRAINING_SCRIPT, free_port
from tests.fixtures.tiny import TinyBases, TinyData, write_bases, write_data
from tests.fixtures.training import deepspeed_json, logged, training_flags

ROOT = TRAINING_SCRIPT.parents[2]
COMMON = {"max_steps": 6, "per_device_train_batch_size": 4, "attn_implementation": "sdpa", "learning_rate": 1e-3}

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Run:
    """How one run is started; `zero_stage` None is without DeepSpeed."""

    zero_stage: int | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    on_cpu: bool = False
    through_launcher: bool = False


BF16 = {"bf16": True}
PACKED = {"packing": True, "per_device_train_batch_size": 1, "attn_implementation": "segments"}
LORA = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0}
QLORA = {**LORA, "gradient_checkpointing": True}
RUNS = {
    "cpu": Run(on_cpu=True),
    "no_deepspeed": Run(),
    "zero1": Run(1),
    "zero2": Run(2, through_launcher=True),
    "zero3": Run(3, through_launcher=True),
    "bf16": Run(None, BF16),
    "bf16_zero2": Run(2, BF16),
    "bf16_zero3_checkpointed": Run(3, {**BF16, "gradient_checkpointing": True}),
    "fp16_zero2": Run(2, {"fp16": True}),
    "lora_cpu": Run(None, LORA, on_cpu=True),
    "lora_zero3": Run(3, LORA),
    "packed_cpu": Run(None, PACKED, on_cpu=True),
    "packed_zero2": Run(2, PACKED),
    "packed_bf16_zero3": Run(3, {**PACKED, **BF16}),
    "qlora4_cpu": Run(None, {**QLORA, "bits": 4}, on_cpu=True),
    "qlora4_bf16_zero2": Run(2, {**QLORA, **BF16, "bits": 4}),
    "qlora8_bf16_zero2": Run(2, {**QLORA, **BF16, "bits": 8}),
    "stage1_cpu": Run(None, {"tune_mm_mlp_adapter": True}, on_cpu=True),
    "stage1_zero2": Run(2, {"tune_mm_mlp_adapter": True}),
}


def start(run: Run, bases: TinyBases, data: TinyData, output_dir: Path) -> subprocess.Popen:
    flags = training_flags(bases, data, output_dir, **{**COMMON, **run.flags, "use_cpu": run.on_cpu})
    if run.zero_stage is not None:
        flags += ["--deepspeed", deepspeed_json(run.zero_stage)]
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search_path, "MASTER_PORT": str(free_port())}
    if run.on_cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "llava_saep.cli", "train", *flags]
    if run.through_launcher:
        launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", str(free_port())]
        command = [sys.executable, *launcher, str(TRAINING_SCRIPT), *flags]
    with output_dir.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Iterator[dict[str, Path]]:
    """The output folder of every run, all of them ended."""
    folder = tmp_path_factory.mktemp("runs")
    bases, data = write_bases(folder / "bases", text_hidden_size=64), write_data(folder / "data", num_records=16)
    processes = {name: start(run, bases, data, folder / name) for name, run in RUNS.items()}
    try:
        for process in processes.values():
            process.wait(timeout=240)
    finally:
        for process in processes.values():
            process.kill()
    yield {name: folder / name for name in RUNS}


def history(outputs: Mapping[str, Path], name: str) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a run."""
    finished = outputs[name] / "trainer_state.json"
    assert finished.is_file(), outputs[name].with_suffix(".log").read_text()[-3000:]
    return logged(outputs[name], "loss"), logged(outputs[name], "grad_norm")


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("no_deepspeed", "cpu"),
        ("zero1", "cpu"),
        ("zero2", "cpu"),
        ("zero3", "cpu"),
        ("packed_zero2", "packed_cpu"),
        ("lora_zero3", "lora_cpu"),
        ("stage1_zero2", "stage1_cpu"),
    ],
)
def test_float32_run_on_the_gpu_equals_the_cpu(outputs, name, reference):
    """1e-4: six steps let the last bit of a sum grow, on norms of about ten."""
    for found, expected in zip(history(outputs, name), history(outputs, reference), strict=True):
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("bf16", "cpu"),
        ("bf16_zero2", "cpu"),
        ("bf16_zero3_checkpointed", "cpu"),
        ("packed_bf16_zero3", "packed_cpu"),  # torch's variable-length kernel, where the CPU goes segment by segment
    ],
)
def test_bf16_run_on_the_gpu_follows_the_float32_run(outputs, name, reference):
    """2e-2: losses of about six, whose weights and activations carry eight bits."""
    losses, _ = history(outputs, name)
    expected, _ = history(outputs, reference)
    assert losses == pytest.approx(expected, abs=2e-2)


@pytest.mark.parametrize("name", ["qlora4_bf16_zero2", "qlora8_bf16_zero2"])
def test_quantised_run_on_the_gpu_follows_the_one_of_the_cpu(outputs, name):
    """5e-2: 8 bits round the language model less than 4, and bf16 rounds what is multiplied with it."""
    pytest.importorskip("bitsandbytes")
    losses, _ = history(outputs, name)
    expected, _ = history(outputs, "qlora4_cpu")
    assert losses == pytest.approx(expected, abs=5e-2)
    assert losses[-1] < losses[0]


def test_fp16_run_learns_once_its_loss_scale_has_settled(outputs):
    """A step whose gradients overflow is left out, so the losses are not those of the float32 run."""
    losses, _ = history(outputs, "fp16_zero2")
    assert losses[0] == pytest.approx(history(outputs, "cpu")[0][0], abs=1e-3)
    assert losses[-1] < losses[0]
