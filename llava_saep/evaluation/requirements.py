"""What benchmarks need on the disk, what of it is there, and how to get the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_saep.errors import UserError
from llava_saep.evaluation.runner import absent_images
from llava_saep.evaluation.tasks import Requirement, Task, TaskQuestion, TaskSplit

PURPOSES = {"questions": "nothing can be asked", "images": "nothing can be asked", "score": "answers cannot be scored"}
"""What does not work without a file, by its purpose."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at; `advice` is empty where nothing is to be done."""

    label: str
    level: Literal["ok", "missing"]
    subject: str
    detail: str = ""
    advice: str = ""


def task_folder(data_dir: Path, selected: TaskSplit) -> Path:
    """Where a benchmark's files are in LLaVA's layout."""
    return data_dir / selected.task.folder_name


def all_questions(task: Task, folder: Path, split: str) -> list[TaskQuestion]:
    """The questions of a split, of which there must be some.

    Raises:
        UserError: as `Task.questions`, or the file holds none.
    """
    questions = task.questions(folder, split)
    if not questions:
        files = [each.path for each in task.requirements(folder, split) if each.purpose == "questions"]
        raise UserError(f"{files[0]}: holds no questions; is the file complete?")
    return questions


def missing_requirements(data_dir: Path, selected: TaskSplit) -> list[Requirement]:
    """What a benchmark needs and does not have; an empty folder counts as missing."""
    folder = task_folder(data_dir, selected)
    needed = selected.task.requirements(folder, selected.split)
    return [requirement for requirement in needed if not _is_there(requirement.path)]


def check_requirements(
    data_dir: Path, tasks: Iterable[TaskSplit], *, purposes: Collection[str] = ("questions", "images")
) -> None:
    """Raise UserError with everything that is missing for these purposes, before a model is loaded."""
    lines = []
    for selected in tasks:
        for missing in missing_requirements(data_dir, selected):
            if missing.purpose in purposes:
                lines.append(f"{selected.label}: {missing.path} is missing. {missing.source}")
    if lines:
        raise UserError("\n".join([*lines, "`llava-saep eval doctor` looks at all benchmarks; --data-dir says where."]))


def examine(data_dir: Path, selected: TaskSplit) -> list[Finding]:
    """All there is to say about a benchmark's files; questions are read, and their images looked for."""
    folder = task_folder(data_dir, selected)
    needed = selected.task.requirements(folder, selected.split)
    missing = {requirement.path for requirement in needed if not _is_there(requirement.path)}
    findings = []
    for requirement in needed:
        is_missing = requirement.path in missing
        findings.append(
            Finding(
                label=selected.label,
                level="missing" if is_missing else "ok",
                subject=str(requirement.path),
                detail=f"without it {PURPOSES[requirement.purpose]}" if is_missing else "",
                advice=requirement.source if is_missing else "",
            )
        )
    # Where something is missing, what follows from that would only be said twice.
    return findings if missing else [*findings, _examine_questions(folder, selected)]


def _examine_questions(folder: Path, selected: TaskSplit) -> Finding:
    """Read the questions, and count images that are not there."""
    try:
        questions = all_questions(selected.task, folder, selected.split)
    except UserError as error:
        advice = "replace the file by the published one"
        return Finding(label=selected.label, level="missing", subject="questions", detail=str(error), advice=advice)
    absent = absent_images(questions)
    subject = f"{len(questions):,} question{'s' if len(questions) > 1 else ''}"
    if not absent:
        return Finding(label=selected.label, level="ok", subject=subject)
    return Finding(
        label=selected.label,
        level="missing",
        subject=subject,
        detail=f"{len(absent)} of their images are missing, the first one {absent[0]}",
        advice="unpack the images again; `--on_bad_image exclude` leaves such questions out and reports them",
    )


def _is_there(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))
