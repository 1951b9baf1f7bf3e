"""What is measured: a projector, the hidden states that a tower hands it, and one forward or forward with backward."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_saep.bench.placement import Sizes
from projectors import Projector, ProjectorConfig, ProjectorSelection

_SEED = 0
_RECOMPILE_LIMIT = 256
"""torch.compile counts recompilations per class, and several presets share one class."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Batch, number format and device; `train_tower` lets the features want a gradient."""

    sizes: Sizes
    batch_size: int
    dtype: torch.dtype
    device: torch.device
    train_tower: bool = False
    compile: bool = False


class TowerOutput:
    """Random hidden states as a tower gives them, shared by all projectors that are measured.

    A patch-only map is what is left of (batch, 1 + patches, channels) without its class token: its rows are whole, its
    images are not adjacent in memory.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._hidden_states: list[Tensor] = []
        self._generator = torch.Generator(workload.device).manual_seed(_SEED)

    def features(self, config: ProjectorConfig) -> list[Tensor]:
        """One (batch, config.num_input_tokens(grid), channels) tensor per layer that the projector reads."""
        while len(self._hidden_states) < len(config.vision_layers):
            self._hidden_states.append(self._draw_hidden_state())
        first_token = 0 if config.keep_cls_token else 1
        views = (state[:, first_token:] for state in self._hidden_states[: len(config.vision_layers)])
        if not self.workload.train_tower:
            return list(views)
        return [_TowerEnd.apply(view.detach().requires_grad_()) for view in views]

    def _draw_hidden_state(self) -> Tensor:
        sizes, workload = self.workload.sizes, self.workload
        shape = (workload.batch_size, 1 + sizes.grid.num_patches, sizes.vision_hidden_size)
        return torch.randn(shape, generator=self._generator, device=workload.device, dtype=workload.dtype)


class _TowerEnd(torch.autograd.Function):
    """Takes the gradient of the features, as the tower's last operation would, and drops it.

    Without it the gradients would be copied into the features' own memory, which happens in no training.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


class Step:
    """One projector with its input and the gradient of its output, ready to run."""

    def __init__(self, projector: Projector, tower_output: TowerOutput) -> None:
        workload = tower_output.workload
        self.projector = projector
        self.grid = workload.sizes.grid
        self.features = tower_output.features(projector.config)
        num_tokens = projector.config.num_output_tokens(self.grid)
        shape = (workload.batch_size, num_tokens, projector.config.text_hidden_size)
        # A gradient as a language model hands it back; that of a sum would have stride 0 and be copied first.
        self.output_gradient = torch.randn(shape, device=workload.device, dtype=workload.dtype)
        self._call: nn.Module = _compiled(projector) if workload.compile else projector

    @torch.no_grad()
    def forward(self) -> None:
        """Inference: evaluation mode, no graph."""
        self.projector.eval()
        self._call(self.features, self.grid)

    def forward_backward(self, annotate: Callable[[str], AbstractContextManager] = nullcontext) -> None:
        """Training: forward, then the gradients, which stay until `release_gradients`.

        Args:
            annotate: makes a context for "forward" and one for "backward", such as torch.profiler's record_function.
        """
        self.projector.train()
        with annotate("forward"):
            output = self._call(self.features, self.grid)
        if output.requires_grad:
            with annotate("backward"):
                output.backward(self.output_gradient)

    def release_gradients(self) -> None:
        """Drop the gradients, as `zero_grad` does between two steps."""
        self.projector.zero_grad(set_to_none=True)


def build_step(selection: ProjectorSelection, config: ProjectorConfig, tower_output: TowerOutput) -> Step:
    """Allocate and draw the weights, the same ones at every call."""
    workload = tower_output.workload
    torch.manual_seed(_SEED)
    with workload.device:
        projector = selection.build(config)
    return Step(projector.to(workload.dtype), tower_output)


def _compiled(projector: Projector) -> nn.Module:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    # One whole graph: otherwise parts that cannot be compiled would run as they are without a word.
    return torch.compile(projector, fullgraph=not projector.compile_limitation, dynamic=False)
