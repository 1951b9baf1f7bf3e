"""The fault benchmark draws the same moments for the same seed, and calls nothing good that is not."""

import json
import signal
import subprocess
import sys

import psutil
import pytest

from llava_saep.bench.faults import trials
from llava_saep.bench.faults.trials import FAULTS, draw_plans, find_problems, started
from llava_saep.bench.faults.workload import FaultyRun, training_flags, write_data
from llava_saep.cli import main
from llava_saep.train.interruption import STOPPED_EXIT_CODE

RUN = FaultyRun(num_steps=16)


def test_faults_take_turns_at_moments_that_follow_from_the_seed():
    plans = draw_plans(12, FAULTS, RUN, seed=1)
    assert [plan.fault for plan in plans] == list(FAULTS) * 2
    assert plans == draw_plans(12, FAULTS, RUN, seed=1) != draw_plans(12, FAULTS, RUN, seed=2)
    assert {plan.after_step for plan in plans} <= {2, 4, 6, 8, 10, 12}
    assert {plan.rank for plan in plans} == {0, 1}
    assert all(plan.delay == 0 for plan in plans if plan.fault == "save")
    assert len({plan.delay for plan in plans}) > 6


GOOD = {"exit_code": 137, "seconds_to_end": 2.0, "damaged": (), "resumed_from": 6, "loss_difference": 0.0}


@pytest.mark.parametrize(
    ("fault", "change", "problem"),
    [
        ("rank", {"exit_code": 0}, "ended with code 0"),
        ("signal", {}, f"ended with code 137 after SIGTERM, not {STOPPED_EXIT_CODE}"),
        ("rank", {"seconds_to_end": None}, "processes were left"),
        ("rank", {"damaged": ("checkpoint-4",)}, "damaged: checkpoint-4"),
        ("save", {"resumed_from": 2}, "went on from step 2, struck after step 6"),
        ("save", {"resumed_from": None}, "went on from step None"),
        ("rank", {"loss_difference": None}, "could not be resumed"),
        ("rank", {"loss_difference": 1e-7}, "losses differ by 1.0e-07"),
    ],
)
def test_what_is_lost_is_named(fault, change, problem):
    plan = draw_plans(1, [fault], RUN, seed=0)[0]
    plan = trials.Plan(plan.fault, 6, plan.delay, plan.rank)
    (found,) = find_problems(plan, **{**GOOD, **change})
    assert problem in found


def test_nothing_lost_is_no_problem():
    """The checkpoint that was being written may be lost, the one before may not."""
    plan = trials.Plan("save", 6, 0.0, 1)
    assert find_problems(plan, **{**GOOD, "resumed_from": 4}) == ()


def test_flags_are_those_of_the_command_and_the_data_is_llavas(tmp_path):
    from llava_saep.arguments import parse_arguments

    write_data(tmp_path, seed=0)
    flags = training_flags(RUN, tmp_path, tmp_path / "out")
    config = parse_arguments(flags[2:])  # without --num_processes, which is the command's own
    assert config.training.trainer_arguments["save_steps"] == 2
    assert json.loads(config.training.trainer_arguments["deepspeed"])["zero_optimization"]["stage"] == 2
    records = json.loads((tmp_path / "data.json").read_text())
    assert all((tmp_path / "images" / record["image"]).is_file() for record in records)


def test_processes_of_a_trial_do_not_outlive_it(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with started([sys.executable, "-c", child], tmp_path / "log") as process:
        while not (below := psutil.Process(process.pid).children()):
            assert process.poll() is None
    assert process.returncode == -signal.SIGKILL
    assert not psutil.wait_procs(below, timeout=5)[1]


def test_process_that_stays_is_told(monkeypatch):
    monkeypatch.setattr(trials, "END_TIMEOUT_SECONDS", 0.2)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert trials._end_of(process, [psutil.Process(process.pid)])[0] == 137
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    quick = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    quick.wait()
    assert trials._end_of(quick, [psutil.Process(other.pid)]) == (3, None)
    assert other.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trials", "0"], "--trials must be at least 1"),
        (["--num_processes", "1"], "num_processes must be at least 2"),
        (["--zero_stage", "4"], "zero_stage must be 0, 1, 2 or 3"),
        (["--steps", "4"], "num_steps must be at least 8"),
    ],
)
def test_wrong_numbers_are_refused(flags, message, capsys):
    assert main(["bench", "faults", *flags]) == 2
    assert message in capsys.readouterr().err


def test_folder_with_something_in_it_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["bench", "faults", "--output_dir", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
