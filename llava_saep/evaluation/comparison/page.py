"""The HTML page of a comparison: one file, no scripts, nothing fetched from anywhere."""

import base64
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from llava_saep.evaluation.comparison import charts
from llava_saep.evaluation.comparison.disagreement import Disagreement, disagreements
from llava_saep.evaluation.comparison.results import BenchmarkRow, Curve, Entry, Results
from llava_saep.evaluation.comparison.statistics import Interval
from llava_saep.evaluation.comparison.tables import (
    Table,
    accuracy_table,
    all_remarks,
    benchmark_table,
    cost_table,
    difference_table,
    failure_lines,
)
from llava_saep.evaluation.metrics import OVERALL

_LARGEST_IMAGE_PX = 384
_SMALL_IMAGE_PX = 128

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --line: #d0d7de; --band: #f6f8fa;
  --mark: #0b5cad; --reference: #b3261e; --others: #9aa3ad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa5b1; --paper: #0f1419; --line: #333c47;
  --band: #171e26; --mark: #6cb6ff; --reference: #ff8a80; --others: #6b7684; } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --band: #fff;
  --mark: #0b5cad; --reference: #b3261e; --others: #9aa3ad; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; } p { max-width: 52rem; margin: .4rem 0; } .soft { color: var(--soft); }
.wide { overflow-x: auto; } figure.wide { margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem; }
th, td { padding: .32rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; } svg.chart { min-width: 44rem; } th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tr { background: var(--paper); } tbody tr:nth-child(odd) { background: var(--band); }
@media (max-width: 48rem) { body { padding: 1rem; }
  .wide::before { content: "scrolls sideways \\2194"; position: sticky; left: 0; color: var(--soft);
  font-size: .78rem; }
  th:first-child, td:first-child { position: sticky; left: 0; min-width: 7.5rem; overflow-wrap: anywhere;
  white-space: normal; background: inherit; } }
.interval { display: block; color: var(--soft); font-size: .78rem;
  white-space: nowrap; }
svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; } svg text { fill: var(--soft); }
svg text.label { fill: var(--ink); } .grid { stroke: var(--line); stroke-width: 1; } .axis { stroke: var(--soft); }
.whisker { stroke: var(--soft); stroke-width: 1.3; } .thick { stroke: var(--mark); stroke-width: 4; opacity: .55; }
.leader { stroke: var(--soft); stroke-width: .7; stroke-dasharray: 2 2; } .point { fill: var(--mark); }
.point.reference { fill: var(--reference); } polyline { fill: none; stroke-width: 1; } .others { stroke: var(--others);
  opacity: .7; } .own { stroke: var(--mark); stroke-width: 1.8; }
.panels { display: flex; flex-wrap: wrap; gap: .5rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .8rem; display: flex; gap: .9rem; }
.card img { flex: none; image-rendering: pixelated; align-self: flex-start; max-width: 8rem; height: auto; }
.card ul { list-style: none; margin: .3rem 0 0; padding: 0; font-size: .86rem; } .card p { margin: 0; }
li { overflow-wrap: anywhere; } .card > div { min-width: 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; background: var(--band); padding: .7rem; }
@media print { body { font-size: 9pt; padding: 0; } .wide { overflow: visible; } table { font-size: 6.5pt; }
  td { white-space: normal; } th, td { padding: .15rem .25rem; } .interval { font-size: 6pt; }
  svg.chart { min-width: 0; }
  figure, tr, .card, svg { break-inside: avoid; }
  details::details-content { content-visibility: visible; height: auto; } }
"""

_SCOPE = "These are measurements of these questions, these sizes and this training."
_SCOPE_OF_EMBEDDED = (
    "Small models on generated images say something about the code and about tendencies; they are not a projector's "
    "result on public benchmarks with large models."
)


def page(results: Results, facts: Mapping[str, Any], image_folder: Path, num_examples: int) -> str:
    """The whole page.

    Args:
        facts: title, command, machine, num_jobs, num_threads, recipe, is_embedded (trained on the generated images).
        image_folder: what the questions' images are relative to; those shown are put into the page.
    """
    sections = [
        _heading(facts, results),
        _accuracy(results),
        _differences(results),
        _tokens(results),
        _costs(results, facts),
        _curves(results),
        _disagreements(results, num_examples, image_folder),
        _lines("To be known", all_remarks(results)),
        _lines("Failed", failure_lines(results)),
        _circumstances(results, facts),
    ]
    body = "\n".join(f"<section>{section}</section>" for section in sections if section)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(facts['title'])}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _heading(facts: Mapping[str, Any], results: Results) -> str:
    if results.asks_benchmarks:
        return f"<h1>Models compared</h1><p>{escape(facts['title'])}</p>"
    num_images = len({question.image for question in results.questions} - {None})
    scope = f"{_SCOPE} {_SCOPE_OF_EMBEDDED}" if facts["is_embedded"] else _SCOPE
    return (
        f"<h1>{results.compared.capitalize()}s compared</h1><p>{escape(facts['title'])}</p>"
        f"<p class=soft>{len(results.questions):,} questions about {num_images:,} images, the same to all; answers are "
        f"generated freely (greedily) and their final words are scored. {scope}</p>"
    )


def _accuracy(results: Results) -> str:
    if results.asks_benchmarks:
        note = "Shares in per cent, others in points; below a value its 95 % interval over questions, where it has one."
        return f"<h2>Benchmarks</h2>{table(benchmark_table(results))}<p class=soft>{note}</p>"
    counts = sorted({len(entry.finished) for entry in results.entries})
    return (
        "<h2>Accuracy</h2>" + table(accuracy_table(results)) + "<p class=soft>Per cent of right answers. "
        f"{_interval_note(counts)} Blind: the same model with the image removed. The last row is what the most "
        "frequent answer of its kind, given to every question, reaches.</p>"
    )


def _interval_note(counts: Sequence[int]) -> str:
    over_seeds = (
        "Below each value its 95 % interval by Student's t over the seeds (runs column: how many): how far the mean of "
        "other seeds would lie, with these questions and this training data; none where all seeds scored alike."
    )
    single = "A single run has Wilson's interval over the questions, which knows nothing of other seeds."
    return " ".join([over_seeds] * any(count > 1 for count in counts) + [single] * (1 in counts))


def _differences(results: Results) -> str:
    if not results.differences:
        return ""
    rows = []
    for one in results.differences:
        seeds = one.over_seeds
        over_seeds = None if seeds.low is None or seeds.high is None else (seeds.low, seeds.high)
        rows.append((one.label, seeds.value, over_seeds, one.over_images))
    return (
        f"<h2>In pairs with {escape(str(results.reference))}</h2>"
        f"<figure class=wide tabindex=0>{charts.differences(rows)}</figure>{table(difference_table(results))}"
        "<p class=soft>Accuracy less the reference's, over all questions, for equal seeds. Thin: 95 % by Student's t "
        "over the seeds' differences. Thick: 95 % by bootstrap over images (whole images drawn again, models held "
        "fixed): how much it depends on which images were asked about. An interval on one side of zero under both is "
        f"a difference; with many {results.compared}s at once, one in twenty intervals misses by chance alone. "
        "McNemar's exact test is told where each side is a single model.</p>"
    )


def _tokens(results: Results) -> str:
    charts_by_name = {name: _token_chart(results, values) for name, values in _headlines(results).items()}
    figures = [
        f"<h3>{escape(name)}</h3><figure class=wide tabindex=0>{chart}</figure>"
        for name, chart in charts_by_name.items()
        if chart
    ]
    if not figures:
        return ""
    return (
        f"<h2>Accuracy against tokens</h2>{''.join(figures)}"
        "<p class=soft>Bars: the 95 % intervals of the first table. Where several have equally many tokens they stand "
        "beside each other.</p>"
    )


def _token_chart(results: Results, values: Mapping[str, Interval]) -> str:
    points = [
        charts.Point(
            label=entry.label,
            x=entry.speed["tokens_per_image"],
            y=values[entry.label],
            is_reference=entry.label == results.reference,
        )
        for entry in results.entries
        if entry.label in values and entry.speed is not None
    ]
    return charts.accuracy_against_tokens(points)


def _headlines(results: Results) -> dict[str, dict[str, Interval]]:
    """What stands for entries in one number, by its name: overall accuracy, or the first share of each benchmark."""
    if not results.asks_benchmarks:
        accuracies = {entry.label: entry.accuracy[OVERALL] for entry in results.entries if entry.accuracy}
        return {f"{OVERALL} accuracy": accuracies}
    first_shares: dict[str, BenchmarkRow] = {}
    for row in results.benchmarks:
        if row.is_share:
            first_shares.setdefault(row.benchmark, row)
    return {
        f"{row.name}, {row.metric}": {label: value for label, value in row.values.items() if value is not None}
        for row in first_shares.values()
    }


def _costs(results: Results, facts: Mapping[str, Any]) -> str:
    notes = [
        "First token: median (quartiles) from a question to its first token, image read and prepared, one question at "
        "a time, with nothing else of this comparison running. Peak: on a processor all memory of the process, most of "
        "it the libraries'; tensors on a GPU."
    ]
    if results.trains:
        threads = f"{facts['num_threads']} thread{'s' if facts['num_threads'] > 1 else ''}"
        at_once = f"at most {facts['num_jobs']} run{'s' if facts['num_jobs'] > 1 else ''} at once"
        training = (
            "Means over the finished runs. Training: seconds of the training steps, without start-up, held-out losses "
            f"and saving, {threads} per run and {at_once}, so that other runs and programs count into it; CPU-seconds "
            "are the whole training processes' and do not count others'."
        )
        notes.insert(0, training)
    return f"<h2>Costs</h2>{table(cost_table(results))}<p class=soft>{' '.join(notes)}</p>"


def _curves(results: Results) -> str:
    stages = list(results.entries[0].loss) if results.entries else []
    parts = []
    for stage in stages:
        parts.append(_panels(f"{stage}: training loss", _of(results, "loss", stage), unit="loss"))
        parts.append(_panels(f"{stage}: loss on held-out images", _of(results, "held_out_loss", stage), unit="loss"))
        accuracy = _of(results, "held_out_accuracy", stage)
        parts.append(_panels(f"{stage}: right tokens on held-out images, %", accuracy, unit="%", as_percent=True))
    text = "".join(parts)
    if not text:
        return ""
    note = (
        "One panel per projector, a line per seed; in grey all others. The highest 3 % of losses are cut off. Held-out "
        "tokens are predicted with the right ones before them (teacher forcing), which is easier than answering freely."
    )
    return f"<h2>Learning curves</h2>{text}<p class=soft>{note}</p>"


def _of(results: Results, name: str, stage: str) -> dict[str, tuple[Curve, ...]]:
    found = {entry.label: _curves_of(entry, name).get(stage, ()) for entry in results.entries}
    return {label: curves for label, curves in found.items() if curves}


def _curves_of(entry: Entry, name: str) -> Mapping[str, tuple[Curve, ...]]:
    return {
        "loss": entry.loss,
        "held_out_loss": entry.held_out_loss,
        "held_out_accuracy": entry.held_out_accuracy,
    }[name]


def _panels(title: str, curves: Mapping[str, tuple[Curve, ...]], *, unit: str, as_percent: bool = False) -> str:
    panels = charts.curve_panels(curves, unit=unit, as_percent=as_percent)
    return f"<h3>{escape(title)}</h3><div class=panels>{''.join(panels)}</div>" if panels else ""


def _disagreements(results: Results, num_examples: int, image_folder: Path) -> str:
    cards = "".join(_card(one, image_folder) for one in disagreements(results, num_examples))
    if not cards:
        return ""
    shown = "Shown is the first seed's answer and how many runs were right." if results.trains else ""
    return (
        f"<h2>Where they disagree</h2><p class=soft>The questions that divide the {results.compared}s most evenly, one "
        f"per image, kinds of question taking turns; not picked by eye. {shown}</p><div class=cards>{cards}</div>"
    )


def _card(one: Disagreement, image_folder: Path) -> str:
    answers = "".join(
        f"<li>{'✓' if num_right == num_runs else '✗' if not num_right else '◐'} <b>{escape(label)}</b> "
        f"({num_right} of {num_runs}): {escape(text) or '<i>nothing</i>'}</li>"
        for label, (text, num_right, num_runs) in one.answers.items()
    )
    question = one.question
    return (
        f"<div class=card>{_picture(image_folder, question.image)}<div><p><b>{escape(question.text)}</b></p>"
        f"<p class=soft>{escape(question.category)}; right: {escape(question.answer or '')}</p><ul>{answers}</ul>"
        "</div></div>"
    )


def _picture(image_folder: Path, name: str | None) -> str:
    if name is None:
        return ""
    with Image.open(image_folder / name) as opened:
        image = opened.convert("RGB")
    image.thumbnail((_LARGEST_IMAGE_PX, _LARGEST_IMAGE_PX))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(name)}" width="{_SMALL_IMAGE_PX}" src="data:image/png;base64,{data}">'


def _lines(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>{title}</h2><ul>{items}</ul>" if lines else ""


def _circumstances(results: Results, facts: Mapping[str, Any]) -> str:
    commits = sorted({commit for entry in results.entries for one in entry.finished for commit in one.commits})
    loads = [entry.speed["load_average"] for entry in results.entries if entry.speed]
    known = [load for load in loads if load is not None]
    load = f"{min(known):.1f} to {max(known):.1f}" if known else "unknown"
    lines = [
        shlex.join(facts["command"]),
        f"commits of the runs: {', '.join(commits) or 'unknown'}",
        f"load average while first tokens were timed: {load} (1.0 is this process alone)",
    ]
    machine = json.dumps(facts["machine"], indent=2)
    recipe = json.dumps(facts["recipe"], indent=2)
    return (
        f"<h2>How it was made</h2><pre>{escape(chr(10).join(lines))}</pre>"
        f"<details><summary>machine and versions</summary><pre>{escape(machine)}</pre></details>"
        f"<details><summary>recipe</summary><pre>{escape(recipe)}</pre></details>"
    )


def table(content: Table) -> str:
    """A table; an interval in a cell, `97.6 (95.0 to 99.1)`, goes below the value."""
    header, rows = content
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide tabindex=0><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(text: str) -> str:
    value, separator, interval = text.partition(" (")
    if separator and " to " in interval and interval.endswith(")"):
        return f"{escape(value)}<span class=interval>{escape(interval[:-1])}</span>"
    return escape(text)
