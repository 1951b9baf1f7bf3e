"""Benchmarks on a model, or on answers that are there already: answers, scores, upload files, and a result for each."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llava_saep.errors import UserError
from llava_saep.evaluation.answer_files import Record
from llava_saep.evaluation.asking import AskedModel
from llava_saep.evaluation.fingerprints import file_fingerprint, files_fingerprints, questions_fingerprint
from llava_saep.evaluation.judge import Judge, review_answers
from llava_saep.evaluation.requirements import all_questions, check_requirements, missing_requirements, task_folder
from llava_saep.evaluation.results import (
    collect_results,
    describe_program,
    result_as_json,
    write_overview,
    write_result,
)
from llava_saep.evaluation.runner import Answers, BadImagePolicy, answer_questions, check_images
from llava_saep.evaluation.tasks import Answer, JudgedTask, Task, TaskQuestion, TaskResult, TaskSplit
from llava_saep.evaluation.tasks._matching import match_answers

if TYPE_CHECKING:
    from llava_saep.generation import GenerationOptions

T = TypeVar("T", bound=Task)

ANSWER_FILE, REVIEW_FILE, UPLOAD_FOLDER = "answers.jsonl", "reviews.jsonl", "upload"


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """How benchmarks are run.

    Args:
        data_dir: holds the folders of LLaVA's Evaluation guide.
        output_dir: gets one folder per benchmark, and the overview.
        limit: only the first questions of each; None: all.
        max_new_tokens: None: what LLaVA allows for the benchmark.
        on_bad_image: None: files that are not there are an error before anything is asked, and files that turn out
            damaged are excluded; else as in `Asking`.
        judge: rates free answers; None: they are written for one.
    """

    data_dir: Path
    output_dir: Path
    batch_size: int = 32
    limit: int | None = None
    max_new_tokens: int | None = None
    on_bad_image: BadImagePolicy | None = None
    judge: Judge | None = None


@dataclass
class _Outcome:
    """What became of a set of answers."""

    result: TaskResult | None = None
    notes: list[str] = field(default_factory=list)
    uploads: list[Path] = field(default_factory=list)
    num_failed_judge_requests: int = 0


def benchmark_folder(settings: BenchmarkSettings, selected: TaskSplit) -> Path:
    """Where the files of one set of questions go; a limited run leaves those of the whole alone."""
    limited = "" if settings.limit is None else f"_first_{settings.limit}"
    return settings.output_dir / f"{selected.label.replace(':', '_')}{limited}"


def answer_file(settings: BenchmarkSettings, selected: TaskSplit) -> Path:
    """Where a model's answers to one set of questions go."""
    return benchmark_folder(settings, selected) / ANSWER_FILE


def _label(settings: BenchmarkSettings, selected: TaskSplit) -> str:
    return selected.label if settings.limit is None else f"{selected.label} (first {settings.limit})"


def evaluate_benchmarks(
    model: AskedModel, tasks: Sequence[TaskSplit], settings: BenchmarkSettings
) -> dict[str, dict[str, Any]]:
    """Run benchmarks one after the other; each leaves its result before the next one begins.

    Returns:
        an entry of results.json per benchmark on rank 0, nothing on other ranks.
    Raises:
        UserError: a benchmark's file is absent or malformed, or see `answer_questions`.
    """
    check_benchmarks(tasks, settings)
    entries = {}
    for selected in tasks:
        entry = _evaluate(model, selected, settings)
        if entry is not None:
            entries[selected.label] = entry
            write_result(benchmark_folder(settings, selected), entry)
            write_overview(settings.output_dir, collect_results(settings.output_dir, model.fingerprint))
    return entries


def unscored(entries: Mapping[str, Mapping[str, Any]], tasks: Sequence[TaskSplit]) -> dict[str, str]:
    """Benchmarks whose answers were to be scored and were not, with the reason, by label.

    Args:
        entries: what `evaluate_benchmarks` returned.
    """
    due = [each.label for each in tasks if each.task.has_labels(each.split)]
    return {label: "; ".join(entries[label]["notes"]) for label in due if entries[label]["result"] is None}


def score_answer_file(selected: TaskSplit, answers: Sequence[Answer], path: Path, settings: BenchmarkSettings) -> dict:
    """Score answers of any model, LLaVA's among them; upload files and reviews go to `settings.output_dir`.

    Returns:
        an entry as in results.json, without what is known only where answers are made.
    Raises:
        UserError: a benchmark's file is absent or malformed, or the answers belong to other questions.
    """
    task = first_questions(selected.task, settings.limit)
    folder = task_folder(settings.data_dir, selected)
    check_requirements(settings.data_dir, [selected], purposes=["questions"])
    questions = all_questions(task, folder, selected.split)
    if not any(match_answers(questions, answers).answers):
        raise UserError(
            f"{path}: none of its {len(answers)} answers is to one of the {len(questions)} questions of "
            f"{selected.label}; they are matched by question_id, and by prompt too where several questions have one id"
        )
    outcome = _score(TaskSplit(task, selected.split), answers, settings, scores_are_due=True)
    model_ids = sorted({str(answer.fields.get("model_id", "unknown")) for answer in answers})
    import torch

    return {
        "label": _label(settings, selected),
        "model": {"id": ", ".join(model_ids), "fingerprint": f"answers {file_fingerprint(path)[:16]}"},
        "data": _describe_data(selected, folder, questions, settings),
        "program": describe_program(torch.device("cpu")),
        "excluded_questions": [],
        **_describe_outcome(outcome),
    }


def first_questions(task: T, limit: int | None) -> T:
    """The same benchmark with its first questions alone, for asking and for scoring."""
    if limit is None:
        return task
    limited = copy.copy(task)
    limited.questions = lambda folder, split: task.questions(folder, split)[:limit]
    return limited


def check_benchmarks(tasks: Sequence[TaskSplit], settings: BenchmarkSettings) -> None:
    """Read all questions and look for their images, before a model is loaded and the first benchmark run.

    Raises:
        UserError: a file is absent or malformed; images are missing, and `settings.on_bad_image` is not "exclude".
    """
    check_requirements(settings.data_dir, tasks)
    for selected in tasks:
        task = first_questions(selected.task, settings.limit)
        questions = all_questions(task, task_folder(settings.data_dir, selected), selected.split)
        if settings.on_bad_image != "exclude":
            check_images(questions)


def _evaluate(model: AskedModel, selected: TaskSplit, settings: BenchmarkSettings) -> dict[str, Any] | None:
    task = first_questions(selected.task, settings.limit)
    folder = task_folder(settings.data_dir, selected)
    questions = task.questions(folder, selected.split)
    options = decoding_options(model, task, settings)
    started = time.monotonic()
    answers = answer_questions(
        questions,
        model.asking(options, batch_size=settings.batch_size, on_bad_image=settings.on_bad_image or "exclude"),
        answers_path=answer_file(settings, selected),
        model_id=model.choice.model_id,
        fingerprint=model.answers_fingerprint(options),
        description=selected.label,
    )
    if answers is None:
        return None
    seconds = time.monotonic() - started
    given = [answer_of(record) for record in answers.records if record is not None]
    outcome = _score(TaskSplit(task, selected.split), given, settings)
    return {
        "label": _label(settings, selected),
        "model": model.describe(),
        "prompt": model.describe_prompt(questions[0] if questions else None),
        "decoding": dataclasses.asdict(options),
        "preprocessing": model.describe_preprocessing(),
        "data": _describe_data(selected, folder, questions, settings),
        "program": describe_program(model.predictor.model.device),
        "batch_size": settings.batch_size,
        "seconds": round(seconds, 3),
        "excluded_questions": _describe_excluded(answers),
        **_describe_outcome(outcome),
    }


def decoding_options(model: AskedModel, task: Task, settings: BenchmarkSettings) -> GenerationOptions:
    """Greedy, with the limit that was asked for, or the benchmark's, or less where the model's context is short."""
    return model.answer_options(settings.max_new_tokens, task.max_new_tokens, task.name)


def answer_of(record: Record) -> Answer:
    """A line of our answer file as benchmarks take it."""
    return Answer(question_id=record["question_id"], text=record["text"], prompt=record["prompt"], fields=record)


def _score(
    selected: TaskSplit, answers: Sequence[Answer], settings: BenchmarkSettings, *, scores_are_due: bool = False
) -> _Outcome:
    """Score what can be scored here, and write upload files; what cannot is said in a note.

    Args:
        scores_are_due: missing labels are an error; else the answers are there, and worth more than the message.
    """
    task, split, outcome = selected.task, selected.split, _Outcome()
    folder = task_folder(settings.data_dir, selected)
    missing = [each for each in missing_requirements(settings.data_dir, selected) if each.purpose == "score"]
    if isinstance(task, JudgedTask):
        _judge(TaskSplit(task, split), answers, settings, outcome, scores_are_due=scores_are_due)
    elif not task.has_labels(split):
        outcome.notes.append("the labels of these questions are not published: upload the files to the benchmark")
    elif missing and not scores_are_due:
        outcome.notes.append(f"not scored: {missing[0].path} is missing ({missing[0].source})")
    else:
        _score_labelled(selected, answers, folder, outcome, scores_are_due=scores_are_due)
    if settings.limit is None:
        _export(selected, answers, settings, outcome)
    else:
        outcome.notes.append(
            f"only the first {settings.limit} questions: not this benchmark's number, and no upload files"
        )
    if outcome.result is None:
        outcome.notes += _misfit_notes(task.questions(folder, split), answers)
    return outcome


def _misfit_notes(questions: Sequence[TaskQuestion], answers: Sequence[Answer]) -> list[str]:
    """What an upload file, or a later score, lacks or leaves out; a score says it itself."""
    exclusions = match_answers(questions, answers).exclusions
    return [f"{each.count} {each.reason}, the first one {each.examples[0]}" for each in exclusions]


def _score_labelled(
    selected: TaskSplit, answers: Sequence[Answer], folder: Path, outcome: _Outcome, *, scores_are_due: bool
) -> None:
    try:
        outcome.result = selected.task.score(folder, selected.split, answers)
    except UserError as error:
        if scores_are_due:
            raise
        # Benchmarks that come after this one shall still be run.
        outcome.notes.append(f"not scored: {error}")


def _export(selected: TaskSplit, answers: Sequence[Answer], settings: BenchmarkSettings, outcome: _Outcome) -> None:
    folder = task_folder(settings.data_dir, selected)
    output = benchmark_folder(settings, selected) / UPLOAD_FOLDER
    try:
        outcome.uploads += selected.task.export(folder, selected.split, answers, output)
    except UserError as error:
        # Answers and scores are there; a file that cannot be made of them is no reason to lose them.
        outcome.notes.append(f"no upload file: {error}")


def _judge(
    selected: TaskSplit,
    answers: Sequence[Answer],
    settings: BenchmarkSettings,
    outcome: _Outcome,
    *,
    scores_are_due: bool,
) -> None:
    task = selected.task
    assert isinstance(task, JudgedTask)
    if settings.judge is None:
        outcome.notes.append("answers are rated by a language model: name one with --judge-url and --judge-model")
        return
    path = benchmark_folder(settings, selected) / REVIEW_FILE
    folder = task_folder(settings.data_dir, selected)
    try:
        requests = task.judge_requests(folder, selected.split, answers)
        description = f"{selected.label}, judge"
        reviews = review_answers(requests, settings.judge, path, task.review_line, description=description)
        outcome.num_failed_judge_requests = reviews.num_failed
        result = task.score_reviews(folder, selected.split, reviews.lines)
        misfits = task.misfits(folder, selected.split, answers)
        outcome.result = dataclasses.replace(result, exclusions=result.exclusions + misfits)
    except UserError as error:
        if scores_are_due:
            raise
        outcome.notes.append(f"not rated: {error}")
        return
    outcome.notes.append(f"judge: {settings.judge.description}; reviews in {path}")


def _describe_data(
    selected: TaskSplit, folder: Path, questions: Sequence[TaskQuestion], settings: BenchmarkSettings
) -> dict[str, Any]:
    files = [each.path for each in selected.task.requirements(folder, selected.split) if each.purpose != "images"]
    return {
        "folder": str(folder),
        "files": files_fingerprints(files, folder),
        "questions_fingerprint": questions_fingerprint(questions),
        "num_questions": len(questions),
        "limit": settings.limit,
    }


def _describe_excluded(answers: Answers) -> list[Mapping[str, Any]]:
    return [{"question_id": each.question_id, "reason": each.reason} for each in answers.excluded]


def _describe_outcome(outcome: _Outcome) -> dict[str, Any]:
    return {
        "result": None if outcome.result is None else result_as_json(outcome.result),
        "notes": outcome.notes,
        "uploads": [str(path) for path in outcome.uploads],
        "num_failed_judge_requests": outcome.num_failed_judge_requests,
    }
