"""The directions of imports that setup.cfg states: by its contracts, and by importing `projectors` all alone."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

IMPORT_WITHOUT_THE_OTHERS = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"llava_saep", "transformers", "deepspeed", "peft", "accelerate"}:
            raise ImportError(f"projectors must not import {name}")

sys.meta_path.insert(0, Refuse())
import projectors
print(*projectors.registered_projectors())
for name in projectors.registered_projectors():
    projectors.projector_spec(name)
"""


def test_projectors_import_with_torch_alone():
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_THE_OTHERS], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "saep" in result.stdout.split()


def test_import_contracts_of_setup_cfg_are_kept():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    result = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kept" in result.stdout, "a contract was removed from setup.cfg without a word here"
