"""The folder of a comparison: whose it is, that only one is at work in it, and what it belongs to."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError
from llava_saep.evaluation.comparison.recipe import RECIPE_FILE
from llava_saep.evaluation.comparison.steps import read_json, write_json
from projectors import ProjectorError

logger = logging.getLogger(__name__)

PLAN_FILE = "comparison.json"
LOCK_FILE = ".lock"
_BEFORE_A_PLAN = (RECIPE_FILE, LOCK_FILE, "data", "data.unfinished")
"""What a comparison that was killed early may have left without a plan."""
_EVALUATION_STEPS = ("evaluation", "speed")
_KEYS_OF_REPORTS = {"title", "chance_file", "batch_size"}
"""Of a recipe: what has no say in training and answers."""


def refuse_strangers(folder: Path) -> None:
    """Leave a folder alone in which somebody keeps other things.

    Raises:
        UserError: it is a file, or holds files and is no comparison's.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder}: is a file; name a folder")
    if not folder.is_dir() or (folder / PLAN_FILE).is_file():
        return
    others = sorted(path.name for path in folder.iterdir() if path.name not in _BEFORE_A_PLAN)
    if others:
        raise UserError(
            f"--output-dir {folder}: holds {', '.join(others[:3])}{', ...' if len(others) > 3 else ''} and is no "
            "comparison's; name an empty or new folder"
        )


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the output folder of a comparison, which no other one may use meanwhile; it is made where there is none.

    A mistake inside the block that leaves a new folder empty leaves none; parents that were made stay.

    Raises:
        UserError: it holds other files, cannot be written, or is in use.
    """
    refuse_strangers(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--output-dir {folder}: another comparison is at work in it") from error
        except OSError as error:  # some file systems of clusters have no locks
            logger.debug("%s: cannot be locked (%s)", folder, error)
        try:
            yield
        except (UserError, ProjectorError):
            if is_new and [path.name for path in folder.iterdir()] == [LOCK_FILE]:
                (folder / LOCK_FILE).unlink()
                folder.rmdir()
            raise


def write_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Write down what a reserved folder belongs to.

    What has changed since is taken over where no run has done a step that it has a say in: a recipe may be corrected
    at the stage that failed.

    Raises:
        UserError: the folder holds another comparison.
    """
    # A plan of earlier code may lack what is looked at by now.
    stored = read_json(folder / PLAN_FILE) or {}
    differing = sorted(key for key, value in stored.items() if value != plan.get(key))
    if differing:
        _refuse_other_plan(folder, stored, plan, differing)
        logger.warning("%s: the %s changed since; no run has come to what changed", folder, " and ".join(differing))
    write_json(folder / PLAN_FILE, plan)


def _refuse_other_plan(
    folder: Path, stored: Mapping[str, Any], plan: Mapping[str, Any], differing: Sequence[str]
) -> None:
    what = f"other {' and '.join(differing)}"
    if set(differing) <= {"recipe", "questions"}:
        steps = _steps_that_differ(stored["recipe"], plan["recipe"]) if "recipe" in differing else []
        if "questions" in differing:
            steps = [*steps, *_EVALUATION_STEPS]
        done = [(step, num_runs) for step in dict.fromkeys(steps) if (num_runs := _count_runs_with(folder, step))]
        if not done:
            return
        what += "; " + ", ".join(f"{step} is done in {num_runs} of its runs" for step, num_runs in done)
    raise UserError(f"--output-dir {folder}: holds another comparison ({what}); name another folder")


def _steps_that_differ(stored: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """Steps whose results two recipes, or what stands for one where nothing is trained, may not share."""
    differing = {key for key in {*stored, *recipe} if stored.get(key) != recipe.get(key)} - _KEYS_OF_REPORTS
    if not differing:
        return []
    stages: list[str] = []
    before, after = stored.get("stages", []), recipe.get("stages", [])
    if "projector_options" in differing:
        stages = [stage["name"] for stage in (*before, *after)]
    elif "stages" in differing:
        num_alike = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))))
        stages = [stage["name"] for stage in (*before[num_alike:], *after[num_alike:])]
    return [*stages, *_EVALUATION_STEPS]


def _count_runs_with(folder: Path, step: str) -> int:
    """How many runs, of any projector or model that was ever compared here, have done a step."""
    records = (*folder.glob(f"runs/*/{step}.json"), *folder.glob(f"runs/*/seed*/{step}.json"))
    return len(records)
