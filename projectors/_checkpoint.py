"""Weights of a projector from any file that holds them, and initialisation where parameters are partitioned.

A state dict may carry any prefix (`model.mm_projector.`, `multi_modal_projector.`, ...) and either this package's keys
or the original implementation's. Nothing is loaded unless every parameter has exactly one tensor of its shape.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from ._base import Projector
from ._errors import ProjectorError
from .layers.initialization import is_partitioned

CHECKPOINT_MARKERS = (
    "mm_projector_crosslayer",
    "mm_projector",
    "multi_modal_projector",
    "abstractor",
    "_connector",
    "connector",
    "vision_resampler",
    "projector",
    "mlp1",
    "merger",
)
"""Names under which the field's checkpoints keep a projector, most specific first."""

_PART_OF_A_PROJECTOR = re.compile(
    r"mm_projector|mm_projector_crosslayer|vision_resampler|conv_(\d+|CM|linear)|(query|key|value)_projector"
)
"""Names of modules that lie side by side where an original has its projector in several parts."""

_MAX_KEYS_NAMED = 6


def load_projector_state_dict(projector: Projector, state_dict: Mapping[str, Tensor]) -> None:
    """Copy weights into a projector; dtype and device of the projector stay.

    Args:
        state_dict: the projector's tensors under any prefix, or a whole model's in which the projector has one of
            the prefixes in CHECKPOINT_MARKERS. Keys of the original implementation are converted.
    Raises:
        ProjectorError: a tensor is missing, unknown or misshapen (named, with both shapes), or the file holds further
            parts of a larger projector; nothing has been loaded.
    """
    with gathered_parameters(projector):
        converted = nearest_reading(projector, state_dict).weights
        _check_keys(projector, converted)
        _check_shapes(projector, converted)
        is_meta = any(parameter.is_meta for parameter in projector.parameters())
        projector.load_state_dict(converted, strict=True, assign=is_meta)


def initialize_projector(projector: Projector) -> None:
    """`reset_parameters`, also where ZeRO-3 has partitioned the parameters; every rank must call it then."""
    with gathered_parameters(projector):
        projector.reset_parameters()


@contextmanager
def gathered_parameters(module: nn.Module) -> Iterator[None]:
    """Whole parameters inside the block under ZeRO-3, rank 0's values everywhere after it; otherwise nothing."""
    partitioned = [parameter for parameter in module.parameters() if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    # Whoever partitioned the parameters has imported deepspeed; this package does not depend on it.
    with sys.modules["deepspeed"].zero.GatheredParameters(partitioned, modifier_rank=0):
        yield


class Reading(NamedTuple):
    """A state dict as one prefix and one spelling of the keys give it, and how far it is from a projector's own."""

    num_unmatched: int
    """Keys on one side only."""

    num_misshapen: int
    """Keys on both sides whose tensors have different shapes."""

    weights: dict[str, Tensor]


def nearest_reading(projector: Projector, state_dict: Mapping[str, Tensor]) -> Reading:
    """The state dict without its prefix, in this module's keys: the first exact match, or the nearest miss.

    Parts of a larger projector that lie beside the prefix count as unmatched, under their whole names.
    """
    expected = projector.state_dict()
    readings = []
    for prefix in _candidate_prefixes(state_dict):
        stripped = {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        other_parts = _parts_beside(prefix, state_dict)
        for weights in (stripped, *_converted(projector, stripped)):
            reading = _compare(weights | other_parts, expected)
            if reading.num_unmatched == reading.num_misshapen == 0:
                return reading
            readings.append(reading)
    return min(readings, key=lambda reading: reading[:2])


def _parts_beside(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of projectors' parts next to the module `prefix`, without which that module is not the whole one."""
    *outer, _ = prefix.removesuffix(".").split(".")
    parent = "".join(f"{name}." for name in outer)
    if not _PART_OF_A_PROJECTOR.fullmatch(prefix.removeprefix(parent).removesuffix(".")):
        return {}
    beside = {}
    for key, tensor in state_dict.items():
        module, dot, _ = key.removeprefix(parent).partition(".")
        is_beside = key.startswith(parent) and not key.startswith(prefix) and dot
        if is_beside and _PART_OF_A_PROJECTOR.fullmatch(module):
            beside[key] = tensor
    return beside


def _converted(projector: Projector, stripped: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The reading as the original's keys; none where the converter meets tensors that the original does not have."""
    try:
        return [projector.convert_original_state_dict(stripped)]
    except (IndexError, KeyError, RuntimeError, ValueError):  # what keys and shapes of somebody else's weights lead to
        return []


def _compare(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Reading:
    misshapen = sum(weights[key].shape != expected[key].shape for key in expected.keys() & weights.keys())
    return Reading(len(weights.keys() ^ expected.keys()), misshapen, dict(weights))


def _candidate_prefixes(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Prefixes worth trying: up to and with a marker, up to it, then what all keys share, shorter and shorter.

    "Up to it" is for originals that keep their parts side by side, such as `model.vision_resampler` and
    `model.mm_projector`.
    """
    with_marker: dict[str, None] = {}
    before_marker: dict[str, None] = {}
    for marker in CHECKPOINT_MARKERS:
        for key in state_dict:
            parts = key.split(".")
            for position, part in enumerate(parts[:-1]):
                if part == marker:
                    with_marker[".".join(parts[: position + 1]) + "."] = None
                    before_marker["".join(f"{name}." for name in parts[:position])] = None
    candidates = with_marker | before_marker
    shared = _shared_parts(state_dict)
    for length in range(len(shared), 0, -1):
        candidates[".".join(shared[:length]) + "."] = None
    candidates[""] = None
    return list(candidates)


def _shared_parts(state_dict: Mapping[str, Tensor]) -> list[str]:
    """The dotted components that every key begins with, never the last component of a key."""
    paths = [key.split(".")[:-1] for key in state_dict]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared


def _check_keys(projector: Projector, converted: Mapping[str, Tensor]) -> None:
    expected = projector.state_dict()
    missing = [key for key in expected if key not in converted]
    unexpected = [key for key in converted if key not in expected]
    if missing or unexpected:
        raise ProjectorError(
            f"these weights are not those of {type(projector).__name__} as configured. Missing: {_listing(missing)}. "
            f"Unexpected: {_listing(unexpected)}. Check the projector's name and options against the checkpoint."
        )


def _check_shapes(projector: Projector, converted: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{key} is {tuple(converted[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in projector.state_dict().items()
        if converted[key].shape != tensor.shape
    ]
    if wrong:
        raise ProjectorError(
            f"these weights do not fit {type(projector).__name__} as configured: {'; '.join(wrong[:_MAX_KEYS_NAMED])}"
            f"{f' and {len(wrong) - _MAX_KEYS_NAMED} more' if len(wrong) > _MAX_KEYS_NAMED else ''}. "
            "Check the projector's options and the widths of the two models against the checkpoint."
        )


def _listing(keys: list[str]) -> str:
    if not keys:
        return "none"
    rest = len(keys) - _MAX_KEYS_NAMED
    return ", ".join(keys[:_MAX_KEYS_NAMED]) + (f" and {rest} more" if rest > 0 else "")
