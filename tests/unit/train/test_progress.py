"""What a run shows while it trains."""

import io
from types import SimpleNamespace

import pytest
import torch

from llava_saep.train.memory import peak_memory_bytes
from llava_saep.train.progress import SILENT_SECONDS, TrainingProgress, describe_logs

LOGS = {
    "loss": 1.25,
    "learning_rate": 1e-3,
    "tokens_per_second": 3210.4,
    "padding": 0.041,
    "tokens": 99,
    "grad_norm": 2,
}
ARGS = SimpleNamespace(device=torch.device("cpu"))


class Run:
    """A run as callbacks see it, with a clock that is set by hand."""

    def __init__(self, *, is_terminal=False, is_rank_zero=True, first_step=0):
        self.seconds, self.stream = 100.0, io.StringIO()
        self.progress = TrainingProgress(is_terminal=is_terminal, stream=self.stream, read_clock=lambda: self.seconds)
        self.state = SimpleNamespace(is_world_process_zero=is_rank_zero, global_step=first_step, max_steps=2000)
        self.progress.on_train_begin(ARGS, self.state, None)

    def step(self, seconds, logs=None):
        self.seconds += seconds
        self.state.global_step += 1
        self.progress.on_step_end(ARGS, self.state, None)
        if logs:
            self.progress.on_log(ARGS, self.state, None, logs=logs)

    @property
    def lines(self):
        return self.stream.getvalue().splitlines()


def test_what_is_not_known_is_left_out():
    assert describe_logs(LOGS, 3 * 2**30) == "loss 1.2500, lr 1.00e-03, 3,210 tokens/s, padding 4.1%, memory 3.00 GiB"
    assert describe_logs({"learning_rate": 1e-3, "samples_replaced": 2}, None) == "lr 1.00e-03, 2 samples replaced"


def test_a_line_for_each_log_entry_says_how_long_the_rest_takes():
    run = Run(first_step=1000)
    for _ in range(9):
        run.step(2)
    run.step(2, LOGS)
    (line,) = run.lines
    assert line.startswith("step 1,010/2,000 (50%): loss 1.2500, lr 1.00e-03, 3,210 tokens/s, padding 4.1%, memory ")
    assert line.endswith(", 0:33:00 left")  # 990 steps of 2 seconds; the first 1,000 were another session's


def test_silence_is_broken_between_rare_log_entries():
    run = Run()
    run.step(1, LOGS)
    run.step(SILENT_SECONDS / 2)
    run.step(SILENT_SECONDS)
    assert [line.split(" ")[1] for line in run.lines] == ["1/2,000", "3/2,000"]
    assert "loss 1.2500" in run.lines[1]


def test_a_terminal_has_one_line_that_is_redrawn():
    run = Run(is_terminal=True)
    for _ in range(3):
        run.step(1, LOGS)
    run.progress.on_train_end(ARGS, run.state, None)
    drawn = run.stream.getvalue()
    assert drawn.count("\n") == 1
    assert "3/2000" in drawn and "3,210 tokens/s" in drawn.replace("\n", "")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_other_ranks_are_silent(is_terminal):
    run = Run(is_terminal=is_terminal, is_rank_zero=False)
    run.step(1, LOGS)
    run.step(2 * SILENT_SECONDS)
    run.progress.on_train_end(ARGS, run.state, None)
    assert run.stream.getvalue() == ""


def test_peak_memory_is_at_least_what_was_allocated():
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(2**26)  # 256 MiB, written to
    assert peak_memory_bytes(torch.device("cpu")) >= max(before, held.nbytes)
    assert peak_memory_bytes(torch.device("meta")) is None
