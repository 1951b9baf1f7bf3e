"""`llava-saep eval --task`: benchmarks on a model, or on an answer file."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava_saep.commands.evaluate.flags import DEFAULT_BATCH_SIZE
from llava_saep.errors import UserError
from llava_saep.evaluation.answer_files import check_free
from llava_saep.evaluation.benchmarks import (
    BenchmarkSettings,
    answer_file,
    benchmark_folder,
    check_benchmarks,
    evaluate_benchmarks,
    score_answer_file,
    unscored,
)
from llava_saep.evaluation.judge import Judge, find_api_key
from llava_saep.evaluation.results import terminal_report
from llava_saep.evaluation.tasks import JudgedTask, Task, TaskSplit, find_task, select_tasks, task_names
from llava_saep.evaluation.tasks._base import DATA_ROOT
from llava_saep.evaluation.tasks._files import read_answers

NOT_SCORED_EXIT_CODE = 1
"""Answers are written, but a benchmark that can be scored here was not."""


def print_tasks() -> int:
    """Print the benchmarks with their folders and splits."""
    rows = [("task", "benchmark", "folder in --data-dir", "splits (those in brackets where they are named)")]
    rows += [_task_row(find_task(name)) for name in task_names()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\n* labels are not published: files to upload are written")
    return 0


def _task_row(task: Task) -> tuple[str, str, str, str]:
    names = [split if task.has_labels(split) else f"{split}*" for split in task.splits]
    pairs = zip(names, task.splits, strict=True)
    splits = [name if split in task.default_splits else f"({name})" for name, split in pairs]
    return task.name, task.title, task.folder_name, ", ".join(splits)


def run(arguments: argparse.Namespace) -> int:
    """Answer and score benchmarks; prints the table and writes the results.

    Returns:
        0; 1 where answers could not be scored.
    """
    from llava_saep.commands.evaluate.model import chosen_model, chosen_output_dir
    from llava_saep.evaluation import ranks
    from llava_saep.evaluation.asking import AskedModel

    tasks = select_tasks([arguments.task])
    if not tasks:
        raise UserError(f"--task {arguments.task!r} names no benchmark; --task list prints all")
    settings = _settings(arguments, tasks, chosen_output_dir(arguments))
    check_benchmarks(tasks, settings)
    ranks.from_rank_zero(lambda: check_free(answer_file(settings, each) for each in tasks))
    entries = evaluate_benchmarks(AskedModel.load(chosen_model(arguments)), tasks, settings)
    if not entries:
        return 0
    print("\n" + terminal_report(entries))
    print(f"\nanswers and results: {settings.output_dir}")
    return NOT_SCORED_EXIT_CODE if unscored(entries, tasks) else 0


def score_answers(arguments: argparse.Namespace) -> int:
    """Score an answer file of one benchmark; prints the table.

    Returns:
        0; 1 where a judge is needed and none was named.
    """
    from llava_saep.evaluation.results import write_result

    tasks = select_tasks([arguments.task])
    if len(tasks) != 1:
        names = ", ".join(each.label for each in tasks) or "none"
        raise UserError(f"--answers is one file of one set of questions, but --task {arguments.task} names {names}")
    path = Path(arguments.answers).expanduser()
    output_dir = Path(arguments.output_dir).expanduser() if arguments.output_dir else path.parent
    settings = _settings(arguments, tasks, output_dir)
    entry = score_answer_file(tasks[0], read_answers(path), path, settings)
    print(terminal_report({entry["label"]: entry}))
    if arguments.output_dir:
        folder = benchmark_folder(settings, tasks[0])
        write_result(folder, entry)
        print(f"\nresult: {folder}")
    return NOT_SCORED_EXIT_CODE if unscored({tasks[0].label: entry}, tasks) else 0


def _settings(arguments: argparse.Namespace, tasks: Sequence[TaskSplit], output_dir: Path) -> BenchmarkSettings:
    return BenchmarkSettings(
        data_dir=Path(arguments.data_dir or DATA_ROOT).expanduser(),
        output_dir=output_dir,
        batch_size=arguments.batch_size or DEFAULT_BATCH_SIZE,
        limit=arguments.limit,
        max_new_tokens=arguments.max_new_tokens,
        on_bad_image=arguments.on_bad_image,
        judge=chosen_judge(arguments, tasks),
    )


def chosen_judge(arguments: argparse.Namespace, tasks: Sequence[TaskSplit]) -> Judge | None:
    """The judge that the flags name.

    Args:
        tasks: what it is to rate, among others.
    Raises:
        UserError: none of the tasks has answers for a judge, or the file of its key cannot be read.
    """
    if arguments.judge_url is None:
        return None
    if not any(isinstance(each.task, JudgedTask) for each in tasks):
        rated = ", ".join(name for name in task_names() if isinstance(find_task(name), JudgedTask))
        raise UserError(
            f"--judge-url is for benchmarks whose answers a language model rates ({rated}); "
            f"--task {arguments.task} names none"
        )
    return Judge(url=arguments.judge_url, model=arguments.judge_model, api_key=find_api_key(arguments.judge_key_file))
