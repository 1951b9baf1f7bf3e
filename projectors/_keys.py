"""Renaming the keys of state dicts, which is most of what loading an original's weights takes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def rename_modules(state_dict: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Exchange the part of each key before the parameter's own name; keys without an entry stay.

    `{"readout.0": "mlp1.1"}` turns `readout.0.weight` into `mlp1.1.weight`.
    """
    renamed = {}
    for key, tensor in state_dict.items():
        module, dot, parameter = key.rpartition(".")
        renamed[names.get(module, module) + dot + parameter] = tensor
    return renamed


def exchange_prefixes(state_dict: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Exchange the beginning of each key, by the first entry that it begins with; keys without an entry stay."""
    exchanged = {}
    for key, tensor in state_dict.items():
        old = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        exchanged[prefixes.get(old, "") + key.removeprefix(old)] = tensor
    return exchanged


def without_class_position(state_dict: Mapping[str, Tensor], key: str, expected: Tensor | None) -> dict[str, Tensor]:
    """Drop the class token's position in front, where (1, N + 1, C) stand under `key` and (1, N, C) are expected."""
    converted = dict(state_dict)
    positions = converted.get(key)
    if positions is not None and expected is not None and positions.shape[1] == expected.shape[1] + 1:
        converted[key] = positions[:, 1:]
    return converted
