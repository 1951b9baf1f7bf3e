"""The cards beside the stand-ins' weights: what they were trained on, for how long, where, and what they reached."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

_CARD = """# {title}

{summary}

| | |
|---|---|
| data | {data} |
| steps | {steps} |
| time | {minutes:.0f} minutes |
| machine | {machine} |
| seed | {seed} |
| parameters | {num_parameters:,} |
| made by | `{command}` |

Figures after the last step, on held-out data:

| figure | value |
|---|---|
{figures}

{notes}
"""


def write_card(
    folder: Path,
    *,
    title: str,
    summary: str,
    data: str,
    steps: str,
    seed: int,
    num_parameters: int,
    command: str,
    figures: Mapping[str, float],
    notes: str,
) -> None:
    """Write `folder`/README.md; `figures` includes "minutes", which goes into the table of circumstances."""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in figures.items() if name != "minutes")
    (folder / "README.md").write_text(
        _CARD.format(
            title=title,
            summary=summary,
            data=data,
            steps=steps,
            minutes=figures["minutes"],
            machine=machine(),
            seed=seed,
            num_parameters=num_parameters,
            command=command,
            figures=rows,
            notes=notes,
        ),
        encoding="utf-8",
    )


def machine() -> str:
    """This machine in words: cores and architecture; one thread trains."""
    return f"{os.cpu_count()}-core {platform.machine()} CPU, one thread"
