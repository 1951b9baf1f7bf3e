"""Real launchers, killed at random moments: `llava-saep bench faults` finds nothing lost."""

import json
import os
import subprocess
import sys

import pytest

FAULTS = ("rank", "launcher", "command", "signal", "disk")
"""Without "save", which test_interruption.py does at the worst moment."""

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]


def test_runs_that_are_killed_stopped_or_out_of_disk_lose_nothing(tmp_path):
    """Also: nothing of them is left within a minute, and none ends as if it had succeeded."""
    folder = tmp_path / "faults"
    command = [sys.executable, "-m", "llava_saep.cli", "bench", "faults", "--output_dir", str(folder)]
    command += ["--trials", str(len(FAULTS)), "--faults", *FAULTS]
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=840
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    outcomes = json.loads((folder / "faults.json").read_text())["trials"]
    assert [outcome["plan"]["fault"] for outcome in outcomes] == list(FAULTS)
    assert all(outcome["loss_difference"] == 0 for outcome in outcomes)
