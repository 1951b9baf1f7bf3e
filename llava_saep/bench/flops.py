"""Floating-point operations of a projector's forward and backward, counted on the meta device: nothing is computed.

Counted are matrix products and convolutions, two operations per multiply-add; norms, activations, softmax and pooling
are not. On the meta device attention is made of matrix products, so it counts the same whatever kernel a device uses
(on the CPU torch's counter sees nothing of the fused one).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from projectors import PatchGrid, Projector


class FlopCount(NamedTuple):
    """Floating-point operations of one batch. `backward` excludes the forward."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Both together: a training step without the optimizer."""
        return self.forward + self.backward


def count_flops(projector: Projector, grid: PatchGrid, batch_size: int, train_tower: bool = False) -> FlopCount:
    """Count the operations of one forward and backward.

    Args:
        projector: on the meta device.
        train_tower: whether the features want a gradient; with a frozen tower the first products have no use for it.
    """
    config = projector.config
    shape = (batch_size, config.num_input_tokens(grid), config.vision_hidden_size)
    dtype = next((parameter.dtype for parameter in projector.parameters()), torch.float32)
    features = [torch.empty(shape, device="meta", dtype=dtype, requires_grad=train_tower) for _ in config.vision_layers]
    with _counter() as forward:
        output = projector(features, grid)
    with _counter() as backward:
        if output.requires_grad:
            output.backward(torch.empty_like(output))
    return FlopCount(forward.get_total_flops(), backward.get_total_flops())


def _counter() -> FlopCounterMode:
    mapping = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _convolution_backward_flops(
    grad_output_shape: Sequence[int],
    features_shape: Sequence[int],
    weight_shape: Sequence[int],
    _bias_sizes: Sequence[int],
    _stride: Sequence[int],
    _padding: Sequence[int],
    _dilation: Sequence[int],
    transposed: bool,
    _output_padding: Sequence[int],
    _groups: int,
    output_mask: Sequence[bool],
    **_output_shape: Any,
) -> int:
    """Each gradient of a product that is asked for costs what the forward costs.

    torch's own formula for the weight's gradient leaves out the groups: of a depthwise convolution over C channels it
    counts C times too many.
    """
    num_gradients = sum(output_mask[:2])  # The third is the bias's, a sum.
    return num_gradients * conv_flop_count(features_shape, weight_shape, grad_output_shape, transposed=transposed)
