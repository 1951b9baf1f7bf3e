"""The token-wise read-out that most projectors end with."""

from __future__ import annotations

from torch import nn


def build_mlp(in_features: int, out_features: int, depth: int, activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """`depth` Linear layers with an activation between each two (LLaVA's mlpNx_gelu when it is GELU).

    The first layer changes the width, the others keep it. Linear layers sit at the even indices, as in LLaVA's keys.
    """
    layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
    for _ in range(depth - 1):
        layers += [activation(), nn.Linear(out_features, out_features)]
    return nn.Sequential(*layers)
