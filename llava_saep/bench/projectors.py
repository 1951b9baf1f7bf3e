"""Speed and memory of projectors, measured so that they can be compared.

Every projector runs once per round and the rounds are repeated, so that a machine that grows slower or busier meets all
of them alike. Weights stay in memory between rounds as far as there is room; those of the largest projectors are drawn
anew in each round where there is not. A projector that fails leaves its error, and the run goes on.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llava_saep.bench.flops import FlopCount, count_flops
from llava_saep.bench.memory import PeakMemory, peak_of
from llava_saep.bench.placement import build_config, build_without_memory, select_by_hand
from llava_saep.bench.profiling import StepProfile, profile_step
from llava_saep.bench.timing import Timing, interleaved, timed
from llava_saep.bench.workload import Step, TowerOutput, Workload, build_step
from llava_saep.errors import UserError
from llava_saep.machine import GIB
from llava_saep.memory import available_memory
from projectors import ProjectorConfig, ProjectorError, ProjectorSelection

DEFAULT_PROJECTORS = (
    "saep",
    "mlp2x_gelu",
    "avg_pool",
    "c_abstractor",
    "d_abstractor",
    "ldpv2",
    "token_packer",
    "pixel_shuffle",
    "perceiver",
    "qformer",
    "dense_connector_dci",
)
"""What is measured when nobody names a projector: SAEP and the field's best-known ones."""

_SHARE_FOR_WEIGHTS = 0.5
"""Of the free memory, for weights that stay; the rest is for one step's activations and gradients."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One projector's row. What is not known (yet) is None; `error` says why there is no more.

    `weight_bytes` are those of parameters and buffers in the chosen number format.
    """

    name: str
    selection: ProjectorSelection
    config: ProjectorConfig | None = None
    num_tokens: int | None = None
    num_parameters: int | None = None
    weight_bytes: int | None = None
    flops: FlopCount | None = None
    peak_memory: PeakMemory | None = None
    forward: Timing = field(default_factory=Timing)
    forward_backward: Timing = field(default_factory=Timing)
    error: str | None = None


class ProjectorBenchmark:
    """Measures several projectors; `measurements` holds what is known at any time, also after an interruption."""

    def __init__(
        self,
        names: Sequence[str],
        workload: Workload,
        *,
        options: Mapping[str, Any] | None = None,
        num_warmup: int,
        num_repeats: int,
        progress: Callable[[str, str], None] = lambda stage, detail: None,
    ) -> None:
        """Look the projectors up and count; nothing is allocated or run yet.

        Args:
            names: whatever `--mm_projector_type` takes; a repeated one is measured once.
            options: options of every projector named.
            num_warmup: rounds that are run and forgotten.
            num_repeats: rounds that are timed.
            progress: is told the stage and the detail of what happens next.
        Raises:
            ProjectorError: an unknown name or option.
        """
        self.workload, self.progress = workload, progress
        self.num_warmup, self.num_repeats = num_warmup, num_repeats
        self._tower_output = TowerOutput(workload)
        self._rows = {name: _counted(name, options, workload) for name in dict.fromkeys(names)}
        weight_bytes = {name: row.weight_bytes for name, row in self._rows.items() if row.weight_bytes is not None}
        self._kept_names = names_to_keep(weight_bytes, available_memory(workload.device))
        self._kept_steps: dict[str, Step] = {}

    @property
    def measurements(self) -> list[Measurement]:
        """One per projector, in the order of the names."""
        return list(self._rows.values())

    def run(self) -> None:
        """Measure memory, one projector after the other, then time in rounds."""
        self.measure_memory()
        self.measure_time()

    def measure_memory(self) -> None:
        """In a pass of its own, because watching every allocation costs time."""
        for name in self._rows:
            self._attempt(name, "measuring memory", self._measure_memory)

    def measure_time(self) -> None:
        """All rounds; those of the warm-up are forgotten."""
        for index, name in interleaved(list(self._rows), self.num_warmup + self.num_repeats):
            repeat = index - self.num_warmup
            if repeat < 0:
                self._attempt(name, f"warm-up {index + 1} of {self.num_warmup}", self._warm_up)
            else:
                self._attempt(name, f"round {repeat + 1} of {self.num_repeats}", self._measure_time)

    def profile(self) -> StepProfile | None:
        """Look into one step of the first projector; None when it fails, which its row then tells."""
        profiles: list[StepProfile] = []
        name = next(iter(self._rows))
        self._attempt(name, "profiling", lambda _, step: profiles.append(profile_step(step)))
        return profiles[0] if profiles else None

    def _attempt(self, name: str, stage: str, measure: Callable[[str, Step], None]) -> None:
        """Run one projector, unless it has failed before; if it fails now, its row says why."""
        if self._rows[name].error is not None:
            return
        self.progress(stage, name)
        try:
            step = self._step(name)
            measure(name, step)
            step.release_gradients()
        except Exception as error:  # A user's projector may raise anything, and the others' numbers must not be lost.
            self._kept_steps.pop(name, None)
            self._note(name, error=_reason(error))
        if name not in self._kept_steps:
            step = None
            gc.collect()

    def _step(self, name: str) -> Step:
        """The projector ready to run: kept since its first turn, or drawn anew; then run in once."""
        if name in self._kept_steps:
            return self._kept_steps[name]
        row = self._rows[name]
        _refuse_without_room(row, available_memory(self.workload.device))
        step = build_step(row.selection, row.config, self._tower_output)
        self._warm_up(name, step)
        if name in self._kept_names:
            self._kept_steps[name] = step
        return step

    def _warm_up(self, name: str, step: Step) -> None:
        step.forward()
        step.forward_backward()
        step.release_gradients()

    def _measure_memory(self, name: str, step: Step) -> None:
        forward = peak_of(step.forward, self.workload.device)
        forward_backward = peak_of(step.forward_backward, self.workload.device)
        if forward is not None and forward_backward is not None:
            self._note(name, peak_memory=PeakMemory(forward=forward, forward_backward=forward_backward))

    def _measure_time(self, name: str, step: Step) -> None:
        forward = timed(step.forward, self.workload.device)
        forward_backward = timed(step.forward_backward, self.workload.device)
        row = self._rows[name]
        self._note(
            name,
            forward=row.forward.with_repeat(forward),
            forward_backward=row.forward_backward.with_repeat(forward_backward),
        )

    def _note(self, name: str, **known: Any) -> None:
        self._rows[name] = replace(self._rows[name], **known)


def names_to_keep(weight_bytes: Mapping[str, int], free_bytes: int | None) -> frozenset[str]:
    """Choose the projectors whose weights stay in memory between rounds: the smallest first, up to half of it."""
    if free_bytes is None:
        return frozenset(weight_bytes)
    kept, remaining = set(), _SHARE_FOR_WEIGHTS * free_bytes
    for name in sorted(weight_bytes, key=weight_bytes.__getitem__):
        remaining -= weight_bytes[name]
        if remaining < 0:
            break
        kept.add(name)
    return frozenset(kept)


def _counted(name: str, options: Mapping[str, Any] | None, workload: Workload) -> Measurement:
    """Tokens, parameters and operations, for which nothing needs to be allocated."""
    selection = select_by_hand(name, options)
    row = Measurement(name=selection.name if ":" in name else name, selection=selection)
    grid = workload.sizes.grid
    try:
        config = build_config(selection, workload.sizes)
        projector = build_without_memory(selection, config).to(workload.dtype)
        tensors = [*projector.parameters(), *projector.buffers()]
        return replace(
            row,
            config=config,
            num_tokens=config.num_output_tokens(grid),
            num_parameters=sum(parameter.numel() for parameter in projector.parameters()),
            weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            flops=count_flops(projector, grid, workload.batch_size, workload.train_tower),
        )
    except Exception as error:  # As above: a user's projector may raise anything.
        return replace(row, error=_reason(error))


def _refuse_without_room(row: Measurement, free_bytes: int | None) -> None:
    """Refuse weights that, with their gradients, cannot fit: the system would end the whole run."""
    needed = 2 * row.weight_bytes
    if free_bytes is not None and needed > free_bytes:
        raise UserError(
            f"weights and gradients need {needed / GIB:.1f} GiB, but {free_bytes / GIB:.1f} GiB are free; "
            "choose a smaller --dtype or another device"
        )


def _reason(error: Exception) -> str:
    message = str(error) or "no message"
    return message if isinstance(error, ProjectorError | UserError) else f"{type(error).__name__}: {message}"
