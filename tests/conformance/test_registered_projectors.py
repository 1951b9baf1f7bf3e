"""Every registered projector keeps every promise of the contract; a new file in projectors/ is covered at once."""

from __future__ import annotations

import pytest

from projectors import registered_presets, registered_projectors
from projectors.conformance import CHECK_NAMES, run_check

_CAPTURE_CHECK = "torch_compile_takes_it"
_NAMES = (*registered_projectors(), *registered_presets())


@pytest.mark.parametrize("check", [name for name in CHECK_NAMES if name != _CAPTURE_CHECK])
@pytest.mark.parametrize("name", _NAMES)
def test_projector_conforms(name, check):
    result = run_check(name, check)
    assert result.status != "failed", result.detail
    if result.status == "skipped":
        pytest.skip(result.detail)


@pytest.mark.slow
@pytest.mark.parametrize("name", _NAMES)
def test_projector_compiles_to_one_graph(name):
    result = run_check(name, _CAPTURE_CHECK, compile=True)
    assert result.status != "failed", result.detail
    if result.status == "skipped":
        pytest.skip(result.detail)
