"""Benchmarks by name: the files of this folder are the list, so there is none to edit."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llava_saep.errors import UserError

from ._base import Task


@dataclass(frozen=True)
class TaskSplit:
    """One set of questions of one benchmark."""

    task: Task
    split: str

    @property
    def label(self) -> str:
        """`pope`, or `mmbench:dev_all_rounds` where the task has several splits: names files and rows."""
        return self.task.name if len(self.task.splits) == 1 else f"{self.task.name}:{self.split}"


def task_names() -> list[str]:
    """Names of all benchmarks, in alphabetical order; imports none of them."""
    modules = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(module.name for module in modules if not module.name.startswith("_"))


@cache
def find_task(name: str) -> Task:
    """The benchmark in the file of this name.

    Raises:
        UserError: there is none; suggests the nearest name and lists all.
    """
    names = task_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown task {name!r}.{hint} Tasks: {', '.join(names)}")
    return importlib.import_module(f"{__package__}.{name}").TASK


def select_tasks(texts: Iterable[str]) -> list[TaskSplit]:
    """Read `--task` values: names with commas between them, `name:split` for another split than the usual ones.

    Returns:
        each selected split once, in the order given.
    Raises:
        UserError: an unknown task or split; lists what there is.
    """
    words = [word.strip() for text in texts for word in text.split(",") if word.strip()]
    selected: dict[tuple[str, str], TaskSplit] = {}
    for word in words:
        name, colon, split = word.partition(":")
        task = find_task(name)
        if colon and split not in task.splits:
            raise UserError(f"task {name!r} has no split {split!r}. Splits: {', '.join(task.splits)}")
        for each in (split,) if colon else task.default_splits:
            selected.setdefault((name, each), TaskSplit(task, each))
    return list(selected.values())
