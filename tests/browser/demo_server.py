"""`llava-saep demo` in a process of its own, and what is needed to look at it."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


@contextlib.contextmanager
def demo_server(flags: Sequence[str], log: Path) -> Iterator[str]:
    """Run `llava-saep demo` in the folder of its log; yields its address, such as http://127.0.0.1:12345."""
    command = [sys.executable, "-m", "llava_saep.cli", "demo", "--port", "0", "--device", "cpu", *flags]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            cwd=log.parent,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        try:
            printed = ""
            for line in process.stdout:
                printed += line
                if address := re.search(r"http://[^/\s]+", line):
                    yield address.group()
                    return
            raise AssertionError(f"the demo did not start: {printed}{log.read_text()}")
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
            process.stdout.close()
