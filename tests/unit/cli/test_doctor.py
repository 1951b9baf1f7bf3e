"""Each finding, from made-up machines."""

import json

import pytest
from packaging.requirements import Requirement

from llava_saep.cli import main
from llava_saep.commands import doctor

TRANSFORMERS = Requirement("transformers>=5.23,<5.24")


def findings(installed, tested=None):
    return list(doctor.requirement_findings([TRANSFORMERS], installed, tested or {}))


@pytest.mark.parametrize(
    ("installed", "level", "words"),
    [
        ({}, "problem", "is not installed"),
        ({"transformers": "5.24.0"}, "problem", "5.24.0 is outside"),
        ({"transformers": "5.22.1"}, "problem", "5.22.1 is outside"),
        ({"transformers": "5.23.4"}, "note", "5.23.4; tested with 5.23.0"),
        ({"transformers": "5.23.0"}, "ok", "5.23.0"),
    ],
)
def test_versions_are_compared_with_the_range_and_with_the_tested_pin(installed, level, words):
    (finding,) = findings(installed, {"transformers": "5.23.0"})
    assert finding.level == level
    assert words in finding.detail
    assert bool(finding.advice) == (level == "problem")


def test_build_of_torch_is_no_difference_from_the_pin():
    requirement = Requirement("torch>=2.6")
    (finding,) = doctor.requirement_findings([requirement], {"torch": "2.13.0+cu130"}, {"torch": "2.13.0"})
    assert finding.level == "ok"


def test_torchvision_of_another_torch_is_a_problem():
    declared = [Requirement("numpy"), Requirement("torch==2.15.0")]
    assert doctor.torchvision_finding("0.30.0", "2.13.0+cpu", declared).level == "problem"
    assert doctor.torchvision_finding("0.30.0", "2.15.0+cu130", declared).level == "ok"


def test_little_space_is_a_problem():
    assert doctor.space_finding("disk", 10, 100, "free some").level == "problem"
    assert doctor.space_finding("disk", 100, 100, "free some").level == "ok"


def test_lock_of_a_killed_compilation_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    (finding,) = doctor.check_jit_locks()
    assert finding.level == "problem"
    assert f"rm {lock}" in finding.advice


def test_pins_of_the_checkout_are_read():
    pins = doctor.tested_versions()
    assert pins["torch"] == "2.13.0"
    assert "huggingface-hub" in pins


def test_a_check_that_breaks_is_a_finding_and_hides_no_other(monkeypatch):
    def check_broken():
        raise OSError("no such device")
        yield

    monkeypatch.setattr(doctor, "check_accelerator", check_broken)
    found = {finding.subject: finding for finding in doctor.examine()}
    assert "no such device" in found["broken"].detail
    assert "disk" in found


def test_exit_code_tells_whether_there_is_a_problem(monkeypatch, capsys):
    good, bad = doctor.Finding("ok", "a", "fine"), doctor.Finding("problem", "b", "broken", "mend it")
    monkeypatch.setattr(doctor, "examine", lambda: iter([good]))
    assert main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "examine", lambda: iter([good, bad]))
    assert main(["doctor"]) == 1
    assert "-> mend it" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[1]["advice"] == "mend it"
