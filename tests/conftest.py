"""What every test starts from: no network, one thread per process, and only the projectors of this repository."""

import os
import sys
import time

# Before torch and transformers are imported, which read them once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from projectors import _registry, registered_projectors

_BEGAN = time.monotonic()


def pytest_addoption(parser):
    """A limit of time that ends with a report: a run that is killed does not say what failed before."""
    parser.addoption(
        "--no-start-after", type=float, metavar="SECONDS", help="skip tests that have not begun after so much time"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip what would begin too late, fixtures included."""
    limit = item.config.getoption("--no-start-after")
    if limit is not None and time.monotonic() - _BEGAN > limit:
        pytest.skip(f"not begun within {limit:g} seconds (--no-start-after)")


@pytest.fixture(autouse=True)
def forget_own_projectors(monkeypatch):
    """A projector that a test registers is gone afterwards, so that no other test meets it."""
    registered_projectors()
    monkeypatch.setattr(_registry, "_specs", dict(_registry._specs))
    monkeypatch.setattr(_registry, "_aliases", dict(_registry._aliases))
    monkeypatch.setattr(_registry, "_presets", dict(_registry._presets))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("projector_file_"):
            del sys.modules[name]
