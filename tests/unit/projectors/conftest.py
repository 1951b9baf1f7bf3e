"""A registry, and imports of user files, that forget what a test did."""

from __future__ import annotations

import sys

import pytest

from projectors import _registry, registered_projectors


@pytest.fixture
def scratch_registry(monkeypatch):
    registered_projectors()
    monkeypatch.setattr(_registry, "_specs", dict(_registry._specs))
    monkeypatch.setattr(_registry, "_aliases", dict(_registry._aliases))
    monkeypatch.setattr(_registry, "_presets", dict(_registry._presets))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in ("blur", "blur_lab.blur") or name.startswith("projector_file_"):
            del sys.modules[name]
