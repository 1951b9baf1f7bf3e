"""Runs as processes: failures alone, resuming, locks, interruption."""

import json
import multiprocessing
import os
import signal
import threading
import time

import psutil
import pytest

from llava_saep.evaluation.comparison import runs, steps
from llava_saep.evaluation.comparison.choice import parse_choices
from llava_saep.evaluation.comparison.recipe import Stage
from llava_saep.evaluation.comparison.runs import Run, Runner, training_runs
from llava_saep.evaluation.comparison.steps import Placement, Step, read_json
from tests.fixtures import comparison as fixture


@pytest.fixture(autouse=True)
def forked_steps(monkeypatch):
    """Steps are forked from this process, which has imported what they need."""
    monkeypatch.setattr(runs, "_context", lambda device: multiprocessing.get_context("fork"))


@pytest.fixture
def lines():
    return []


@pytest.fixture
def runner(lines):
    return Runner(Placement(device="cpu"), num_jobs=2, say=lines.append)


def make_run(folder, label, *steps):
    return Run(label=label, seed=0, folder=folder / label, model_path=folder, steps=steps)


def step(name, function=fixture.succeed, **arguments):
    return Step(name=name, function=function, arguments=arguments)


def test_one_failure_is_reported_and_ends_no_other_run(tmp_path, runner, lines):
    good = [make_run(tmp_path, f"good{i}", step("a", marker=tmp_path / f"good{i}.txt")) for i in range(2)]
    bad = {
        "refused": (fixture.refuse, "a: --flag x: expected y"),
        "broken": (fixture.break_down, "a: RuntimeError: something tore"),
        "killed": (fixture.be_killed, "a: the process ended with code -9 (killed)"),
    }
    failing = [make_run(tmp_path, name, step("a", function), step("b")) for name, (function, _) in bad.items()]
    runner.do([good[0], *failing, good[1]])
    assert lines[-1] == "5 of 5 runs have ended" and sum("; about" in line for line in lines) == 4
    assert [run.open_steps for run in good] == [[], []]
    for run in failing:
        assert run.failure == bad[run.label][1]
        assert [open_step.name for open_step in run.open_steps] == ["a", "b"]
        assert any(line.startswith(f"{run.label}, seed 0: FAILED in {run.failure}") for line in lines)
    assert "something tore" in (tmp_path / "broken" / "log.txt").read_text()


def test_finished_steps_are_kept_and_failed_ones_tried_again(tmp_path, runner):
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    failing = make_run(tmp_path, "run", step("a", marker=first), step("b", fixture.refuse))
    runner.do([failing])
    mended = make_run(tmp_path, "run", step("a", marker=first), step("b", marker=second))
    runner.do([mended])
    assert mended.failure is None and not mended.open_steps
    runner.do([mended])
    assert first.read_text() == second.read_text() == "done\n"


def test_stage_that_was_broken_off_begins_anew(tmp_path, runner, monkeypatch):
    """The training program would go on from a checkpoint in its folder, with another order of batches behind it."""
    monkeypatch.setattr(Runner, "_wait_for", lambda self, step, folder: 1)
    run = make_run(tmp_path, "a", Step(name="stage1", function=steps.train))
    for name in ("stage1", "other"):
        (run.folder / name / "checkpoint-1").mkdir(parents=True)
    runner.do_step(run, run.steps[0])
    assert not (run.folder / "stage1").exists() and (run.folder / "other" / "checkpoint-1").is_dir()


def test_a_record_holds_facts_and_costs(tmp_path, runner):
    runner.do([make_run(tmp_path, "run", step("a", marker=tmp_path / "marker.txt"))])
    record = read_json(tmp_path / "run" / "a.json")
    assert record["fact"] == 7 and record["num_threads"] == 1
    assert record["seconds"] > 0 and record["cpu_seconds"] > 0 and record["peak_memory_bytes"] > 2**20


def test_many_short_steps_at_once_all_end_as_they_did(tmp_path, lines, monkeypatch):
    """Of 240 such steps 35 were taken for failed while each thread asked by itself how its process had ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fixtures.comparison"])
    monkeypatch.setattr(runs, "_context", lambda device: context)
    many = [
        make_run(tmp_path, f"run{index}", *(step(f"s{part}", marker=tmp_path / "marker.txt") for part in range(4)))
        for index in range(30)
    ]
    Runner(Placement(device="cpu"), num_jobs=6, say=lines.append).do(many)
    assert [line for line in lines if "FAILED" in line] == []
    assert not any(run.open_steps for run in many)


def test_interruption_ends_the_steps_and_leaves_nothing_half_done(tmp_path, runner):
    long_run = make_run(tmp_path, "long", step("a", fixture.linger, seconds=60))
    children_before = {child.pid for child in psutil.Process().children()}
    main = threading.main_thread().ident
    timer = threading.Timer(1.0, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    began = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs tests may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            runner.do([long_run])
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 20
    assert long_run.open_steps and long_run.failure is None
    assert {child.pid for child in psutil.Process().children()} <= children_before


def test_steps_end_when_their_comparison_is_killed(tmp_path):
    """A child that outlived its parent would write into a folder that a later comparison uses."""

    def compare():
        runs._context = lambda device: multiprocessing.get_context("fork")
        run = make_run(tmp_path, "run", step("a", fixture.linger, seconds=60))
        Runner(Placement(device="cpu"), num_jobs=1, say=str).do([run])

    parent = multiprocessing.get_context("fork").Process(target=compare)
    parent.start()
    deadline = time.monotonic() + 30
    children = []
    while not children and time.monotonic() < deadline:
        children = psutil.Process(parent.pid).children(recursive=True)
        time.sleep(0.05)
    time.sleep(0.5)  # it looks for its parent first thing
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert children and not alive


def test_training_runs_differ_in_projector_and_seed_alone(tmp_path):
    recipe = fixture.write_questions(tmp_path / "data")
    stages = (
        Stage(name="stage1", flags={"data_path": "a.json", "max_steps": 3}),
        Stage(name="stage2", flags={"pretrain_mm_mlp_adapter": "{previous}/mm_projector.safetensors"}),
    )
    recipe = type(recipe)(**{**vars(recipe), "stages": stages, "projector_options": {"avg_pool": "num_queries=9"}})
    planned = training_runs(parse_choices("saep,avg_pool"), range(2), recipe, tmp_path, Placement(device="cpu"))
    assert [run.title for run in planned] == ["saep, seed 0", "avg_pool, seed 0", "saep, seed 1", "avg_pool, seed 1"]
    flags = planned[3].steps[1].arguments["flags"]
    pairs = dict(zip(flags[::2], flags[1::2], strict=True))
    stage1 = tmp_path / "runs" / "avg_pool" / "seed1" / "stage1"
    assert pairs["--pretrain_mm_mlp_adapter"] == f"{stage1}/mm_projector.safetensors"
    assert pairs["--mm_projector_type"] == "avg_pool" and pairs["--seed"] == "1" and pairs["--use_cpu"] == "True"
    assert json.loads(pairs["--mm_projector_options"]) == {"num_queries": 9}
    assert [step.name for step in planned[3].steps] == ["stage1", "stage2", "evaluation"]
    assert planned[3].model_path == stage1.parent / "stage2"
