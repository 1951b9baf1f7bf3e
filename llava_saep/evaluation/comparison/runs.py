"""Runs of a comparison: which there are, in which order their steps are done, several at once, and what is kept."""

import json
import multiprocessing
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import connection, forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from llava_saep.evaluation.benchmarks import BenchmarkSettings
from llava_saep.evaluation.comparison import steps
from llava_saep.evaluation.comparison.choice import Choice, selected
from llava_saep.evaluation.comparison.recipe import Recipe
from llava_saep.evaluation.comparison.steps import FAILURE_FILE, Placement, Step, read_json, record_path, write_json
from llava_saep.evaluation.tasks import TaskQuestion

_PRELOADED = (
    "llava_saep.evaluation.comparison.quiet",  # the first, since others say something when they are imported
    "llava_saep.train.run",
    "llava_saep.arguments",
    "llava_saep.generation",
    "llava_saep.evaluation.evaluate",
)
_SPEED_WARMUP, _SPEED_REPEATS = 5, 25

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model on its way: steps in their order, in a folder of its own.

    Args:
        seed: of its training; None for a model that was trained before.
        model_path: where the model is when `steps` are done.
    """

    label: str
    seed: int | None
    folder: Path
    model_path: Path
    steps: tuple[Step, ...]

    @property
    def title(self) -> str:
        """Label and seed."""
        return self.label if self.seed is None else f"{self.label}, seed {self.seed}"

    @property
    def open_steps(self) -> list[Step]:
        """Steps that have no record yet."""
        return [step for step in self.steps if not record_path(self.folder, step.name).is_file()]

    @property
    def failure(self) -> str | None:
        """Why the run did not come to its end, if it failed."""
        failure = read_json(self.folder / FAILURE_FILE)
        return None if failure is None else f"{failure['step']}: {failure['error']}"


# Which runs there are


def training_runs(
    choices: Sequence[Choice], seeds: Sequence[int], recipe: Recipe, folder: Path, placement: Placement
) -> list[Run]:
    """One run for each projector and seed; first the first seed of all of them."""
    return [_training_run(choice, seed, recipe, folder, placement) for seed in seeds for choice in choices]


def _training_run(choice: Choice, seed: int, recipe: Recipe, folder: Path, placement: Placement) -> Run:
    run_folder = folder / "runs" / choice.folder_name / f"seed{seed}"
    own_flags = _projector_flags(choice, recipe)
    done: list[Step] = []
    previous = ""
    for stage in recipe.stages:
        output_dir = run_folder / stage.name
        flags = {
            **{flag: _filled(value, previous) for flag, value in stage.flags.items()},
            **own_flags,
            "output_dir": str(output_dir),
            "seed": str(seed),
        }
        if placement.device == "cpu":
            flags["use_cpu"] = "True"
        words = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
        done.append(Step(name=stage.name, function=steps.train, arguments={"flags": words}))
        previous = str(output_dir)
    model_path = run_folder / recipe.stages[-1].name
    done.append(evaluation_step(model_path, recipe, run_folder, placement, trust_projector_code=":" in choice.name))
    return Run(label=choice.label, seed=seed, folder=run_folder, model_path=model_path, steps=tuple(done))


def _projector_flags(choice: Choice, recipe: Recipe) -> dict[str, str]:
    selection = selected(choice, recipe.projector_options)
    flags = {"mm_projector_type": choice.name, "mm_projector_options": json.dumps(dict(selection.options))}
    return {**flags, "trust_projector_code": "True"} if ":" in choice.name else flags


def _filled(value: Any, previous: str) -> str:
    return str(value).replace("{previous}", previous)


def model_runs(
    models: Mapping[str, Path], recipe: Recipe, folder: Path, placement: Placement, *, trust_projector_code: bool
) -> list[Run]:
    """One run for each trained model, by label: it is questioned, no more."""
    runs = []
    for label, model_path in models.items():
        run_folder = folder / "runs" / label
        step = evaluation_step(model_path, recipe, run_folder, placement, trust_projector_code=trust_projector_code)
        runs.append(Run(label=label, seed=None, folder=run_folder, model_path=model_path, steps=(step,)))
    return runs


def benchmark_runs(
    models: Mapping[str, Path],
    tasks: str,
    settings: BenchmarkSettings,
    placement: Placement,
    *,
    trust_projector_code: bool,
) -> list[Run]:
    """One run for each trained model, by label: benchmarks are put to it.

    Args:
        settings: `output_dir` is the comparison's.
    """
    runs = []
    for label, model_path in models.items():
        run_folder = settings.output_dir / "runs" / label
        arguments = {
            "model_path": model_path,
            "tasks": tasks,
            "settings": replace(settings, output_dir=run_folder / "evaluation"),
            "trust_projector_code": trust_projector_code,
            "device": placement.device,
        }
        step = Step(name="evaluation", function=steps.evaluate_tasks, arguments=arguments)
        runs.append(Run(label=label, seed=None, folder=run_folder, model_path=model_path, steps=(step,)))
    return runs


def evaluation_step(
    model_path: Path, recipe: Recipe, run_folder: Path, placement: Placement, *, trust_projector_code: bool
) -> Step:
    """The step that asks the recipe's questions."""
    arguments = {
        "model_path": model_path,
        "question_file": recipe.question_file,
        "image_folder": recipe.image_folder,
        "output_dir": run_folder / "evaluation",
        "max_new_tokens": recipe.max_new_tokens,
        "batch_size": recipe.batch_size,
        "trust_projector_code": trust_projector_code,
        "device": placement.device,
    }
    return Step(name="evaluation", function=steps.evaluate, arguments=arguments)


def speed_step(
    run: Run, questions: Sequence[TaskQuestion], placement: Placement, *, trust_projector_code: bool
) -> Step:
    """The step that measures the first token; for when nothing else runs.

    Args:
        questions: all that are asked; the first ones with an image are taken.
    """
    with_images = [question for question in questions if question.images]
    arguments = {
        "model_path": run.model_path,
        "questions": with_images[: _SPEED_WARMUP + _SPEED_REPEATS],
        "num_warmup": _SPEED_WARMUP,
        "num_repeats": _SPEED_REPEATS,
        "trust_projector_code": trust_projector_code,
        "device": placement.device,
    }
    return Step(name="speed", function=steps.measure_speed, arguments=arguments)


# Doing them


@cache
def _context(device: str) -> BaseContext:
    """How processes are started.

    On a processor they are forked from one that has imported everything: a step starts in a fraction of a second. A
    fork cannot use a GPU that the process before it has so much as looked for, so there each starts from nothing.
    """
    if device != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def _start_server(context: BaseContext) -> None:
    """Have the server that steps are forked from running, if there is one. Ctrl-C is the comparison's alone to see.

    What a process ignores, those ignore that it starts; and a server that is importing would answer with its trace.
    """
    if context.get_start_method() != "forkserver" or threading.current_thread() is not threading.main_thread():
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


class Interrupted(RuntimeError):
    """A step was ended because the comparison is."""


class Runner:
    """Does the open steps of runs, at most `num_jobs` runs at once. A failed run ends alone.

    Args:
        say: takes a line on each step that has ended.
    """

    def __init__(self, placement: Placement, *, num_jobs: int, say: Report):
        self._placement = placement
        self._num_jobs = num_jobs
        self._say = say
        self._processes: set[BaseProcess] = set()
        self._lock = threading.Lock()
        self._is_ending = False

    def do(self, runs: Sequence[Run]) -> None:
        """Bring every run to its end, or to its failure.

        Raises:
            KeyboardInterrupt: after every step's process has ended.
        """
        _start_server(_context(self._placement.device))
        began, pending = time.monotonic(), [run for run in runs if run.open_steps]
        if len(pending) < len(runs):
            self._say(f"{len(runs) - len(pending)} of {len(runs)} runs are there already")
        if pending:
            at_once = min(self._num_jobs, len(pending))
            self._say(f"{len(pending)} run{'s' if len(pending) > 1 else ''} to go, {at_once} at once")
        with ThreadPoolExecutor(max_workers=self._num_jobs) as pool:
            open_futures = {pool.submit(self._do_run, run) for run in pending}
            num_pending = len(open_futures)
            try:
                while open_futures:
                    finished, open_futures = wait(open_futures, return_when=FIRST_COMPLETED)
                    for future in finished:
                        future.result()
                    num_done = num_pending - len(open_futures)
                    left = (time.monotonic() - began) / num_done * len(open_futures)
                    rest = f"; about {describe_minutes(left)} left" if open_futures else ""
                    self._say(f"{num_done} of {num_pending} runs have ended{rest}")
            except BaseException:
                self._end(pool)
                raise

    def do_step(self, run: Run, step: Step) -> bool:
        """Do one step of a run; False when it failed, of which `run.failure` then speaks."""
        (run.folder / FAILURE_FILE).unlink(missing_ok=True)  # what failed is tried again
        output_dir = run.folder / step.name
        if step.function is steps.train:
            shutil.rmtree(output_dir, ignore_errors=True)  # a stage that was broken off begins anew
        began = time.monotonic()
        exit_code = self._wait_for(step, run.folder)
        if exit_code == 0 and record_path(run.folder, step.name).is_file():
            self._say(f"{run.title}: {step.name} done in {describe_minutes(time.monotonic() - began)}")
            return True
        if not (run.folder / FAILURE_FILE).is_file():
            message = f"the process ended with code {exit_code}" + (" (killed)" if (exit_code or 0) < 0 else "")
            write_json(run.folder / FAILURE_FILE, {"step": step.name, "error": message})
        self._say(f"{run.title}: FAILED in {run.failure} (log: {run.folder / steps.LOG_FILE})")
        return False

    def _do_run(self, run: Run) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        for step in run.open_steps:
            if not self.do_step(run, step):
                return

    def _wait_for(self, step: Step, folder: Path) -> int | None:
        with self._lock:
            if self._is_ending:
                raise Interrupted
            process = _context(self._placement.device).Process(
                target=steps.run_in_child, args=(step, folder, self._placement)
            )
            process.start()
            self._processes.add(process)
        connection.wait([process.sentinel])
        with self._lock:
            # Where one thread asks how a process ended while another starts one, which asks it too, one of them reads
            # nothing and takes it for code 255.
            process.join()
            self._processes.discard(process)
            if self._is_ending:
                raise Interrupted
        return process.exitcode

    def _end(self, pool: ThreadPoolExecutor) -> None:
        with self._lock:
            self._is_ending = True
            for process in self._processes:
                process.kill()  # a stage begins anew, and answers are on the disk
        pool.shutdown(wait=True, cancel_futures=True)


def describe_minutes(seconds: float) -> str:
    """`75.2` -> `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
