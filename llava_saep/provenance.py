"""Which code ran: the commit of the checkout, and the versions of what it stands on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "peft")


def commit() -> str | None:
    """The checkout's commit, with "-dirty" when files differ from it; None where the code is no checkout."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    if not (_ROOT / ".git").exists():
        return None
    # Without the optional locks, so that a commit at the same time is not refused.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30, env=environment)
        return result.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that train; what is not installed is left out."""
    from llava_saep import __version__

    found = {"llava_saep": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
