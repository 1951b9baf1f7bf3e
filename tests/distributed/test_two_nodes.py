"""Two nodes on one machine (scripts/two_nodes.sh): a launcher in each of two network namespaces, without ssh."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "two_nodes.sh"
CANNOT = 3
"""The script's exit code where there is no root, no `ip`, or no permission to make namespaces."""


def two_nodes(*flags, folder):
    """Run the script from another folder; skip, with its reason, where this machine cannot play two nodes."""
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [SCRIPT, "--output_dir", folder / "out", *flags]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=580)
    if result.returncode == CANNOT:
        pytest.skip(result.stderr.strip().splitlines()[-1])
    assert not namespaces(), "namespaces are left over"
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def namespaces():
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith("llava_saep_")]


@pytest.mark.parametrize("stage", [2, 3])
def test_losses_of_two_nodes_are_those_of_one_process(stage, tmp_path):
    assert "all as it should be" in two_nodes("--stage", str(stage), folder=tmp_path)


@pytest.mark.parametrize("mode", ["kill", "unplug"])
def test_node_that_loses_the_other_ends_and_the_run_goes_on_afterwards(mode, tmp_path):
    """A dead process closes its connections, which the other notices at once; a cut cable runs into the timeout."""
    said = two_nodes("--lose", mode, folder=tmp_path)
    assert "the first node ended with code" in said
    assert "both nodes ended with code 0" in said
    assert "resuming from" in said
