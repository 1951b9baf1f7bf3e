"""From the flags of `llava-saep compare` to the runs that they ask for."""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_saep.arguments import parse_arguments
from llava_saep.commands.compare.flags import DEFAULT_BUDGET, DEFAULT_SEEDS, DEFAULT_WORLD
from llava_saep.commands.evaluate.flags import DEFAULT_BATCH_SIZE
from llava_saep.errors import UserError
from llava_saep.evaluation.comparison.choice import Choice, parse_choices, selected
from llava_saep.evaluation.comparison.recipe import RECIPE_FILE, Recipe, read_recipe
from llava_saep.evaluation.comparison.runs import Run, benchmark_runs, model_runs, training_runs
from llava_saep.evaluation.comparison.steps import Placement
from llava_saep.evaluation.fingerprints import questions_fingerprint
from llava_saep.evaluation.judge import Judge
from llava_saep.evaluation.questions import (
    DEFAULT_MAX_NEW_TOKENS,
    Question,
    as_task_question,
    read_questions,
)
from llava_saep.evaluation.tasks import TaskQuestion
from projectors import select_projector

_FLAGS_OF_FILES = ("data_path", "image_folder", "eval_data_path", "eval_image_folder")

ROOT = Path(__file__).parents[3]
EMBEDDED = ROOT / "playground" / "comparison.py"
"""Writes data and recipe of the embedded job. It is run as a program: what is installed imports no playground."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the flags ask for: runs in a folder, and what is needed to report on them.

    Args:
        plan: what the folder belongs to; another plan is refused there.
        questions: what is asked, of which the first are used to measure speed.
        trusted: labels whose projector is code that the user has named or trusts.
        judge: rates free answers to benchmarks, if anybody does.
        is_embedded: training is on the generated images that come with this project.
    """

    runs: tuple[Run, ...]
    recipe: Recipe
    questions: tuple[TaskQuestion, ...]
    plan: Mapping[str, Any]
    folder: Path
    placement: Placement
    num_jobs: int
    reference: str | None
    trusted: frozenset[str]
    judge: Judge | None = None
    is_embedded: bool = False


def plan_comparison(arguments: argparse.Namespace) -> Comparison:
    """Check everything that can be checked before anything is trained or loaded.

    Raises:
        UserError, ProjectorError: a flag names something that does not exist, or cannot be used.
    """
    if arguments.projectors:
        return _plan_training(arguments)
    return _plan_benchmarks(arguments) if arguments.task else _plan_models(arguments)


def _plan_training(arguments: argparse.Namespace) -> Comparison:
    from llava_saep.evaluation.runner import check_images

    choices = parse_choices(arguments.projectors)
    as_shown = {choice.written: choice.label for choice in choices}
    reference = _reference(as_shown.get(arguments.reference, arguments.reference), list(as_shown.values()))
    placement = _placement(arguments)
    folder = Path(arguments.output_dir)
    recipe_path = Path(arguments.recipe) if arguments.recipe else _write_embedded_recipe(arguments, folder)
    recipe, content = read_recipe(recipe_path)
    _check_placeable(choices, recipe)
    questions = read_questions(recipe.question_file)
    _refuse_unscored(questions, recipe.question_file)
    asked = _as_asked(questions, recipe.image_folder)
    check_images(asked, advice=f"The recipe's image_folder is {recipe.image_folder}")
    seeds = range(arguments.seeds or DEFAULT_SEEDS)
    runs = training_runs(choices, seeds, recipe, folder.absolute(), placement)
    _check_stages(recipe, runs[: len(choices)])
    return Comparison(
        runs=tuple(runs),
        recipe=recipe,
        questions=asked,
        plan={
            "kind": "training",
            "recipe": content,
            "questions": questions_fingerprint(asked),
            **_described(placement),
        },
        folder=folder,
        placement=placement,
        num_jobs=arguments.jobs or _default_jobs(placement),
        reference=reference,
        trusted=frozenset(choice.label for choice in choices if ":" in choice.name),
        is_embedded=not arguments.recipe,
    )


def _write_embedded_recipe(arguments: argparse.Namespace, folder: Path) -> Path:
    """Have the playground's program write data and recipe into the output folder."""
    if not EMBEDDED.is_file():
        raise UserError(
            f"the embedded job is not installed: it is in playground/ of the source code, and there is no {EMBEDDED}. "
            "Run `llava-saep compare` from a checkout (pip install -e .), or give a recipe of your own: --recipe FILE"
        )
    command = [sys.executable, "-m", "playground.comparison", "--output_dir", str(folder.absolute())]
    command += ["--world", arguments.world or DEFAULT_WORLD, "--budget", arguments.budget or DEFAULT_BUDGET]
    if not (folder / "data").is_dir():
        print(f"generating images and conversations in {folder / 'data'}", flush=True)
    search_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": search_path}, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        message = result.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise UserError(message[0].removeprefix("llava-saep compare: "))
    return folder / RECIPE_FILE


def _plan_models(arguments: argparse.Namespace) -> Comparison:
    from llava_saep.commands.evaluate.question_files import default_image_folder
    from llava_saep.evaluation.runner import check_images

    question_file = Path(arguments.question_file)
    questions = read_questions(question_file)
    _refuse_unscored(questions, question_file)
    image_folder = Path(arguments.image_folder) if arguments.image_folder else default_image_folder(question_file)
    asked = _as_asked(questions, image_folder)
    check_images(asked)
    recipe = Recipe(
        title=f"trained models on {question_file.name}",
        stages=(),
        question_file=question_file.absolute(),
        image_folder=image_folder.absolute(),
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size or DEFAULT_BATCH_SIZE,
        projector_options={},
    )
    models, placement, folder = _find_models(arguments), _placement(arguments), Path(arguments.output_dir)
    trusts = arguments.trust_projector_code
    described = {
        "question_file": str(recipe.question_file),
        "image_folder": str(recipe.image_folder),
        "max_new_tokens": recipe.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
        "questions": questions_fingerprint(asked),
    }
    return Comparison(
        runs=tuple(model_runs(models, recipe, folder.absolute(), placement, trust_projector_code=trusts)),
        recipe=recipe,
        questions=asked,
        plan={"kind": "models", "recipe": described, **_described(placement)},
        folder=folder,
        placement=placement,
        num_jobs=arguments.jobs or 1,
        reference=_reference(arguments.reference, list(models)),
        trusted=frozenset(models) if trusts else frozenset(),
    )


def _plan_benchmarks(arguments: argparse.Namespace) -> Comparison:
    from llava_saep.commands.evaluate.tasks import chosen_judge
    from llava_saep.evaluation.benchmarks import BenchmarkSettings, check_benchmarks
    from llava_saep.evaluation.requirements import task_folder
    from llava_saep.evaluation.tasks import select_tasks
    from llava_saep.evaluation.tasks._base import DATA_ROOT

    tasks = select_tasks([arguments.task])
    if not tasks:
        raise UserError(f"--task {arguments.task!r} names no benchmark; `llava-saep eval --task list` prints all")
    judge = chosen_judge(arguments, tasks)
    data_dir = Path(arguments.data_dir or DATA_ROOT).expanduser().absolute()
    models, placement, folder = _find_models(arguments), _placement(arguments), Path(arguments.output_dir)
    settings = BenchmarkSettings(
        data_dir=data_dir,
        output_dir=folder.absolute(),
        batch_size=arguments.batch_size or DEFAULT_BATCH_SIZE,
        limit=arguments.limit,
        max_new_tokens=arguments.max_new_tokens,
        judge=judge,
    )
    check_benchmarks(tasks, settings)
    questions = [q for each in tasks for q in each.task.questions(task_folder(data_dir, each), each.split)]
    trusts = arguments.trust_projector_code
    labels = [each.label for each in tasks]
    described = {
        "tasks": labels,
        "data_dir": str(data_dir),
        "limit": arguments.limit,
        "max_new_tokens": arguments.max_new_tokens,
        "questions": questions_fingerprint(questions),
    }
    return Comparison(
        runs=tuple(benchmark_runs(models, arguments.task, settings, placement, trust_projector_code=trusts)),
        recipe=Recipe.of_benchmarks(labels, data_dir),
        questions=tuple(questions),
        plan={"kind": "benchmarks", "recipe": described, **_described(placement)},
        judge=settings.judge,
        folder=folder,
        placement=placement,
        num_jobs=arguments.jobs or 1,
        reference=_reference(arguments.reference, list(models)),
        trusted=frozenset(models) if trusts else frozenset(),
    )


def _find_models(arguments: argparse.Namespace) -> dict[str, Path]:
    """Folders of the models by label; those of the hub are fetched.

    Raises:
        UserError: one is absent, or holds no model that can be loaded.
    """
    from llava_saep.model.hub import local_folder
    from llava_saep.model.loading import inspect_folder
    from llava_saep.model.projector_selection import trusting_projector_code

    folders = {label: Path(local_folder(path)) for label, path in labelled(arguments.model_path).items()}
    for folder in folders.values():
        if not folder.is_dir():
            raise UserError(f"--model-path {folder}: no such folder")
        with trusting_projector_code(arguments.trust_projector_code):
            inspect_folder(folder)
    return folders


def labelled(paths: Sequence[str]) -> dict[str, str]:
    """Labels of models: the shortest endings of their paths, of at least one folder, that tell them apart."""
    parts = {path: Path(path).absolute().parts for path in paths}
    if len(set(parts.values())) < len(paths):
        raise UserError("--model-path names one folder twice")
    longest = max(map(len, parts.values()))
    endings = ({"-".join(words[-length:]): path for path, words in parts.items()} for length in range(1, longest + 1))
    labels = next(found for found in endings if len(found) == len(paths))
    return {label.replace(os.sep, ""): path for label, path in labels.items()}


def _as_asked(questions: Sequence[Question], image_folder: Path) -> tuple[TaskQuestion, ...]:
    return tuple(as_task_question(question, image_folder) for question in questions)


def _refuse_unscored(questions: Sequence[Question], path: Path) -> None:
    if all(question.answer is None for question in questions):
        raise UserError(f"{path}: no question has an `answer` to compare with")


def _check_placeable(choices: Sequence[Choice], recipe: Recipe) -> None:
    """Raise ProjectorError or UserError before anything is trained where no model can be made of a projector."""
    from llava_saep.model.loading import make_config

    for choice in choices:
        for stage in recipe.stages:
            language_model, vision_tower = (stage.flags.get(name) for name in ("model_name_or_path", "vision_tower"))
            if language_model is None or vision_tower is None or "," in str(vision_tower):
                continue
            if "{previous}" in f"{language_model}{vision_tower}":  # made by the stage before
                continue
            make_config(
                language_model=str(language_model),
                vision_tower=str(vision_tower),
                projector=selected(choice, recipe.projector_options),
                image_token_id=0,
            )


def _check_stages(recipe: Recipe, runs: Sequence[Run]) -> None:
    """Raise UserError or ProjectorError for a stage that would fail for its flags, hours after the first one began."""
    for name in recipe.projector_options:
        select_projector(name, trust_projector_code=True)
    for stage in recipe.stages:
        for flag in _FLAGS_OF_FILES:
            value = str(stage.flags.get(flag, ""))
            if value and "," not in value and "{previous}" not in value and not Path(value).exists():
                raise UserError(f"recipe, stage {stage.name}: --{flag} {value}: no such file or folder")
    if any("{previous}" in str(value) for value in recipe.stages[0].flags.values()):
        raise UserError(
            f"recipe, stage {recipe.stages[0].name}: {{previous}} is the stage before, and this is the first"
        )
    for run in runs:
        for step in run.steps:
            if "flags" in step.arguments:
                try:
                    parse_arguments(step.arguments["flags"])
                except UserError as error:
                    raise UserError(f"recipe, stage {step.name}: {error}") from error


def _placement(arguments: argparse.Namespace) -> Placement:
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not (device.split(":")[0] == "cuda" and torch.cuda.is_available()):
        raise UserError(f"--device {device}: expected cpu, or cuda or cuda:N on a machine with NVIDIA GPUs")
    return Placement(device=device, num_threads=arguments.threads)


def _described(placement: Placement) -> dict[str, Any]:
    return {"device": placement.device, "threads": placement.num_threads}


def _default_jobs(placement: Placement) -> int:
    """As many runs as there are cores for their threads; one on a GPU, whose memory they would share."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if placement.device != "cpu" else max(1, num_cores // placement.num_threads)


def _reference(label: str | None, labels: Sequence[str]) -> str | None:
    if label is None:
        return labels[0] if len(labels) > 1 else None
    if label not in labels:
        raise UserError(f"--reference {label}: not among what is compared: {', '.join(labels)}")
    return label
