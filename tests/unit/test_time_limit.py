"""What continuous integration does on a slow machine: it ends with a report in place of being killed without one."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tests_that_would_begin_too_late_are_skipped_and_counted():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/unit/test_import_direction.py"]
    result = subprocess.run(
        [*command, "--no-start-after", "0"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " skipped in " in result.stdout and " passed" not in result.stdout
    assert "not begun within 0 seconds (--no-start-after)" in result.stdout
