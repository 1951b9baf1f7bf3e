"""Tests that need an NVIDIA GPU; on other machines they are skipped."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Mark what lies in this folder, and skip it where there is no GPU."""
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
