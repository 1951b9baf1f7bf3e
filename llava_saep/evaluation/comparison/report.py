"""Writes a comparison down: the page, the Markdown tables, and the numbers for programs."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_saep.evaluation.comparison.page import page
from llava_saep.evaluation.comparison.results import Results
from llava_saep.evaluation.comparison.tables import markdown, results_document


def write_report(
    results: Results, facts: Mapping[str, Any], folder: Path, image_folder: Path, num_examples: int
) -> dict[str, Path]:
    """Write report.html, report.md and results.json; returns where they are, by what they are."""
    written = {"page": folder / "report.html", "table": folder / "report.md", "numbers": folder / "results.json"}
    document = json.dumps(results_document(results, facts), indent=2) + "\n"
    written["numbers"].write_text(document, encoding="utf-8")
    written["page"].write_text(page(results, facts, image_folder, num_examples), encoding="utf-8")
    notes = [f"`{shlex.join(facts['command'])}`"]
    written["table"].write_text(markdown(results, facts["title"], notes), encoding="utf-8")
    return written
