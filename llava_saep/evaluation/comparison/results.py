"""What the finished runs of a comparison say, put together by projector: plain data for page, table and JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llava_saep.evaluation.comparison.recipe import Recipe
from llava_saep.evaluation.comparison.runs import Run
from llava_saep.evaluation.comparison.statistics import (
    Interval,
    accuracy_interval,
    mcnemar_p_value,
    mean_over_seeds,
    paired_bootstrap,
)
from llava_saep.evaluation.comparison.steps import read_json, record_path
from llava_saep.evaluation.metrics import OVERALL, chance_accuracy, ends_with_answer
from llava_saep.evaluation.questions import Question, read_questions
from llava_saep.evaluation.results import ALL_FILE, remark_lines
from llava_saep.evaluation.tasks._files import read_answers

ANSWERS, BLIND_ANSWERS = "answers.jsonl", "answers_blind.jsonl"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values over the steps of one stage of one run."""

    seed: int | None
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One run that came to its end.

    Args:
        correct, blind_correct: (questions,) of bool, in the order of the scored questions.
        answers: generated texts, in that order.
        train_seconds: of the training steps alone, without start, held-out evaluation and saving; None where no
            training was seen. Other runs were at work at the same time where there were several jobs.
    """

    run: Run
    correct: np.ndarray
    blind_correct: np.ndarray
    answers: tuple[str, ...]
    train_seconds: float | None
    train_cpu_seconds: float | None
    train_peak_bytes: int | None
    answer_peak_bytes: int | None
    commits: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One projector, or one trained model, with all its runs.

    Args:
        failures: by the title of the run.
        speed: what `measure_speed` found; None where it could not be measured.
        accuracy, blind: by category, "overall" among them; None without a finished run.
        loss, held_out_loss, held_out_accuracy: curves by stage.
    """

    label: str
    num_runs: int
    finished: tuple[Finished, ...]
    failures: Mapping[str, str]
    speed: Mapping[str, Any] | None
    accuracy: Mapping[str, Interval]
    blind: Mapping[str, Interval]
    loss: Mapping[str, tuple[Curve, ...]]
    held_out_loss: Mapping[str, tuple[Curve, ...]]
    held_out_accuracy: Mapping[str, tuple[Curve, ...]]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An entry's accuracy less the reference's, over the seeds that both have finished and the same questions.

    Args:
        over_seeds: Student's t on the differences of equal seeds; without bounds for one seed, or where all
            differ alike.
        over_images: bootstrap over images, models held fixed; None where there are only a few.
        only_here, only_reference: answers, of all seeds, that were right on one side alone.
        p_value: McNemar's, where each side has one model; None otherwise, since answers of several seeds to one
            question are not independent.
    """

    label: str
    num_seeds: int
    over_seeds: Interval
    over_images: tuple[float, float] | None
    only_here: int
    only_reference: int
    p_value: float | None


@dataclass(frozen=True, kw_only=True)
class BenchmarkRow:
    """One metric of a benchmark for all models.

    Args:
        category: a kind of question; None: all of them.
        counts: from how many questions it was computed; one number, unless models differ.
        values: by label; a share in [0, 1] or points, None where it is not defined, absent where it was not scored.
    """

    benchmark: str
    category: str | None
    metric: str
    counts: tuple[int, ...]
    is_share: bool
    values: Mapping[str, Interval | None]

    @property
    def name(self) -> str:
        """Benchmark, and kind of question."""
        return self.benchmark if self.category is None else f"{self.benchmark} / {self.category}"


@dataclass(frozen=True, kw_only=True)
class Results:
    """A whole comparison. `entries` begin with the most accurate; those without a finished run come last.

    Args:
        asks_benchmarks: whether models were asked benchmarks, and not one file of questions.
        compared: what stands against each other: projectors that were trained alike, or models.
        questions: those that are scored.
        num_excluded: questions with an answer to compare with that some run could not be asked, such as about an image
            that will not open.
        remarks: what a reader of the benchmarks' numbers should know, by model: what was left out or not scored.
    """

    asks_benchmarks: bool
    compared: Literal["projector", "model"]
    questions: tuple[Question, ...]
    num_excluded: int
    categories: tuple[str, ...]
    chance: Mapping[str, float]
    entries: tuple[Entry, ...]
    reference: str | None
    differences: tuple[Difference, ...]
    benchmarks: tuple[BenchmarkRow, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether the comparison trained what it compares."""
        return self.compared == "projector"


def collect(runs: Sequence[Run], recipe: Recipe, reference: str | None) -> Results:
    """Read what the runs have written.

    Args:
        reference: label that the others are compared with; None: no comparison in pairs.
    """
    scored = _scored_questions(recipe)
    questions = _answered_by_all(scored, [run for run in runs if not run.open_steps])
    categories = tuple(dict.fromkeys(question.category for question in questions))
    labels = list(dict.fromkeys(run.label for run in runs))
    entries = [_entry(label, [run for run in runs if run.label == label], questions, recipe) for label in labels]
    entries.sort(key=lambda entry: -entry.accuracy[OVERALL].value if entry.accuracy else 1.0)
    by_label = {entry.label: entry for entry in entries}
    differences = []
    if questions and reference is not None and by_label[reference].finished:
        others = [entry for entry in entries if entry.label != reference and entry.finished]
        found = (difference(entry, by_label[reference], questions) for entry in others)
        differences = [one for one in found if one is not None]
    asks_benchmarks = recipe.question_file is None
    return Results(
        asks_benchmarks=asks_benchmarks,
        compared="projector" if recipe.stages else "model",
        questions=questions,
        num_excluded=len(scored) - len(questions),
        categories=categories,
        chance=_chance(questions, categories, recipe.chance),
        entries=tuple(entries),
        reference=reference,
        differences=tuple(differences),
        benchmarks=tuple(_benchmark_rows(runs)) if asks_benchmarks else (),
        remarks=tuple(_benchmark_remarks(runs)) if asks_benchmarks else (),
    )


def _scored_questions(recipe: Recipe) -> list[Question]:
    if recipe.question_file is None:
        return []
    return [question for question in read_questions(recipe.question_file) if question.answer is not None]


def _benchmark_rows(runs: Sequence[Run]) -> Iterator[BenchmarkRow]:
    """The metrics of all benchmarks, each followed by those per kind of question.

    Runs that failed count too: what was scored before, or beside what was not, is true all the same.
    """
    scored = {run.label: _benchmark_results(run) for run in runs}
    names = dict.fromkeys(name for results in scored.values() for name in results)
    for benchmark, category, metric in names:
        own = {label: results.get((benchmark, category, metric)) for label, results in scored.items()}
        cells = {label: _metric_interval(found) for label, found in own.items() if found is not None}
        first = next(found for found in own.values() if found is not None)
        counts = sorted({found["n"] for found in own.values() if found is not None})
        yield BenchmarkRow(
            benchmark=benchmark,
            category=category,
            metric=metric,
            counts=tuple(counts),
            is_share=first["unit"] == "share",
            values=cells,
        )


def _benchmark_remarks(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        yield from (f"{run.label}: {line}" for entry in _entries(run).values() for line in remark_lines(entry))


def _entries(run: Run) -> dict[str, dict[str, Any]]:
    return (read_json(run.folder / "evaluation" / ALL_FILE) or {"results": {}})["results"]


def _benchmark_results(run: Run) -> dict[tuple[str, str | None, str], dict[str, Any]]:
    found: dict[tuple[str, str | None, str], dict[str, Any]] = {}
    for label, entry in _entries(run).items():
        result = entry["result"] or {"metrics": [], "rows": []}  # None: labels are hidden, or no judge was named
        found |= {(label, None, metric["name"]): metric for metric in result["metrics"]}
        for row in result["rows"]:
            found |= {(label, row["category"], metric["name"]): metric for metric in row["metrics"]}
    return found


def _metric_interval(metric: Mapping[str, Any]) -> Interval | None:
    """None where the metric is not defined for the answers."""
    if metric["value"] is None:
        return None
    return Interval(metric["value"], *(metric["interval"] or (None, None)))


def _answered_by_all(questions: Sequence[Question], finished: Sequence[Run]) -> tuple[Question, ...]:
    """Questions that every run has answered: one that could not be put to some is left out for all of them."""
    if not questions:
        return ()
    answered = [set(_read_texts(run, name)) for run in finished for name in (ANSWERS, BLIND_ANSWERS)]
    return tuple(question for question in questions if all(question.question_id in own for own in answered))


def _read_texts(run: Run, name: str) -> dict[str | int, str]:
    return {answer.question_id: answer.text for answer in read_answers(run.folder / "evaluation" / name)}


def _chance(questions: Sequence[Question], categories: Sequence[str], known: Mapping[str, float]) -> dict[str, float]:
    found = {OVERALL: chance_accuracy(questions)} if questions else {}
    for category in categories:
        found[category] = chance_accuracy([question for question in questions if question.category == category])
    return {**found, **{name: share for name, share in known.items() if name in found}}


def _entry(label: str, runs: Sequence[Run], questions: Sequence[Question], recipe: Recipe) -> Entry:
    finished = tuple(_finished(run, questions, recipe) for run in runs if not run.open_steps)
    stages = [stage.name for stage in recipe.stages]
    histories = {stage: [(run.seed, _history(run.folder / stage)) for run in runs] for stage in stages}
    curves = {
        key: {stage: _curves(histories[stage], key) for stage in stages}
        for key in ("loss", "eval_loss", "eval_token_accuracy")
    }
    speeds = [read_json(record_path(run.folder, "speed")) for run in runs]
    return Entry(
        label=label,
        num_runs=len(runs),
        finished=finished,
        failures={run.title: run.failure for run in runs if run.failure is not None},
        speed=next((speed for speed in speeds if speed is not None), None),
        accuracy=_accuracies([one.correct for one in finished], questions),
        blind=_accuracies([one.blind_correct for one in finished], questions),
        loss=curves["loss"],
        held_out_loss=curves["eval_loss"],
        held_out_accuracy=curves["eval_token_accuracy"],
    )


def _finished(run: Run, questions: Sequence[Question], recipe: Recipe) -> Finished:
    has_own_questions = recipe.question_file is not None
    answers, blind = (_read_texts(run, name) if has_own_questions else {} for name in (ANSWERS, BLIND_ANSWERS))
    records = {step.name: read_json(record_path(run.folder, step.name)) or {} for step in run.steps}
    trained = [records[stage.name] for stage in recipe.stages if stage.name in records]
    seconds = [_training_seconds(_history(run.folder / stage.name)) for stage in recipe.stages]
    peaks = [record["peak_memory_bytes"] for record in trained if record["peak_memory_bytes"] is not None]
    return Finished(
        run=run,
        correct=_correctness(questions, answers),
        blind_correct=_correctness(questions, blind),
        answers=tuple(answers[question.question_id] for question in questions),
        train_seconds=sum(seconds) if trained else None,
        train_cpu_seconds=sum(record["cpu_seconds"] for record in trained) if trained else None,
        train_peak_bytes=max(peaks, default=None),
        answer_peak_bytes=records["evaluation"].get("peak_memory_bytes"),
        commits=tuple(sorted({str(record["commit"]) for record in records.values() if record.get("commit")})),
    )


def _correctness(questions: Sequence[Question], answers: Mapping[str | int, str]) -> np.ndarray:
    return np.array([ends_with_answer(answers[q.question_id], q.answer or "") for q in questions], dtype=bool)


def _accuracies(correct: Sequence[np.ndarray], questions: Sequence[Question]) -> dict[str, Interval]:
    """By category, and overall last; empty without runs."""
    if not correct or not questions:
        return {}
    members = {category: [q.category == category for q in questions] for category in _categories(questions)}
    members[OVERALL] = [True] * len(questions)
    return {
        category: accuracy_interval([int(one[np.array(chosen)].sum()) for one in correct], sum(chosen))
        for category, chosen in members.items()
    }


def _categories(questions: Sequence[Question]) -> list[str]:
    return list(dict.fromkeys(question.category for question in questions))


def _history(stage_folder: Path) -> list[dict[str, Any]]:
    """The training's log: one entry per logged step; empty without one."""
    path = stage_folder / "trainer_state.json"
    return json.loads(path.read_text(encoding="utf-8"))["log_history"] if path.is_file() else []


def _training_seconds(history: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of training steps: the log's clock stands still while the training evaluates and saves."""
    return sum(entry["tokens"] / entry["tokens_per_second"] for entry in history if entry.get("tokens_per_second"))


def _curves(histories: Sequence[tuple[int | None, list[dict[str, Any]]]], key: str) -> tuple[Curve, ...]:
    curves = []
    for seed, history in histories:
        pairs = [(int(entry["step"]), float(entry[key])) for entry in history if key in entry]
        if pairs:
            steps, values = zip(*pairs, strict=True)
            curves.append(Curve(seed=seed, steps=steps, values=values))
    return tuple(curves)


# In pairs


def difference(entry: Entry, reference: Entry, questions: Sequence[Question]) -> Difference | None:
    """Compare with the reference seed by seed; None where no seed was finished on both sides."""
    own = {one.run.seed: one.correct for one in entry.finished}
    other = {one.run.seed: one.correct for one in reference.finished}
    seeds = [seed for seed in own if seed in other]
    if not seeds:
        return None
    correct = np.stack([own[seed] for seed in seeds])
    reference_correct = np.stack([other[seed] for seed in seeds])
    only_here = int((correct & ~reference_correct).sum())
    only_reference = int((~correct & reference_correct).sum())
    by_seed = correct.mean(axis=1) - reference_correct.mean(axis=1)
    return Difference(
        label=entry.label,
        num_seeds=len(seeds),
        over_seeds=mean_over_seeds(by_seed.tolist()),
        over_images=paired_bootstrap(correct, reference_correct, _images(questions)),
        only_here=only_here,
        only_reference=only_reference,
        p_value=mcnemar_p_value(only_here, only_reference) if len(seeds) == 1 else None,
    )


def _images(questions: Sequence[Question]) -> list[int]:
    """The image of each question, as a number; a question without one stands for itself."""
    shown = [("image", q.image) if q.image is not None else ("question", q.question_id) for q in questions]
    numbers = {key: index for index, key in enumerate(dict.fromkeys(shown))}
    return [numbers[key] for key in shown]
