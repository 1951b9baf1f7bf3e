"""What a run shows while it trains: one line that is redrawn on a terminal, lines now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from llava_saep.train.memory import peak_memory_bytes

SILENT_SECONDS = 60
"""Where there is no terminal, a line is printed at least this often, also between log entries."""

_BAR = "{percentage:3.0f}%|{bar:16}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"

_WORDS: Mapping[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4f}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
    "padding": lambda value: f"padding {value:.1%}",
    "samples_replaced": lambda value: f"{value} samples replaced",
    "micro_batches_left_out": lambda value: f"{value} micro-batches left out",
}
"""What is shown of a log entry, in this order."""


def describe_logs(logs: Mapping[str, float], memory_bytes: int | None) -> str:
    """Say what a log entry holds in a few words, and how much memory was used at most."""
    words = [describe(logs[name]) for name, describe in _WORDS.items() if name in logs]
    if memory_bytes is not None:
        words.append(f"memory {memory_bytes / 2**30:.2f} GiB")
    return ", ".join(words)


def describe_held_out(metrics: Mapping[str, float], step: int) -> str:
    """Say what was measured on held-out records."""
    return (
        f"step {step:,}: held-out loss {metrics['eval_loss']:.4f}, token accuracy {metrics['eval_token_accuracy']:.1%} "
        f"({metrics['eval_supervised']:,} tokens)"
    )


def describe_seconds(seconds: float) -> str:
    """Write a duration as hours, minutes and seconds."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def show_progress_of(trainer: Trainer) -> None:
    """Have a trainer show this progress in place of the library's own."""
    for library_callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(library_callback)
    trainer.add_callback(TrainingProgress(is_terminal=sys.stderr.isatty() and not trainer.args.disable_tqdm))


class TrainingProgress(TrainerCallback):
    """Shows loss, learning rate, speed, padding, memory and the time that is left, on rank zero.

    Args:
        is_terminal: whether a line can be redrawn.
        stream: where to; None: stderr.
        read_clock: seconds.
    """

    def __init__(
        self, *, is_terminal: bool, stream: TextIO | None = None, read_clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._is_terminal = is_terminal
        self._stream = sys.stderr if stream is None else stream
        self._read_clock = read_clock
        self._bar: tqdm | None = None
        self._logs: dict[str, float] = {}
        self._began, self._first_step, self._last_line = 0.0, 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and, in a terminal, the bar, at the step that a resumed run goes on from."""
        if not state.is_world_process_zero:
            return
        self._began = self._last_line = self._read_clock()
        self._first_step = state.global_step
        if self._is_terminal:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format=_BAR,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        elif self._read_clock() - self._last_line > SILENT_SECONDS:
            self._print_line(args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "learning_rate" not in logs:
            return
        self._logs = dict(logs)
        if self._bar is not None:
            self._bar.set_postfix_str(describe_logs(logs, peak_memory_bytes(args.device)))
        else:
            self._print_line(args, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            tqdm.write(describe_held_out(metrics, state.global_step), file=self._stream)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print_line(self, args: Any, state: Any) -> None:
        self._last_line = self._read_clock()
        step, last = state.global_step, state.max_steps
        words = describe_logs(self._logs, peak_memory_bytes(args.device))
        per_step = (self._last_line - self._began) / max(step - self._first_step, 1)
        left = describe_seconds(per_step * (last - step))
        tqdm.write(f"step {step:,}/{last:,} ({step / last:.0%}): {words}, {left} left", file=self._stream)
