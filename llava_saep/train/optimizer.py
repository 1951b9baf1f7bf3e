"""Parameter groups of the optimizer: weight decay where it belongs, and the projector's own learning rate."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from llava_saep.train.trainable import part_of


def parameter_groups(
    model: nn.Module,
    *,
    decayed_names: Collection[str],
    weight_decay: float,
    projector_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Sort the parameters that learn into groups for a torch optimizer.

    Args:
        decayed_names: names that weight decay applies to (transformers leaves out biases and norms).
        projector_learning_rate: None: the projector learns as fast as the rest.
    Returns:
        non-empty groups with `params` and `weight_decay`, the projector's with `lr`; the order of groups and of
        parameters in them is the same on every rank.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            has_own_rate = projector_learning_rate is not None and part_of(name) == "projector"
            groups.setdefault((has_own_rate, name in decayed_names), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if is_decayed else 0.0,
            **({"lr": projector_learning_rate} if has_own_rate else {}),
        }
        for (has_own_rate, is_decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
