"""Progress on a stream beside the results: one line that is overwritten on a terminal, a few lines elsewhere."""

import shutil
from typing import TextIO


class Progress:
    """Call it with what happens now; `clear` at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._last_stage = ""

    def __call__(self, stage: str, detail: str) -> None:
        """Tell the stage with its detail; where the stream is no terminal, each stage once."""
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._write(f"\r\x1b[K{f'{stage}: {detail}'[:width]}")
        elif stage != self._last_stage:
            self._write(f"{stage}\n")
        self._last_stage = stage

    def clear(self) -> None:
        """Leave a terminal's line empty."""
        if self._is_terminal:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
