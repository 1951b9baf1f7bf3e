"""One table of accuracies for three readers: a terminal, a Markdown page and a program."""

from collections.abc import Mapping, Sequence
from typing import Any

from llava_saep.evaluation.metrics import Score

HEADER = ("kind of question", "questions", "accuracy", "95 % interval", "chance", "blind")


def report_rows(scores: Sequence[Score], blind_scores: Sequence[Score] = ()) -> list[tuple[str, ...]]:
    """Cells of the table, one row per score, as percentages; "-" where the blind run has no such category."""
    blind = {score.category: score for score in blind_scores}
    return [
        (
            score.category,
            str(score.num_questions),
            _percent(score.accuracy),
            f"{_percent(score.interval[0])} - {_percent(score.interval[1])}",
            _percent(score.chance),
            _percent(blind[score.category].accuracy) if score.category in blind else "-",
        )
        for score in scores
    ]


def terminal_table(rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER, *, has_sum_row: bool = True) -> str:
    """Columns aligned, the first to the left, the others to the right; a rule above the last row if it is the sum."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in table
    ]
    rule = "-" * len(lines[0])
    sum_rule = [rule] if has_sum_row and len(rows) > 1 else []
    return "\n".join([lines[0], rule, *lines[1:-1], *sum_rule, *lines[-1:]])


def markdown_table(rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> str:
    """The same cells as a Markdown table."""
    alignment = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, alignment, *rows])


def json_report(model_id: str, scores: Sequence[Score], blind_scores: Sequence[Score] = ()) -> dict[str, Any]:
    """The same numbers for a program: proportions in [0, 1], counts as integers."""
    return {"model_id": model_id, "with_image": _as_mapping(scores), "blind": _as_mapping(blind_scores)}


def _as_mapping(scores: Sequence[Score]) -> Mapping[str, Any]:
    return {
        score.category: {
            "num_questions": score.num_questions,
            "num_correct": score.num_correct,
            "accuracy": score.accuracy,
            "interval_95": list(score.interval),
            "chance": score.chance,
        }
        for score in scores
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
