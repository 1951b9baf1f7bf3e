"""Plans and runs the sides: each in a process of its own, in turns, so that what disturbs one disturbs all alike.

On a processor all sides stay alive and take their steps round by round. On a GPU there is room for one at a time: each
process builds its model when its turn comes and ends with it. A side that fails leaves its error, and the others go on.
"""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from llava_saep.bench.flops import FlopCount, count_flops
from llava_saep.bench.placement import select_by_hand
from llava_saep.bench.timing import Timing, interleaved
from llava_saep.bench.training.conversations import Conversation, draw_conversations, padding_share
from llava_saep.bench.training.models import projector_config_for
from llava_saep.bench.training.side import Failure, Side, Step, TrainingWorkload, run_side
from llava_saep.bench.training.work import StepWork, peak_flops, step_work, utilisation
from llava_saep.model.vision_tower import resolve_layer
from projectors import ProjectorConfig

_SECONDS_TO_END = 10
_LOG_LINES = 8


@dataclass(frozen=True, kw_only=True)
class SideResult:
    """Steps of one side in the order of measuring; what is derived from them is None before the first."""

    side: Side
    workload: TrainingWorkload
    steps: tuple[Step, ...] = ()
    error: str | None = None

    @cached_property
    def projector_config(self) -> ProjectorConfig:
        """Of the side's projector between this tower and language model."""
        return projector_config_for(
            select_by_hand(self.side.projector, self.side.projector_options), self.workload.shape
        )

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one image."""
        return self.projector_config.num_output_tokens(self.workload.shape.grid)

    @property
    def batch_size(self) -> int:
        """Conversations per step; fewer than asked for where the GPU had too little memory."""
        return self.steps[-1].batch_size if self.steps else self.workload.batch_size

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        """What a step trains on."""
        return draw_conversations(self.batch_size, self.workload.texts, self.workload.seed)

    @property
    def num_tokens(self) -> int:
        """Real tokens per step, images included."""
        return sum(self.num_image_tokens + each.num_text_tokens for each in self.conversations)

    @property
    def num_supervised(self) -> int:
        """Tokens per step that are learned."""
        return sum(each.num_supervised for each in self.conversations)

    @property
    def wall(self) -> Timing:
        """Seconds per step."""
        return Timing(tuple(step.seconds for step in self.steps))

    @property
    def cpu(self) -> Timing:
        """Processor seconds per step, of all threads."""
        return Timing(tuple(step.cpu_seconds for step in self.steps))

    @property
    def samples_per_second(self) -> float | None:
        """Conversations per second, by the median step."""
        return self.batch_size / self.wall.median if self.steps else None

    @property
    def supervised_tokens_per_second(self) -> float | None:
        """Learned tokens per second, by the median step."""
        return self.num_supervised / self.wall.median if self.steps else None

    @property
    def padding_waste(self) -> float | None:
        """Share of the language model's input that is padding."""
        return padding_share(self.steps[-1].num_positions, self.num_tokens) if self.steps else None

    @property
    def peak_memory_bytes(self) -> int | None:
        """The highest of all steps, weights and optimizer included."""
        return max((step.peak_memory_bytes for step in self.steps if step.peak_memory_bytes), default=None)

    @property
    def first_loss(self) -> float | None:
        """The loss of the first step, before anything was learned."""
        return next((step.first_loss for step in self.steps if step.first_loss is not None), None)

    @property
    def work(self) -> StepWork:
        """Operations that a step needs."""
        workload, config = self.workload, self.projector_config
        layers = (resolve_layer(layer, workload.shape.num_vision_layers) for layer in config.vision_layers)
        return step_work(
            workload.shape,
            self.conversations,
            num_image_tokens=self.num_image_tokens,
            deepest_layer=max(layers),
            projector=self._projector_flops(),
            train=workload.train,
            lora_rank=0 if workload.lora is None else workload.lora.rank,
        )

    def utilisation(self, device_name: str) -> float | None:
        """MFU by the median step; None where nothing was measured or the device's peak is not known."""
        if not self.steps:
            return None
        return utilisation(self.work.total, self.wall.median, peak_flops(device_name, self.workload.dtype))

    def _projector_flops(self) -> FlopCount:
        selection = select_by_hand(self.side.projector, self.side.projector_options)
        with torch.device("meta"):
            projector = selection.build(self.projector_config)
        return count_flops(projector, self.workload.shape.grid, self.batch_size)


class TrainingBenchmark:
    """Measures several sides; `results` holds what is known at any time, also after an interruption."""

    def __init__(
        self,
        sides: Sequence[Side],
        workload: TrainingWorkload,
        *,
        folder: Path,
        num_warmup: int,
        num_rounds: int,
        steps_per_round: int,
        keeps_processes: bool,
        progress: Callable[[str, str], None] = lambda stage, detail: None,
    ) -> None:
        """
        Args:
            folder: for the processes' output, which is read when one fails.
            num_warmup: steps of a new process that are forgotten; at least 1.
            num_rounds: each side has its turn in each.
            steps_per_round: measured steps of one turn.
            keeps_processes: a process lives through all rounds; else for one turn, and the sides share the device.
            progress: is told the stage and the detail of what happens next.
        """
        self.workload, self.progress = workload, progress
        self.num_warmup, self.num_rounds, self.steps_per_round = num_warmup, num_rounds, steps_per_round
        self.keeps_processes = keeps_processes
        self._folder = folder
        self._results = {side.name: SideResult(side=side, workload=workload) for side in sides}
        self._processes: dict[str, SideProcess] = {}

    @property
    def results(self) -> list[SideResult]:
        """One per side, in their order."""
        return list(self._results.values())

    def run(self) -> None:
        """Take all turns; no process is left behind, whatever happens."""
        try:
            for name in self._results:
                self._start(name)  # all at once, since importing takes each a while
            if self.keeps_processes:
                for name in self._results:
                    self._attempt(name, "building and warming up", self._warm_up)
            for round_index, name in interleaved(list(self._results), self.num_rounds):
                self._attempt(name, f"round {round_index + 1} of {self.num_rounds}", self._take_turn)
        finally:
            for process in self._processes.values():
                process.tell_to_stop()
            for name in list(self._processes):
                self._processes.pop(name).end()

    def _take_turn(self, name: str) -> None:
        if name not in self._processes:
            self._start(name)
        if not self.keeps_processes:
            self._warm_up(name)
        for _ in range(self.steps_per_round):
            step = self._processes[name].step()
            result = self._results[name]
            self._results[name] = replace(result, steps=(*result.steps, step))
        if not self.keeps_processes:
            self._processes.pop(name).end()

    def _start(self, name: str) -> None:
        log_path = self._folder / f"{name}.log".replace("/", "_")
        self._processes[name] = SideProcess(self._results[name].side, self.workload, log_path)

    def _warm_up(self, name: str) -> None:
        """Build, and take the steps that are forgotten; the first says how many conversations there is memory for."""
        self._processes[name].begin(self.workload.batch_size)
        for _ in range(self.num_warmup):
            step = self._processes[name].step()
            self._adopt_batch_size(step.batch_size)

    def _adopt_batch_size(self, batch_size: int) -> None:
        """Where a side had to take fewer conversations, those that start after it take as many."""
        self.workload = replace(self.workload, batch_size=min(batch_size, self.workload.batch_size))

    def _attempt(self, name: str, stage: str, measure: Callable[[str], None]) -> None:
        """Let one side do something, unless it has failed before; if it fails now, its result says why."""
        if self._results[name].error is not None:
            return
        self.progress(stage, name)
        try:
            measure(name)
        except SideFailure as error:
            self._results[name] = replace(self._results[name], error=str(error))
            self._processes.pop(name).end()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start processes inside the block that Ctrl-C does not reach: it is the parent's to end them and tell of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class SideFailure(Exception):
    """A side ended without the step that it was asked for."""


class SideProcess:
    """The parent's end of one side's process."""

    def __init__(self, side: Side, workload: TrainingWorkload, log_path: Path) -> None:
        """Start it. A new interpreter, not a fork: its memory is its own from the first import on."""
        context = multiprocessing.get_context("spawn")
        self._log_path = log_path
        self._connection: Connection
        self._connection, other_end = context.Pipe()
        arguments = (side, workload, str(log_path), other_end)
        self._process: BaseProcess = context.Process(target=run_side, args=arguments, daemon=True)
        with _without_interrupts():
            self._process.start()
        other_end.close()  # so that the end of the process is seen as the end of its messages

    def begin(self, batch_size: int) -> None:
        """Have it build its model for so many conversations per step; until then it holds no memory of the device."""
        try:
            self._connection.send(batch_size)
        except OSError as error:
            raise SideFailure(self._end_without_words()) from error

    def step(self) -> Step:
        """Have it take one step.

        Raises:
            SideFailure: it cannot, or the process is gone.
        """
        try:
            self._connection.send("step")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise SideFailure(self._end_without_words()) from error
        if isinstance(answer, Failure):
            raise SideFailure(answer.reason)
        return answer

    def tell_to_stop(self) -> None:
        """Have it end after the step that it may be in."""
        try:
            self._connection.send("stop")
        except OSError:
            pass  # gone already

    def end(self) -> None:
        """Tell it to stop, and make sure that it has."""
        self.tell_to_stop()
        self._process.join(_SECONDS_TO_END)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    def _end_without_words(self) -> str:
        self._process.join(_SECONDS_TO_END)
        lines = self._log_path.read_text(errors="replace").splitlines() if self._log_path.is_file() else []
        said = " | ".join(line.strip() for line in lines[-_LOG_LINES:] if line.strip())
        code = self._process.exitcode
        killed = " (killed: the machine may have had too little memory)" if code == -9 else ""
        return f"its process ended with code {code}{killed}" + (f": {said}" if said else "")


def relative_to(result: SideResult, baseline: SideResult) -> Mapping[str, float] | None:
    """How many times faster a side is and how many times less it needs than the baseline; None without steps."""
    if not (result.steps and baseline.steps):
        return None
    ratios = {
        "samples_per_second": result.samples_per_second / baseline.samples_per_second,
        "cpu_seconds": (baseline.cpu.median / baseline.batch_size) / (result.cpu.median / result.batch_size),
    }
    if result.peak_memory_bytes and baseline.peak_memory_bytes:
        ratios["peak_memory_bytes"] = baseline.peak_memory_bytes / result.peak_memory_bytes
    return ratios


def loss_disagreement(results: Iterable[SideResult]) -> float | None:
    """The largest relative difference of first losses between sides of the same projector and batch; None if single.

    Such sides start from the same weights, so that more than rounding means that they do not do the same work.
    """
    groups: dict[tuple[str, int], list[float]] = {}
    for result in results:
        if result.first_loss is not None:
            groups.setdefault((result.side.projector, result.batch_size), []).append(result.first_loss)
    spreads = [(max(losses) - min(losses)) / max(losses) for losses in groups.values() if len(losses) > 1]
    return max(spreads, default=None)
