"""The order in which sides start, build, step and end; with stand-ins for their processes."""

import pytest

from llava_saep.bench.training import benchmark as benchmark_module
from llava_saep.bench.training.benchmark import SideFailure, TrainingBenchmark
from llava_saep.bench.training.side import Step
from tests.fixtures.bench import plan


@pytest.fixture
def events(monkeypatch):
    """What happened to the stand-ins, in order; a side's name in `failing` fails at its first step."""
    happened = []

    class StandIn:
        fits = 100
        failing = ()

        def __init__(self, side, workload, log_path):
            self.name = side.name.split()[0]
            happened.append(f"start {self.name}")

        def begin(self, batch_size):
            self.batch_size = min(batch_size, self.fits)
            happened.append(f"begin {self.name} {batch_size}")

        def step(self):
            if self.name in self.failing:
                raise SideFailure("out of luck")
            happened.append(f"step {self.name}")
            return Step(
                seconds=1.0,
                cpu_seconds=1.0,
                batch_size=self.batch_size,
                num_positions=10,
                peak_memory_bytes=1,
                first_loss=None,
            )

        def tell_to_stop(self):
            pass

        def end(self):
            happened.append(f"end {self.name}")

    monkeypatch.setattr(benchmark_module, "SideProcess", StandIn)
    return happened, StandIn


def run(tmp_path, *, keeps_processes, num_rounds=2):
    sides, workload = plan(tmp_path, "saep", "--batch_size", "8")
    measured = TrainingBenchmark(
        sides,
        workload,
        folder=tmp_path,
        num_warmup=1,
        num_rounds=num_rounds,
        steps_per_round=1,
        keeps_processes=keeps_processes,
    )
    measured.run()
    return measured


def test_on_a_processor_sides_take_turns_and_stay(events, tmp_path):
    happened, _ = events
    measured = run(tmp_path, keeps_processes=True)
    assert happened == [
        *["start stock", "start own"],
        *["begin stock 8", "step stock", "begin own 8", "step own"],
        *["step stock", "step own", "step stock", "step own"],
        *["end stock", "end own"],
    ]
    assert [len(result.steps) for result in measured.results] == [2, 2]  # the first of each is warm-up


def test_on_a_gpu_one_model_is_there_at_a_time(events, tmp_path):
    happened, _ = events
    run(tmp_path, keeps_processes=False)
    turns = ["begin stock 8", "step stock", "step stock", "end stock", "begin own 8", "step own", "step own", "end own"]
    second = ["start stock", *turns[:4], "start own", *turns[4:]]
    assert happened == ["start stock", "start own", *turns, *second]


def test_what_fits_one_side_is_what_the_next_is_given(events, tmp_path):
    happened, stand_in = events
    stand_in.fits = 4
    measured = run(tmp_path, keeps_processes=False, num_rounds=1)
    assert "begin own 4" in happened
    assert [result.batch_size for result in measured.results] == [4, 4]


@pytest.mark.parametrize("keeps_processes", [True, False])
def test_a_failing_side_ends_and_the_other_is_measured(events, keeps_processes, tmp_path):
    happened, stand_in = events
    stand_in.failing = ("stock",)
    stock, own = run(tmp_path, keeps_processes=keeps_processes).results
    assert stock.error == "out of luck" and stock.steps == ()
    assert own.error is None and len(own.steps) == 2
    assert happened.count("end stock") == 1


def test_no_process_is_left_after_an_interruption(events, tmp_path, monkeypatch):
    happened, stand_in = events

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(stand_in, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, keeps_processes=True)
    assert happened[-2:] == ["end stock", "end own"]
