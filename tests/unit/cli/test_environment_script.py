"""scripts/environment.sh: when it makes an environment, when it must not, and that it finds a torch that is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


def bash(command, **environment):
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f". scripts/environment.sh; {command}"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def finished_environment(tmp_path):
    """An environment that a run with the extras playground and test has made."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text("echo activated")
    (tmp_path / "made_by_llava_saep").write_text(f"{ROOT}\n")
    stamp = bash("environment_stamp").stdout
    (tmp_path / "llava_saep.stamp").write_text(f"{stamp}playground,test\n")
    return tmp_path


def test_finished_environment_is_used_without_installing_anything(finished_environment):
    for extras in ("playground test", "playground", "test"):
        result = bash(f"use_environment {extras}", LLAVA_SAEP_VENV=str(finished_environment))
        assert result.returncode == 0, result.stderr
        assert result.stdout.endswith("activated\n")
        assert "Installing" not in result.stdout


def test_extras_that_are_missing_are_added_to_those_that_are_there(finished_environment):
    command = f"extras_to_install {finished_environment}"
    assert bash(f"{command} playground test serve").stdout == "playground,test,serve\n"
    assert bash(f"{command} test").stdout == ""
    assert bash(f"extras_to_install {finished_environment / 'absent'} playground").stdout == "playground\n"
    (finished_environment / "llava_saep.stamp").write_text("made of something else\nplayground,test\n")
    assert bash(f"{command} playground").stdout == "playground,test\n"
    installing = "install_packages() { echo installs $2; }"
    result = bash(f"{installing}; use_environment serve", LLAVA_SAEP_VENV=str(finished_environment))
    assert "installs playground,test,serve" in result.stdout


def test_changed_requirements_are_noticed(tmp_path):
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    before = bash(f"cd {tmp_path}; environment_stamp").stdout
    assert before == bash("environment_stamp").stdout
    (tmp_path / "constraints.txt").write_text("torch==2.14.0\n")
    assert bash(f"cd {tmp_path}; environment_stamp").stdout != before


def test_folder_that_somebody_else_made_is_left_alone(tmp_path):
    (tmp_path / "theirs.txt").touch()
    result = bash("use_environment", LLAVA_SAEP_VENV=str(tmp_path), LLAVA_SAEP_PYTHON=sys.executable)
    assert result.returncode == 1
    assert "was not made by this script" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.txt"]


def test_missing_python_says_what_to_install(tmp_path):
    result = bash("use_environment", LLAVA_SAEP_VENV=str(tmp_path / "venv"), LLAVA_SAEP_PYTHON="/absent/python")
    assert result.returncode == 1
    assert "Python 3.11 or newer" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_torch_of_an_interpreter_is_found_with_its_folder():
    version, folder = bash(f"installed_torch {sys.executable}").stdout.split()
    assert version == torch.__version__.split("+")[0]
    assert Path(folder) == Path(torch.__file__).parents[1]


def test_interpreter_without_torch_or_with_an_old_one_has_none_to_reuse(tmp_path):
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    assert bash(f"installed_torch {bare}").returncode == 1
    old = tmp_path / "old"
    (tmp_path / "site" / "torch").mkdir(parents=True)
    (tmp_path / "site" / "torch" / "__init__.py").touch()
    (tmp_path / "site" / "torch-2.5.1.dist-info").mkdir()
    (tmp_path / "site" / "torch-2.5.1.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.5.1\n")
    old.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} -S "$@"\n')
    old.chmod(0o755)
    assert bash(f"installed_torch {old}").returncode == 1


def test_the_quick_start_installs_nothing_that_only_tests_need():
    assert "\nuse_environment playground\n" in (ROOT / "quickstart.sh").read_text()


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", ".ci/run"])
def test_scripts_are_executable_and_parse(script):
    assert os.access(ROOT / script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(ROOT / script)], timeout=20).returncode == 0


def test_constraints_pin_every_requirement_and_neither_torchvision_nor_a_cuda_build():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 and "+" not in line for line in pins)
    names = {line.split("==")[0].lower() for line in pins}
    assert {"torch", "transformers", "deepspeed", "peft", "accelerate", "pytest", "setuptools"} <= names
    assert not any(name.startswith(("nvidia", "torchvision", "cuda")) for name in names)


def test_environment_whose_making_was_killed_is_made_anew(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "half_made").write_text("")
    (venv / "made_by_llava_saep").write_text(f"{ROOT}\n")
    steps = 'install_packages() { :; }; find_python() { echo "fake"; }; installed_torch() { return 1; }'
    made = 'mkdir -p "$3/bin"; echo "echo activated" >"$3/bin/activate"'
    fake = f'fake() {{ if [ "$1" = --version ]; then echo 3; else {made}; fi; }}'
    result = bash(f"{steps}; {fake}; use_environment test", LLAVA_SAEP_VENV=str(venv))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("activated\n") and not (venv / "half_made").exists()
    assert (venv / "made_by_llava_saep").read_text() == f"{ROOT}\n"
