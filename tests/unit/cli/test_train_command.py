"""`llava-saep train`: which flags go where, and that nothing starts before they are right."""

import base64
import json
import os
import signal
import sys

import pytest

from llava_saep.cli import main
from llava_saep.commands import train
from llava_saep.errors import UserError


@pytest.fixture
def flags(tmp_path):
    """The shortest complete command line, with files that exist."""
    (tmp_path / "data.json").write_text("[]")
    return [
        *("--model_name_or_path", str(tmp_path), "--vision_tower", str(tmp_path), "--mm_projector_type", "saep"),
        *("--data_path", str(tmp_path / "data.json"), "--image_folder", str(tmp_path)),
        *("--output_dir", str(tmp_path / "out")),
    ]


@pytest.fixture
def started(monkeypatch):
    """Catches what would have been started."""
    calls = []
    monkeypatch.setattr(train, "run_launcher", lambda command, environment: calls.append((command, environment)) or 0)
    return calls


def test_launcher_flags_are_separated_from_training_flags():
    argv = ["--num_processes", "4", "--hostfile", __file__, "--num_train_epochs", "1", "--no_ssh", "--seed", "3"]
    launch, rest = train.split_flags(argv)
    assert launch.num_processes == 4
    assert train.launcher_flags(launch) == ["--hostfile", __file__, "--no_ssh"]
    assert rest == ["--num_train_epochs", "1", "--seed", "3"]


def test_training_script_is_started_through_the_launcher_of_this_interpreter(flags, started):
    assert main(["train", "--num_processes", "2", *flags]) == 0
    ((command, environment),) = started
    assert command[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    assert devices_of(command) == [0, 1]
    assert command[-len(flags) - 1 :] == [str(train.TRAINING_SCRIPT), *flags]
    assert train.TRAINING_SCRIPT.is_file()
    assert int(environment["OMP_NUM_THREADS"]) >= 1


def devices_of(command):
    (machines,) = (word.partition("=")[2] for word in command if word.startswith("--world_info="))
    return json.loads(base64.urlsafe_b64decode(machines))["localhost"]


@pytest.mark.parametrize(
    ("visible", "devices"), [("4,5,6", ["4", "5"]), ("GPU-1,GPU-2", ["GPU-1", "GPU-2"]), ("", [0, 1]), ("3", [0, 1])]
)
def test_ranks_take_the_gpus_that_are_visible(visible, devices, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices_of(train.launcher_command(["--bind_cores_to_rank"], [], 2)) == devices


def test_hostfile_decides_the_number_of_processes(flags, started, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("worker-0 slots=8\n")
    assert main(["train", "--hostfile", str(hostfile), *flags]) == 0
    command = started[0][0]
    assert "--num_gpus" not in command
    assert command[3:5] == ["--hostfile", str(hostfile)]


@pytest.mark.parametrize("choice", [["--include", "localhost:0"], ["--exclude", "localhost:1"]])
def test_chosen_gpus_decide_the_number_of_processes(choice, flags, started):
    """The launcher refuses a number beside a choice."""
    assert main(["train", *choice, *flags]) == 0
    command = started[0][0]
    assert "--num_gpus" not in command
    assert command[command.index("--master_port") + 2 :][:2] == choice


def test_no_flags_at_all_end_in_one_line(started, capsys):
    assert main(["train"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1 and "llava-saep train --help" in said.err
    assert started == []


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--mm_projector_type", "sape"], "Did you mean 'saep'"),
        (["--learning_rtae", "1"], "Did you mean --learning_rate"),
        (["--data_path", "absent.json"], "absent.json"),
        (["--num_processes", "0"], "--num_processes must be at least 1"),
        (["--include", "localhost:0"], "--num_processes 2 contradicts --include localhost:0"),
        (["--exclude", "localhost:0"], "--num_processes 2 contradicts --exclude localhost:0"),
        (["--hostfile", "absent"], "--hostfile absent: no such file"),
    ],
)
def test_wrong_flags_start_nothing(flags, started, extra, message, capsys, tmp_path):
    assert main(["train", "--num_processes", "2", *flags, *extra]) == 2
    assert message in capsys.readouterr().err
    assert started == []
    assert not (tmp_path / "out").exists()


def test_set_thread_count_is_respected():
    assert train.launcher_environment(2, {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"


def test_cores_are_shared_out_among_the_processes(monkeypatch):
    monkeypatch.setattr(train.os, "cpu_count", lambda: 8)
    assert train.launcher_environment(4, {})["OMP_NUM_THREADS"] == "2"
    assert train.launcher_environment(16, {})["OMP_NUM_THREADS"] == "1"


def test_exit_code_of_the_ranks_comes_back():
    assert train.run_launcher([sys.executable, "-c", "raise SystemExit(2)"], {}) == 2


@pytest.mark.parametrize(
    ("code", "was_stopped", "expected"),
    [
        (-signal.SIGKILL, False, 137),  # a killed launcher is no success, which deepspeed's own makes of it
        (247, False, 247),  # a rank that was killed, as the launcher reports it
        (1, False, 1),
        (143, True, 143),
        (1, True, 143),  # the launcher had the signal too
        (241, True, 143),  # the ranks had not begun
        (2, True, 2),  # nothing could be saved, since the disk was full
        (0, True, 0),  # the signal came after the last step
    ],
)
def test_exit_code_says_how_the_ranks_ended(code, was_stopped, expected):
    assert train.exit_code_of(code, was_stopped=was_stopped) == expected


def test_signal_is_passed_on_to_the_ranks_and_not_to_the_launcher(tmp_path, monkeypatch):
    """A launcher that got it would end the ranks before they have saved."""
    script = tmp_path / "train_mem.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"os.kill({os.getpid()}, signal.SIGTERM)\n"
        "time.sleep(30)\n"
    )
    monkeypatch.setattr(train, "TRAINING_SCRIPT", script)
    launcher = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, {str(script)!r}]))"
    assert train.run_launcher([sys.executable, "-c", launcher], os.environ) == 143


def test_lone_process_needs_no_launcher_unless_its_flags_are_given():
    assert train.needs_no_launcher(1, []) == (train.default_num_processes() == 1)
    assert not train.needs_no_launcher(1, ["--no_ssh"])
    assert not train.needs_no_launcher(2, [])


def test_hostfile_that_is_absent_is_not_silently_ignored_as_the_launcher_would():
    with pytest.raises(UserError, match="no such file"):
        train.split_flags(["--hostfile", "/absent"])


def test_two_runs_on_one_machine_meet_at_different_ports():
    import socket

    with socket.socket() as other_run:
        other_run.bind(("127.0.0.1", train.free_port()))
        other_run.listen()
        command = train.launcher_command([], [], 2)
        port = int(command[command.index("--master_port") + 1])
        assert port != other_run.getsockname()[1]
        with socket.socket() as ours:
            ours.bind(("127.0.0.1", port))  # raises where something listens already


@pytest.mark.parametrize("given", [["--master_port", "4321"], ["--num_nodes", "2", "--master_addr", "worker-1"]])
def test_a_port_is_chosen_only_where_the_user_leaves_it_open(given):
    command = train.launcher_command(given, [], 2)
    assert command.count("--master_port") == given.count("--master_port")
