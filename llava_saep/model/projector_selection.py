"""Which projector a config names, resolved once per process.

A stored config may name code outside this package; it is imported only inside `trusting_projector_code()`. A selection
that was made once is remembered, so that later reads of the same config need no second permission.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from projectors import ProjectorSelection

_trust_projector_code: ContextVar[bool] = ContextVar("trust_projector_code", default=False)
_selections: dict[str, ProjectorSelection] = {}


@contextmanager
def trusting_projector_code(trust: bool | None = True) -> Iterator[None]:
    """Allow (or forbid) configs read inside the block to import a projector from outside this package.

    None leaves it as it is around the block; outside all blocks it is forbidden.
    """
    token = _trust_projector_code.set(_trust_projector_code.get() if trust is None else trust)
    try:
        yield
    finally:
        _trust_projector_code.reset(token)


def _cache_key(stored: Mapping[str, Any]) -> str:
    return json.dumps(stored, sort_keys=True, default=list)


def remember_selection(selection: ProjectorSelection) -> None:
    """Let configs that store `selection` be read in this process without trusting code anew."""
    _selections[_cache_key(selection.to_dict())] = selection


def selection_from_config(stored: Mapping[str, Any]) -> ProjectorSelection:
    """Return the selection that a config stores as `{name, provider, options}`.

    Raises:
        ProjectorError: unknown name or option, or code from outside this package without permission.
    """
    key = _cache_key(stored)
    if key not in _selections:
        _selections[key] = ProjectorSelection.from_dict(stored, trust_projector_code=_trust_projector_code.get())
    return _selections[key]
