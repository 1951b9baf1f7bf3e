"""The frame of a report of measurements: what was measured, tables, what failed, and how it was measured."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llava_saep.commands.projectors.text import columns, wrapped


class Table(NamedTuple):
    """Rows of cells, headings first.

    Attributes:
        title: a line above them; None: there is none.
    """

    rows: Sequence[tuple[str, ...]]
    title: str | None = None


def report_lines(
    *,
    heading: Sequence[str],
    tables: Sequence[Table],
    measured: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    width: int,
) -> Iterator[str]:
    """Put a report together; tables are as wide as they are, sentences are wrapped.

    Args:
        measured: with name and error of each; those that have an error are told between tables and notes.
    """
    for line in heading:
        yield from wrapped(line, width)
    for table in tables:
        yield ""
        if table.title is not None:
            yield table.title
        yield from columns(table.rows)
    for row in measured:
        if row["error"]:
            yield ""
            yield from wrapped(f"{row['name']}: {' '.join(row['error'].split())}", width)
    yield ""
    for note in notes:
        yield from wrapped(note, width)
