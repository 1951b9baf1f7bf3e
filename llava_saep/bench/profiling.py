"""Where one step's time goes, operator by operator, and every operator that does nothing but move data.

The profiler sees what libraries are asked for as operators, copies inside torch's own kernels included; what a library
rearranges inside one kernel (oneDNN, cuDNN) it does not see.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from torch.profiler import ProfilerActivity, profile, record_function

from llava_saep.bench.memory import quiet_profiler
from llava_saep.bench.timing import synchronize
from llava_saep.bench.workload import Step

MOVING_OPERATORS = (
    "aten::copy_",
    "aten::cat",
    "aten::index",
    "aten::index_select",
    "aten::gather",
    "aten::roll",
    "aten::constant_pad_nd",
    "aten::replication_pad1d",
    "aten::replication_pad2d",
    "aten::reflection_pad2d",
)
"""Operators that write memory and compute nothing; one inside another counts as that other one."""

WRAPPING_OPERATORS = ("aten::contiguous", "aten::clone", "aten::_to_copy")
"""Operators that call one of those: listed, but what they move is counted there."""

_FORWARD, _BACKWARD = "forward", "backward"
_AUTOGRAD_PREFIX = "autograd::engine::evaluate_function: "


@dataclass(frozen=True, kw_only=True)
class OperatorTime:
    """All calls of one operator; self time leaves out the operators that it calls, `share` is of all self times."""

    operator: str
    num_calls: int
    self_seconds: float
    share: float


@dataclass(frozen=True, kw_only=True)
class CopySite:
    """One place where data is moved: `inside` is the outermost operator, or autograd's node in the backward."""

    phase: Literal["forward", "backward"]
    operator: str
    inside: str
    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Copies:
    """All calls at one site: `num_bytes` written, and seconds on the side of the CPU (on a GPU, of the launch)."""

    site: CopySite
    num_calls: int
    num_bytes: int
    seconds: float

    @property
    def is_wrapper(self) -> bool:
        """Whether its bytes are counted at another operator too."""
        return self.site.operator in WRAPPING_OPERATORS


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """One forward and backward: operators by self time, and copies by bytes."""

    operators: tuple[OperatorTime, ...]
    copies: tuple[Copies, ...]

    @property
    def num_copied_bytes(self) -> int:
        """Bytes that moving operators write, each once."""
        return sum(copies.num_bytes for copies in self.copies if not copies.is_wrapper)


def profile_step(step: Step) -> StepProfile:
    """Run one forward with backward under torch.profiler, after one without it."""
    step.forward_backward()
    step.release_gradients()
    is_cuda = step.output_gradient.is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with quiet_profiler(), profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
        step.forward_backward(annotate=record_function)
        synchronize(step.output_gradient.device)
    step.release_gradients()
    roots = profiler.profiler.kineto_results.experimental_event_tree()
    return StepProfile(operators=tuple(_operator_times(profiler, is_cuda)), copies=tuple(_collect_copies(roots)))


def _operator_times(profiler: profile, is_cuda: bool) -> list[OperatorTime]:
    calls: dict[str, int] = {}
    microseconds: dict[str, float] = {}
    for row in profiler.key_averages():
        if row.key not in (_FORWARD, _BACKWARD, "[memory]"):
            # Autograd's frame around a node and the node itself are one.
            name = row.key.removeprefix(_AUTOGRAD_PREFIX)
            self_time = row.self_device_time_total if is_cuda else row.self_cpu_time_total
            calls[name] = max(calls.get(name, 0), row.count)
            microseconds[name] = microseconds.get(name, 0.0) + self_time
    total = sum(microseconds.values()) or 1.0
    times = [
        OperatorTime(operator=name, num_calls=calls[name], self_seconds=spent / 1e6, share=spent / total)
        for name, spent in microseconds.items()
    ]
    return sorted(times, key=lambda time: -time.self_seconds)


def _collect_copies(roots: Iterable[Any]) -> list[Copies]:
    sums: dict[CopySite, list[float]] = {}
    for node, ancestors in _walk(roots, ()):
        if node.name not in MOVING_OPERATORS + WRAPPING_OPERATORS:
            continue
        if any(ancestor.name in MOVING_OPERATORS for ancestor in ancestors):
            continue
        entry = sums.setdefault(_site(node, ancestors), [0, 0, 0.0])
        entry[0] += 1
        entry[1] += _bytes_written(node)
        entry[2] += node.duration_time_ns / 1e9
    copies = [
        Copies(site=site, num_calls=calls, num_bytes=num_bytes, seconds=seconds)
        for site, (calls, num_bytes, seconds) in sums.items()
    ]
    return sorted(copies, key=lambda entry: (entry.is_wrapper, -entry.num_bytes))


def _walk(nodes: Iterable[Any], ancestors: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    for node in nodes:
        yield node, ancestors
        yield from _walk(node.children, (*ancestors, node))


def _site(node: Any, ancestors: Sequence[Any]) -> CopySite:
    names = [ancestor.name for ancestor in ancestors]
    # On a GPU the backward runs in a thread of its own, outside the annotation.
    is_backward = _BACKWARD in names or any(name.startswith(_AUTOGRAD_PREFIX) for name in names)
    callers = [name for name in names if name not in (_FORWARD, _BACKWARD)]
    tensors = _tensors(node)
    return CopySite(
        phase=_BACKWARD if is_backward else _FORWARD,
        operator=node.name,
        inside=callers[0].removeprefix(_AUTOGRAD_PREFIX) if callers else "",
        kind=_kind(tensors) if node.name == "aten::copy_" else "",
        shape=tuple(tensors[0].sizes) if tensors else (),
    )


def _kind(tensors: Sequence[Any]) -> str:
    """What a copy is for, from the layouts of its target and source."""
    target, source = tensors[:2]
    if target.dtype != source.dtype:
        return f"{source.dtype} to {target.dtype}".replace("torch.", "")
    if any(stride == 0 and size > 1 for stride, size in zip(source.strides, source.sizes, strict=True)):
        return "broadcast"  # such as a bias, written into the output before the product is added
    return "same layout" if target.strides == source.strides else "other layout"


def _bytes_written(node: Any) -> int:
    tensors = _tensors(node)
    if node.name == "aten::copy_":
        return _num_bytes(tensors[0])
    if node.name == "aten::cat":
        return sum(map(_num_bytes, tensors))
    # The others write what they allocate.
    allocations = [inner.extra_fields.alloc_size for inner, _ in _walk(node.children, ()) if inner.name == "[memory]"]
    return sum(size for size in allocations if size > 0)


def _tensors(node: Any) -> list[Any]:
    """The tensors among an operator's arguments, those in lists too."""
    inputs = getattr(node.extra_fields, "inputs", None) or []
    flat = [each for entry in inputs for each in (entry if isinstance(entry, list) else [entry])]
    return [each for each in flat if hasattr(each, "sizes")]


def _num_bytes(tensor: Any) -> int:
    return prod(tensor.sizes) * tensor.dtype.itemsize
