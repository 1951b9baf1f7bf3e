"""LLaVA's other two training scripts: the same program, found from any folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from llava_saep.train import train, train_mem, train_xformers

SCRIPTS = Path(train.__file__).parent


@pytest.mark.parametrize("module", [train, train_xformers])
def test_script_is_the_same_program(module):
    assert module.main is train_mem.main


@pytest.mark.parametrize("script", ["train.py", pytest.param("train_xformers.py", marks=pytest.mark.slow)])
def test_script_runs_as_a_file_from_another_folder(script, tmp_path):
    command = [sys.executable, str(SCRIPTS / script), "--model_name_or_path", "lm", "--data_path", "data.json"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "error: --output_dir is missing" in ended.stderr
