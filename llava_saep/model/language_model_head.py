"""The language-model head, and the loss on top of it without ever holding all logits.

Logits are vocabulary times positions, by far the largest tensor of a step, and a loss needs only a number from each.
They are made for some positions at a time and turned into gradients at once, inside a single call of the head: ZeRO-3
gathers its weights once, however many targets a rank has.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CHUNK_NUMBERS = 2**24
"""Logits that are held at a time: 64 MiB in float32, enough rows for a fast product with any vocabulary."""


class LanguageModelHead(nn.Linear):
    """A linear layer without bias from hidden states to logits, or with targets to a summed loss."""

    @classmethod
    def like(cls, linear: nn.Linear) -> "LanguageModelHead":
        """The head with another layer's weight itself, not a copy; it must have no bias."""
        assert linear.bias is None
        with torch.device("meta"):
            head = cls(linear.in_features, linear.out_features, bias=False)
        head.weight = linear.weight
        return head

    def forward(self, hidden_states: Tensor, targets: Tensor | None = None, softcap: float | None = None) -> Tensor:
        """Return logits (..., vocabulary) in the input's dtype, or the cross-entropy summed over all targets.

        Args:
            hidden_states: (..., channels); with targets (positions, channels).
            targets: (positions,), each a token id; there may be none.
            softcap: logits are squashed to +-softcap (Gemma 2).
        """
        if targets is None:
            logits = super().forward(hidden_states)
            return logits if softcap is None else torch.tanh(logits / softcap) * softcap
        return _SummedCrossEntropy.apply(hidden_states, self.weight, targets, softcap)


class _SummedCrossEntropy(torch.autograd.Function):
    """Cross-entropy in float32 of F.linear(hidden_states, weight), chunk by chunk, gradients made on the way forward.

    What backward would recompute or keep, logits, is gone by then: it only scales the gradients.
    """

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        """Sum over the rows of hidden_states (rows, width); weight is (vocabulary, width), targets (rows,) its rows."""
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        hidden_gradient = torch.zeros_like(hidden_states) if wants_hidden else None
        # In float32, since a sum of bfloat16 parts loses what each adds.
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        num_rows = max(_CHUNK_NUMBERS // weight.shape[0], 1)
        for start in range(0, len(targets), num_rows):
            rows = slice(start, start + num_rows)
            loss, gradient = _loss_and_gradient(F.linear(hidden_states[rows], weight), targets[rows], softcap)
            total += loss
            if wants_hidden:
                hidden_gradient[rows] = gradient @ weight
            if wants_weight:
                _add_product(weight_gradient, gradient.t(), hidden_states[rows])
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        hidden_gradient = None if hidden_gradient is None else hidden_gradient * scale
        weight_gradient = None if weight_gradient is None else (weight_gradient * scale).to(ctx.weight_dtype)
        return hidden_gradient, weight_gradient, None, None


def _loss_and_gradient(logits: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of `logits` (positions, vocabulary) and its gradient in their dtype."""
    values = logits.float()
    squashed = None if softcap is None else torch.tanh(values / softcap)
    log_probabilities = F.log_softmax(values if squashed is None else squashed * softcap, dim=1)
    targets = targets[:, None]
    loss = -log_probabilities.gather(1, targets).sum()
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=gradient.dtype))
    if squashed is not None:
        gradient *= 1 - squashed**2
    return loss, gradient.to(logits.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a float32 sum; inside autocast, or in half precision, the product is made in that."""
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right.to(left.dtype)
