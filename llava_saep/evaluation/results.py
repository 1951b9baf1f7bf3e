"""What an evaluation leaves behind: result.json per benchmark, results.json and results.md over all of a folder.

A number means little without what made it, so each result carries its prompt, decoding, preprocessing, model, data,
versions, machine, command and date; results.json holds one such entry per benchmark.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError
from llava_saep.evaluation.report import markdown_table, terminal_table
from llava_saep.evaluation.tasks import TaskResult

logger = logging.getLogger(__name__)

SCHEMA = "llava-saep-results/1"
"""The number rises when a field changes its meaning or goes."""

RESULT_FILE, ALL_FILE, TABLE_FILE = "result.json", "results.json", "results.md"
_NUM_EXAMPLES = 3
HEADER = ("benchmark", "metric", "value", "95 % interval", "n")


def describe_program(device: Any) -> dict[str, Any]:
    """What ran, where, and when: command, versions, machine, date (UTC)."""
    from llava_saep.machine import describe_machine
    from llava_saep.provenance import commit, versions

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv, sys.orig_argv),
        "num_ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": {**versions(), "commit": commit()},
        "machine": describe_machine(device),
    }


def command_line(argv: Sequence[str], whole: Sequence[str]) -> str:
    """The command as it can be given again: by its name, or as a module of the interpreter.

    Args:
        argv, whole: as `sys.argv` and `sys.orig_argv`.
    """
    name = Path(argv[0]).name
    words = [Path(whole[0]).name, *whole[1:]] if name.endswith(".py") else [name, *argv[1:]]
    return shlex.join(words)


def result_as_json(result: TaskResult) -> dict[str, Any]:
    """Task, split, metrics, rows per kind of question, exclusions, notes; proportions in [0, 1]."""
    return json.loads(json.dumps(dataclasses.asdict(result)))


def write_result(folder: Path, entry: Mapping[str, Any]) -> None:
    """Write one benchmark's entry, whole or not at all."""
    _write(folder / RESULT_FILE, json.dumps({"schema": SCHEMA, **entry}, indent=2, ensure_ascii=False) + "\n")


def read_result(path: Path) -> dict[str, Any]:
    """An entry as `write_result` has written it.

    Raises:
        UserError: the file is damaged, or of another schema.
    """
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a result ({error}); delete it and evaluate again") from error
    schema = entry.get("schema") if isinstance(entry, dict) and {"label", "model"} <= set(entry) else None
    if schema != SCHEMA:
        raise UserError(f"{path}: schema {schema!r}, expected {SCHEMA!r}; delete it and evaluate again")
    return entry


def collect_results(output_dir: Path, model_fingerprint: str) -> dict[str, dict[str, Any]]:
    """Entries of all benchmarks that one model has been evaluated on into this folder, by their label."""
    entries = {}
    for path in sorted(output_dir.glob(f"*/{RESULT_FILE}")):
        try:
            entry = read_result(path)
        except UserError as error:
            logger.warning("%s; left out of %s", error, ALL_FILE)
            continue
        if entry["model"]["fingerprint"] == model_fingerprint:
            entries[entry["label"]] = entry
    return entries


def write_overview(output_dir: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Write results.json and results.md over some entries."""
    content = {"schema": SCHEMA, "results": dict(entries)}
    _write(output_dir / ALL_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    _write(output_dir / TABLE_FILE, results_markdown(entries))


def results_markdown(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """A page: the table, what was left out, and what the numbers were made with."""
    parts = []
    rows = [row for entry in entries.values() for row in metric_rows(entry)]
    if rows:
        parts.append(markdown_table(rows, HEADER))
    remarks = [f"- {line}" for entry in entries.values() for line in remark_lines(entry)]
    if remarks:
        parts.append("\n".join(remarks))
    labels: dict[str, list[str]] = {}
    for label, entry in entries.items():
        labels.setdefault(circumstances(entry), []).append(label)
    parts += [f"**{', '.join(names)}**: {words}" for words, names in labels.items()]
    return "\n\n".join(parts) + "\n"


def terminal_report(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The table and the remarks, for a terminal."""
    rows = [row for entry in entries.values() for row in metric_rows(entry)]
    lines = [terminal_table(rows, HEADER, has_sum_row=False)] if rows else []
    return "\n".join([*lines, *(line for entry in entries.values() for line in remark_lines(entry))])


def metric_rows(entry: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table: the metrics of a benchmark, then those per kind of question; none where it was not scored."""
    if entry["result"] is None:
        return []
    label = entry["label"]
    rows = [_metric_row(label, metric) for metric in entry["result"]["metrics"]]
    for row in entry["result"]["rows"]:
        rows += [_metric_row(f"{label} / {row['category']}", metric) for metric in row["metrics"]]
    return rows


def remark_lines(entry: Mapping[str, Any]) -> list[str]:
    """One line for each thing that a reader of the numbers should know."""
    label, result = entry["label"], entry["result"]
    lines = [f"{label}: {note}" for note in entry["notes"]]
    if entry["excluded_questions"]:
        first = entry["excluded_questions"][0]
        lines.append(
            f"{label}: {len(entry['excluded_questions'])} of {entry['data']['num_questions']} questions could not be "
            f"put, the first one {first['question_id']!r}: {first['reason']}"
        )
    for each in result["exclusions"] if result else ():
        more = ", ..." if each["count"] > _NUM_EXAMPLES else ""
        examples = f" ({', '.join(each['examples'][:_NUM_EXAMPLES])}{more})" if each["examples"] else ""
        lines.append(f"{label}: {each['count']} {each['reason']}, {each['effect']}{examples}")
    lines += [f"{label}: {note}" for note in (result["notes"] if result else ())]
    return [*lines, *(f"{label}: to hand in: {path}" for path in entry["uploads"])]


def circumstances(entry: Mapping[str, Any]) -> str:
    """What a result was made with, in one line."""
    model, program = entry["model"], entry["program"]
    words = [f"model {model['id']} ({model['fingerprint']})"]
    if "prompt" in entry:
        size = " x ".join(map(str, entry["preprocessing"]["size"]))
        words += [
            f"{model['tokens_per_image']} tokens per image, {_weights_words(model)}",
            f"template {entry['prompt']['template']}",
            f"images {entry['preprocessing']['aspect_ratio']}, {size}",
            decoding_words(entry["decoding"]),
        ]
    versions = program["versions"]
    words.append(f"llava-saep {versions['llava_saep']} ({versions['commit'] or 'no checkout'})")
    words.append(f"torch {versions['torch']}, transformers {versions['transformers']}")
    words.append(f"{program['machine'].get('gpu', program['machine']['processor'])}, {program['date']}")
    return "; ".join(words) + f"; `{program['command']}`"


def _weights_words(model: Mapping[str, Any]) -> str:
    return model["dtype"] if model["bits"] is None else f"{model['dtype']}, language model in {model['bits']} bits"


def decoding_words(decoding: Mapping[str, Any]) -> str:
    """How answers were decoded, in a few words."""
    sampling = f"temperature {decoding['temperature']}, top-p {decoding['top_p']}"
    way = sampling if decoding["temperature"] > 0 else "greedy"
    beams = f", {decoding['num_beams']} beams" if decoding["num_beams"] > 1 else ""
    return f"{way}{beams}, at most {decoding['max_new_tokens']} tokens"


def _metric_row(label: str, metric: Mapping[str, Any]) -> tuple[str, ...]:
    interval = metric["interval"]
    shown = "" if interval is None else f"{_number(interval[0], metric)} - {_number(interval[1], metric)}"
    return label, metric["name"], _number(metric["value"], metric), shown, str(metric["n"])


def _number(value: float | None, metric: Mapping[str, Any]) -> str:
    if value is None:
        return "undefined"
    return f"{100 * value:.2f} %" if metric["unit"] == "share" else f"{value:.2f}"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
