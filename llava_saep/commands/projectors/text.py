"""Text for a terminal of any width: aligned columns, wrapped sentences, short forms of numbers and layers."""

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from llava_saep.bench.placement import Sizes

_DEFAULT_WIDTH = 120
_MIN_RUN = 3
"""So many layers in a row are written as a range."""


def terminal_width() -> int:
    """Columns of the terminal; where the output is no terminal, COLUMNS or 120."""
    return max(shutil.get_terminal_size((_DEFAULT_WIDTH, 24)).columns, 40)


def columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Rows as lines with their cells below each other: to the left in the columns of `left`, to the right in others."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_pad(row, widths, left)).rstrip() for row in rows]


def _pad(row: Sequence[str], widths: Sequence[int], left: Sequence[int]) -> list[str]:
    cells = zip(row, widths, strict=True)
    return [cell.ljust(width) if index in left else cell.rjust(width) for index, (cell, width) in enumerate(cells)]


def wrapped(text: str, width: int) -> list[str]:
    """A paragraph as lines of at most `width` columns; only a word that is longer stands out."""
    return textwrap.wrap(text, max(width, 1), break_on_hyphens=False, break_long_words=False) or [""]


def layer_ranges(layers: Sequence[int]) -> str:
    """`0 1 2 3 12 23` -> `0-3 12 23`; negative indices stay by themselves."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer >= 0 and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [[f"{run[0]}-{run[-1]}"] if len(run) >= _MIN_RUN else map(str, run) for run in runs]
    return " ".join(part for run in parts for part in run)


def describe_sizes(sizes: Sizes) -> str:
    """One line about the tower and the language model."""
    return (
        f"tower: {sizes.vision_hidden_size} channels, {sizes.num_vision_layers} blocks, "
        f"{sizes.grid.height} x {sizes.grid.width} patches; language model: {sizes.text_hidden_size} channels"
    )


def option_text(value: Any) -> str:
    """An option's value as one types it: true, none, 12|16."""
    if isinstance(value, list | tuple):
        return "|".join(map(option_text, value))
    if isinstance(value, dict):
        return "[" + ",".join(f"{name}={option_text(entry)}" for name, entry in value.items()) + "]"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def options_text(options: dict[str, Any]) -> str:
    """Options as `--mm_projector_options` takes them: stride=3,vision_layers=12|23."""
    return ",".join(f"{name}={option_text(value)}" for name, value in options.items())
