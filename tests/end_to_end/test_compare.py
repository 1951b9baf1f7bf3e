"""A comparison from the command line, with real training on the embedded data: reports, failures, going on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORN = """
from dataclasses import dataclass
import torch
from projectors import Projector, ProjectorConfig, register_projector

@dataclass(frozen=True, kw_only=True)
class TornConfig(ProjectorConfig):
    def num_output_tokens(self, grid):
        return grid.num_patches

@register_projector("torn", config=TornConfig, summary="Fails in its first step.")
class Torn(Projector):
    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def reset_parameters(self):
        torch.nn.init.zeros_(self.weight)

    def forward(self, features, grid):
        raise RuntimeError("torn apart")
"""


def compare(output_dir, projectors):
    command = [sys.executable, "-m", "llava_saep.cli", "compare", "--projectors", projectors]
    command += ["--budget", "smoke", "--seeds", "2", "--reference", "saep", "--device", "cpu"]
    return [*command, "--output-dir", str(output_dir)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_projectors_are_trained_compared_and_one_failure_is_reported(tmp_path):
    (tmp_path / "torn.py").write_text(TORN)
    output_dir = tmp_path / "out"
    command = compare(output_dir, f"saep,avg_pool,{tmp_path}/torn.py:Torn")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "2 of 6 runs failed" in result.stdout and "torn apart" in result.stdout
    numbers = json.loads((output_dir / "results.json").read_text())
    by_label = {entry["label"]: entry for entry in numbers["entries"]}
    torn = by_label.pop("torn.py:Torn")  # without the folders of its file
    assert torn["runs"] == [] and all("torn apart" in reason for reason in torn["failures"].values())
    for entry in by_label.values():
        assert len(entry["runs"]) == 2 and entry["speed"]["tokens_per_image"] == 9
        for run in entry["runs"]:
            assert run["train_seconds"] > 0 and run["train_peak_bytes"] > 2**26
    seeds = [output_dir / "runs" / "saep" / f"seed{seed}" / "stage2" / "trainer_state.json" for seed in (0, 1)]
    losses = [[entry.get("loss") for entry in json.loads(path.read_text())["log_history"]] for path in seeds]
    assert losses[0] != losses[1]
    page = (output_dir / "report.html").read_text()
    assert "torn apart" in page and "held-out images" in page and "http" not in page.replace("torchvision", "")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_comparison_goes_on_where_it_was(tmp_path):
    output_dir = tmp_path / "out"
    command = compare(output_dir, "saep,mlp2x_gelu")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    first = output_dir / "runs" / "saep" / "seed0" / "stage1.json"
    deadline = time.monotonic() + 300
    while not first.is_file() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)  # its steps, which it cannot tell any more, end by themselves
    process.wait()
    before = first.read_text()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    assert first.read_text() == before
    numbers = json.loads((output_dir / "results.json").read_text())
    assert [len(entry["runs"]) for entry in numbers["entries"]] == [2, 2]
    other = subprocess.run([*command, "--world", "cells"], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert other.returncode == 2 and "another budget, world or recipe" in other.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_ends_a_comparison_without_traces(tmp_path):
    """While the server that its processes are forked from imports, which takes seconds, and Ctrl-C reaches it too."""
    command = compare(tmp_path / "out", "saep,avg_pool")
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "out" / "comparison.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in output and "Traceback" not in output, output
