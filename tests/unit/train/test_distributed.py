"""Fitting arguments to the machine, and locks of interrupted compilations."""

import logging
import os
import subprocess
import sys
import time

import pytest

from llava_saep.errors import UserError
from llava_saep.train import distributed
from llava_saep.train.distributed import available_reporters, find_stale_jit_locks, fit_to_device


def test_cpu_run_is_told_so_and_leaves_out_what_is_of_gpus():
    fitted, notes = fit_to_device({"tf32": True, "bf16": True}, on_accelerator=False)
    assert fitted["use_cpu"] is True
    assert fitted["bf16"] is True  # bf16 works on CPU
    assert "tf32" not in fitted
    assert len(notes) == 1 and "--tf32 True is ignored" in notes[0]


def test_gpu_run_keeps_its_arguments():
    given = {"tf32": True, "bf16": True, "report_to": "wandb"}
    fitted, notes = fit_to_device(given, on_accelerator=True, available_reporters=("wandb",))
    assert (fitted["tf32"], fitted["bf16"], fitted["report_to"]) == (True, True, ["wandb"])
    assert "use_cpu" not in fitted
    assert notes == []


def test_fp16_on_cpu_is_refused():
    with pytest.raises(UserError, match="needs a GPU"):
        fit_to_device({"fp16": True}, on_accelerator=False)


def test_missing_reporter_is_left_out_with_a_note():
    fitted, notes = fit_to_device({"report_to": "wandb"}, on_accelerator=False, available_reporters=("tensorboard",))
    assert fitted["report_to"] == "none"
    assert "--report_to wandb is ignored" in notes[0]


def test_several_reporters_are_named_with_commas():
    both = fit_to_device({"report_to": "wandb,trackio"}, on_accelerator=False, available_reporters=("trackio",))
    assert both[0]["report_to"] == ["trackio"] and len(both[1]) == 1
    everything = fit_to_device({"report_to": "all"}, on_accelerator=False, available_reporters=("trackio", "wandb"))
    assert everything == ({**everything[0], "report_to": ["trackio", "wandb"]}, [])


def test_reporter_that_cannot_be_imported_is_no_crash(monkeypatch, caplog, tmp_path):
    (tmp_path / "trackio.py").write_text("raise ImportError('no module named pandas')")
    monkeypatch.syspath_prepend(tmp_path)
    loggers = logging.getLogger("llava_saep")
    monkeypatch.setattr(loggers, "propagate", True)
    with caplog.at_level(logging.WARNING, "llava_saep"):
        assert "trackio" not in available_reporters(["trackio"])
    assert "trackio cannot be used: ImportError: no module named pandas" in caplog.text


def test_other_ranks_log_errors_alone(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    loggers = [logging.getLogger(name) for name in ("llava_saep", "projectors")]
    before = [(own.handlers[:], own.level, own.propagate) for own in loggers]
    try:
        distributed.configure_logging()
        loggers[0].warning("said by every rank")
        loggers[0].error("seen by this rank")
    finally:
        for own, (handlers, level, propagate) in zip(loggers, before, strict=True):
            own.handlers[:], own.propagate = handlers, propagate
            own.setLevel(level)
    said = capsys.readouterr().err
    assert "seen by this rank" in said
    assert "said by every rank" not in said


def test_lock_of_a_dead_compilation_is_stale(tmp_path):
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 600, time.time() - 600))
    (found,) = find_stale_jit_locks(tmp_path)
    assert found.path == lock
    assert found.age_seconds == pytest.approx(600, abs=60)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not list open files")
def test_lock_of_a_running_compilation_is_not_stale(tmp_path):
    """torch.utils.file_baton keeps its lock open while it compiles."""
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    hold = f"import sys, time; f = open({str(lock)!r}, 'w'); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        assert find_stale_jit_locks(tmp_path) == []
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert [lock.path for lock in find_stale_jit_locks(tmp_path)] == [lock]


def test_no_extensions_folder_means_no_locks(tmp_path):
    assert find_stale_jit_locks(tmp_path / "absent") == []
