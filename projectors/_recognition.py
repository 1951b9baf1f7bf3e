"""Whose weights are these? For the message where a file does not fit the projector that was asked for.

Every registered projector, preset and example spelling is built without memory, and its own keys and its original's are
held against the file's, so that a new projector is recognised without a line here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ._base import Projector
from ._checkpoint import nearest_reading
from ._errors import ProjectorError
from ._registry import (
    load_plug_ins,
    registered_presets,
    registered_projectors,
    registered_spellings,
    select_projector,
)

_LEAST_SHARE = 0.5
"""A projector is named as near when it has at least this share of all the keys, its own and the file's."""


def recognise_projector(
    state_dict: Mapping[str, Tensor],
    *,
    vision_hidden_size: int,
    text_hidden_size: int,
    num_vision_layers: int | None = None,
) -> tuple[tuple[str, ...], bool]:
    """Find the projectors, at their defaults between these widths, that a state dict can belong to.

    Args:
        state_dict: tensors under any prefix, also on the meta device: values are not looked at.
    Returns:
        names, and whether all keys match. First choice are those whose keys and shapes match, then those whose keys
        do, then those that share the most keys; no name where none shares half of them.
    """
    ranks = {}
    widths = {"vision_hidden_size": vision_hidden_size, "text_hidden_size": text_hidden_size}
    for name, registered_name, projector in _candidates(num_vision_layers, **widths):
        reading = nearest_reading(projector, state_dict)
        all_keys = len(reading.weights.keys() | projector.state_dict().keys())
        share = 1 - reading.num_unmatched / all_keys if all_keys else 0.0
        if share >= _LEAST_SHARE:
            ranks[name] = (share, share == 1 and reading.num_misshapen == 0, registered_name)
    if not ranks:
        return (), False
    best = max(rank[:2] for rank in ranks.values())
    names = [name for name, rank in ranks.items() if rank[:2] == best]
    # A preset or spelling says nothing that the projector's own name, at its defaults, does not say as well.
    names = [name for name in names if ranks[name][2] == name or ranks[name][2] not in names]
    return tuple(names), best[0] == 1


def _candidates(num_vision_layers: int | None, **widths: int) -> Iterator[tuple[str, str, Projector]]:
    """Each name with the registered name behind it and a projector that holds no memory."""
    load_plug_ins()
    for name in (*registered_projectors(), *registered_presets(), *registered_spellings()):
        try:
            selection = select_projector(name)
            config = selection.build_config(**widths, num_vision_layers=num_vision_layers)
        except ProjectorError:  # not between these widths, or a package that is broken
            continue
        with torch.device("meta"):
            yield name, selection.name, selection.build(config)
