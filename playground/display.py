"""How the playground's programs talk in a terminal: titles, times, commands."""

import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path


def heading(text: str) -> None:
    """Print the title of a step, in bold on a terminal."""
    bold, plain = ("\x1b[1m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}{text}{plain}\n{'-' * len(text)}", flush=True)


@contextmanager
def step(title: str, seconds: dict[str, float], name: str):
    """Print a title, run the body, and note and print how long it took."""
    heading(title)
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start
    print(f"[{name}: {format_seconds(seconds[name])}]", flush=True)


def format_seconds(seconds: float) -> str:
    """`75.2` -> `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def shown_command(words: Sequence[str]) -> str:
    """A command line as one would type it in the working folder."""
    return shlex.join(str(shown_path(Path(word))) if word.startswith("/") else word for word in words)


def shown_path(path: Path) -> Path:
    """A path as it is shortest from the working folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
