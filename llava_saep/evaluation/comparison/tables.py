"""The rows of a comparison's tables as texts, for Markdown, page and terminal alike, and everything as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from llava_saep.evaluation.comparison.results import BenchmarkRow, Difference, Entry, Results
from llava_saep.evaluation.comparison.statistics import Interval
from llava_saep.evaluation.metrics import OVERALL
from llava_saep.evaluation.report import markdown_table

Table = tuple[list[str], list[list[str]]]
"""Header and rows."""

MISSING = "-"
MIB = 1024**2


def first_table(results: Results) -> Table:
    """How good they are: by kind of question, or by benchmark."""
    return benchmark_table(results) if results.asks_benchmarks else accuracy_table(results)


def benchmark_table(results: Results) -> Table:
    """One row per metric, one column per model; shares in per cent, others in points, with intervals over questions."""
    labels = [entry.label for entry in results.entries]
    rows = []
    for row in results.benchmarks:
        cells = [_metric_text(row.values[label], row.is_share) if label in row.values else MISSING for label in labels]
        rows.append([row.name, row.metric, "/".join(f"{count:,}" for count in row.counts), *cells])
    return ["benchmark", "metric", "questions", *labels], rows


def _metric_text(interval: Interval | None, is_share: bool) -> str:
    if interval is None:
        return "undefined"
    if is_share:
        return interval_text(interval)
    bounds = "" if interval.low is None else f" ({interval.low:.1f} to {interval.high:.1f})"
    return f"{interval.value:.1f}{bounds}"


def accuracy_table(results: Results) -> Table:
    """Per cent of right answers by kind of question, with intervals; last row: what guessing reaches."""
    header = [results.compared, "runs", "tokens", OVERALL, *results.categories, "blind, overall"]
    rows = [[*_who(entry), *_accuracy_cells(entry, results.categories)] for entry in results.entries]
    kinds = (OVERALL, *results.categories)
    guessing = [percent(results.chance[kind]) if kind in results.chance else MISSING for kind in kinds]
    return header, [*rows, ["(most frequent answer)", MISSING, MISSING, *guessing, MISSING]]


def _who(entry: Entry) -> list[str]:
    tokens = MISSING if entry.speed is None else str(entry.speed["tokens_per_image"])
    return [entry.label, f"{len(entry.finished)} of {entry.num_runs}", tokens]


def _accuracy_cells(entry: Entry, categories: Sequence[str]) -> list[str]:
    if not entry.accuracy:
        return ["failed" if entry.failures else "not run", *[MISSING] * (len(categories) + 1)]
    cells = [interval_text(entry.accuracy[name]) for name in (OVERALL, *categories)]
    return [*cells, interval_text(entry.blind[OVERALL])]


def cost_table(results: Results) -> Table:
    """What each costs: sizes, first token, memory, and the time of training where something was trained."""
    rows = [_costs(entry) for entry in results.entries]
    columns = [name for name in _costs(results.entries[0]) if results.trains or not name.startswith(_OF_TRAINING)]
    labels = [entry.label for entry in results.entries]
    cells = [[label, *(row[name] for name in columns)] for label, row in zip(labels, rows, strict=True)]
    return [results.compared, *columns], cells


_OF_TRAINING = ("training", "peak training")


def _costs(entry: Entry) -> dict[str, str]:
    speed = entry.speed or {}
    return {
        "tokens per image": _number(speed.get("tokens_per_image")),
        "projector's parameters": _number(speed.get("num_projector_parameters")),
        "all parameters": _number(speed.get("num_parameters")),
        "training, s": _mean([one.train_seconds for one in entry.finished]),
        "training, CPU-s": _mean([one.train_cpu_seconds for one in entry.finished]),
        "first token, ms": _first_token(speed),
        "peak training, MiB": _mean([_mebibytes(one.train_peak_bytes) for one in entry.finished]),
        "peak answering, MiB": _mean([_mebibytes(one.answer_peak_bytes) for one in entry.finished]),
    }


def _first_token(speed: Mapping[str, Any]) -> str:
    if not speed:
        return MISSING
    low, high = (1000 * bound for bound in speed["first_token_quartiles"])
    return f"{1000 * speed['first_token_seconds']:.1f} ({low:.1f} to {high:.1f})"


def difference_table(results: Results) -> Table:
    """Each against the reference, in percentage points."""
    header = [
        f"against {results.reference}",
        "seeds",
        "difference, points",
        "95 % over seeds",
        "95 % over images",
        "right here alone",
        "right there alone",
        "McNemar p",
    ]
    return header, [_difference_row(one) for one in results.differences]


def _difference_row(one: Difference) -> list[str]:
    seeds = one.over_seeds
    return [
        one.label,
        str(one.num_seeds),
        f"{100 * seeds.value:+.1f}",
        MISSING if seeds.low is None or seeds.high is None else _points(seeds.low, seeds.high),
        MISSING if one.over_images is None else _points(*one.over_images),
        str(one.only_here),
        str(one.only_reference),
        MISSING if one.p_value is None else f"{one.p_value:.2g}",
    ]


def markdown(results: Results, title: str, notes: Sequence[str]) -> str:
    """The tables as a Markdown page."""
    parts = [f"# {title}", *notes, "## Accuracy", markdown_table(*reversed(first_table(results)))]
    if results.differences:
        parts += ["## In pairs", markdown_table(*reversed(difference_table(results)))]
    parts += ["## Costs", markdown_table(*reversed(cost_table(results)))]
    remarks = all_remarks(results)
    if remarks:
        parts += ["## To be known", "\n".join(f"- {line}" for line in remarks)]
    failures = failure_lines(results)
    if failures:
        parts += ["## Failed", "\n".join(f"- {line}" for line in failures)]
    return "\n\n".join(parts) + "\n"


def all_remarks(results: Results) -> list[str]:
    """What was left out of the numbers, or not scored: a line each."""
    excluded = f"{results.num_excluded:,} further questions could not be put to every model and count for none"
    return [*([excluded] if results.num_excluded else []), *results.remarks]


def failure_lines(results: Results) -> list[str]:
    """`run: reason` for each run that failed."""
    return [f"{title}: {reason}" for entry in results.entries for title, reason in entry.failures.items()]


def results_document(results: Results, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as JSON: shares in [0, 1], seconds, bytes."""
    return {
        **facts,
        "reference": results.reference,
        "num_questions": len(results.questions),
        "num_excluded_questions": results.num_excluded,
        "chance": dict(results.chance),
        "benchmarks": [_benchmark_document(row) for row in results.benchmarks],
        "remarks": list(results.remarks),
        "entries": [_entry_document(entry) for entry in results.entries],
        "differences": [_difference_document(one) for one in results.differences],
    }


def _entry_document(entry: Entry) -> dict[str, Any]:
    return {
        "label": entry.label,
        "num_runs": entry.num_runs,
        "failures": dict(entry.failures),
        "accuracy": {name: _interval_document(interval) for name, interval in entry.accuracy.items()},
        "blind": {name: _interval_document(interval) for name, interval in entry.blind.items()},
        "speed": entry.speed,
        "runs": [
            {
                "seed": one.run.seed,
                "num_correct": int(one.correct.sum()),
                "num_correct_blind": int(one.blind_correct.sum()),
                "train_seconds": one.train_seconds,
                "train_cpu_seconds": one.train_cpu_seconds,
                "train_peak_bytes": one.train_peak_bytes,
                "answer_peak_bytes": one.answer_peak_bytes,
                "commits": list(one.commits),
            }
            for one in entry.finished
        ],
    }


def _benchmark_document(row: BenchmarkRow) -> dict[str, Any]:
    values = {label: value and _interval_document(value) for label, value in row.values.items()}
    return {"benchmark": row.name, "metric": row.metric, "counts": list(row.counts), "values": values}


def _difference_document(one: Difference) -> dict[str, Any]:
    return {
        "label": one.label,
        "num_seeds": one.num_seeds,
        "over_seeds": _interval_document(one.over_seeds),
        "over_images_95": None if one.over_images is None else list(one.over_images),
        "only_here": one.only_here,
        "only_reference": one.only_reference,
        "mcnemar_p": one.p_value,
    }


def _interval_document(interval: Interval) -> dict[str, Any]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


# Texts of numbers


def percent(share: float) -> str:
    """`0.5` -> `50.0`."""
    return f"{100 * share:.1f}"


def interval_text(interval: Interval) -> str:
    """`97.6 (95.0 to 99.1)`, in per cent."""
    if interval.low is None or interval.high is None:
        return percent(interval.value)
    return f"{percent(interval.value)} ({percent(interval.low)} to {percent(interval.high)})"


def _points(low: float, high: float) -> str:
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def _number(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def _mebibytes(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else num_bytes / MIB


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):,.0f}" if known else MISSING
