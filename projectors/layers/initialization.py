"""In-place initialisation that leaves alone what a checkpoint has already filled.

transformers marks each loaded tensor with `_is_hf_initialized` and then asks the model to initialise the rest. The
functions here obey that mark without importing transformers, and call `torch.nn.init` by attribute, so that
transformers' own guards (which replace those attributes) stay effective. A parameter that ZeRO-3 has partitioned away
is skipped as well: `projectors.initialize_projector` gathers parameters first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_TRUNC_NORMAL_STD = 0.02


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 holds this parameter's values elsewhere at the moment."""
    status = getattr(tensor, "ds_status", None)
    return status is not None and status.name == "NOT_AVAILABLE"


def may_initialize(tensor: Tensor | None) -> bool:
    """Whether a value may be written: the tensor exists here and no checkpoint has filled it."""
    return tensor is not None and not getattr(tensor, "_is_hf_initialized", False) and not is_partitioned(tensor)


def constant_(tensor: Tensor | None, value: float) -> None:
    """Fill with one value."""
    if may_initialize(tensor):
        nn.init.constant_(tensor, value)


def zeros_(tensor: Tensor | None) -> None:
    """Fill with 0."""
    constant_(tensor, 0.0)


def ones_(tensor: Tensor | None) -> None:
    """Fill with 1."""
    constant_(tensor, 1.0)


def normal_(tensor: Tensor | None, std: float) -> None:
    """Draw from N(0, std**2)."""
    if may_initialize(tensor):
        nn.init.normal_(tensor, mean=0.0, std=std)


def trunc_normal_(tensor: Tensor | None, std: float = _TRUNC_NORMAL_STD) -> None:
    """Draw from N(0, std**2), cut at two standard deviations."""
    if may_initialize(tensor):
        nn.init.trunc_normal_(tensor, mean=0.0, std=std, a=-2 * std, b=2 * std)


def uniform_(tensor: Tensor | None, bound: float) -> None:
    """Draw from U(-bound, bound)."""
    if may_initialize(tensor):
        nn.init.uniform_(tensor, -bound, bound)


def copy_(tensor: Tensor | None, values: Tensor) -> None:
    """Fill with given values of the same shape."""
    if may_initialize(tensor):
        with torch.no_grad():
            tensor.copy_(values)


def reset_module(module: nn.Module) -> None:
    """PyTorch's default initialisation of one Linear, convolution or norm; other modules are left alone."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        # kaiming_uniform(a=sqrt(5)) on the weight, as in torch.nn.Linear and torch.nn.Conv2d, is U(-b, b) with this b.
        bound = 1 / math.sqrt(fan_in(module))
        uniform_(module.weight, bound)
        uniform_(module.bias, bound)
    elif isinstance(module, nn.LayerNorm):
        ones_(module.weight)
        zeros_(module.bias)


def reset_module_trunc_normal(module: nn.Module) -> None:
    """Truncated normal weights (std 0.02) and zero biases for one Linear or convolution; norms as by default."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        trunc_normal_(module.weight)
        zeros_(module.bias)
    else:
        reset_module(module)


def reset_module_normal(module: nn.Module, std: float = 0.02) -> None:
    """BERT's initialisation: N(0, std**2) weights and zero biases; norms as by default."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        normal_(module.weight, std)
        zeros_(module.bias)
    else:
        reset_module(module)


def fan_in(module: nn.Linear | nn.Conv2d) -> int:
    """Inputs that feed one output, from the module's sizes (its weight may be partitioned away)."""
    if isinstance(module, nn.Linear):
        return module.in_features
    return module.in_channels // module.groups * math.prod(module.kernel_size)
