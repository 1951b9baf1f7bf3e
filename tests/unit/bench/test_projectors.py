"""The run over several projectors: its order, what a failure or an interruption leaves, and what stays in memory."""

import gc
from dataclasses import replace

import pytest
import torch

from llava_saep.bench import projectors as bench
from llava_saep.bench.projectors import DEFAULT_PROJECTORS, ProjectorBenchmark, names_to_keep
from projectors import (
    PatchGrid,
    Projector,
    ProjectorConfig,
    ProjectorError,
    register_projector,
    select_projector,
)


def run(names, workload, **settings):
    stages = []
    settings = {"num_warmup": 1, "num_repeats": 2, **settings}
    benchmark = ProjectorBenchmark(names, workload, progress=lambda *stage: stages.append(stage), **settings)
    benchmark.run()
    return benchmark, stages


class CountingConfig(ProjectorConfig):
    def num_output_tokens(self, grid):
        return grid.num_patches


def register_failing(name, error, failing_call):
    """A projector whose forward fails at its n-th call on the processor."""

    class Failing(Projector):
        calls = 0

        def __init__(self, config):
            super().__init__(config)
            self.linear = torch.nn.Linear(config.vision_hidden_size, config.text_hidden_size)

        def reset_parameters(self):
            self.linear.reset_parameters()

        def forward(self, features, grid):
            if not features[0].is_meta:
                type(self).calls += 1
                if self.calls == failing_call:
                    raise error
            return self.linear(features[0])

    register_projector(name, config=CountingConfig, summary="Fails.")(Failing)
    return Failing


def test_projectors_take_turns_in_every_round(workload):
    _, stages = run(["linear", "saep"], workload)
    assert stages == [
        (stage, name)
        for stage in ("measuring memory", "warm-up 1 of 1", "round 1 of 2", "round 2 of 2")
        for name in ("linear", "saep")
    ]


def test_row_holds_sizes_operations_memory_and_every_repeat(workload):
    benchmark, _ = run(["linear"], workload, num_repeats=3)
    (row,) = benchmark.measurements
    assert (row.num_tokens, row.num_parameters, row.weight_bytes) == (24, 16 * 24 + 24, 4 * (16 * 24 + 24))
    assert row.flops.forward == 2 * 24 * 16 * 24 * 2
    assert len(row.forward.seconds) == len(row.forward_backward.seconds) == 3
    assert all(0 < forward for forward in row.forward.seconds)
    assert row.peak_memory.forward_backward >= 4 * (16 * 24 + 24) + 4 * 2 * 24 * 24
    assert row.error is None


def test_projector_that_cannot_take_the_sizes_has_an_error_and_the_others_have_numbers(workload):
    benchmark, stages = run(["identity", "linear"], workload)
    refused, measured = benchmark.measurements
    assert "16" in refused.error and "24" in refused.error and not refused.forward.seconds
    assert len(measured.forward.seconds) == 2
    assert "identity" not in {name for _, name in stages}


def test_failure_in_the_middle_keeps_what_was_measured_and_ends_its_turns(workload):
    # Two calls to run it in, two for memory, two to warm up and two in the first round; the ninth fails.
    failing = register_failing("fails_late", RuntimeError("no more"), 9)
    benchmark, _ = run(["fails_late", "linear"], workload, num_repeats=3)
    late, other = benchmark.measurements
    assert late.error == "RuntimeError: no more"
    assert len(late.forward.seconds) == 1 and late.peak_memory is not None
    assert failing.calls == 9
    assert len(other.forward.seconds) == 3


def test_weights_of_a_failed_projector_are_released(workload):
    failure = RuntimeError("no more")
    register_failing("fails_late", failure, 9)
    benchmark, _ = run(["fails_late"], workload, num_repeats=3)
    assert benchmark.measurements[0].error
    failure.__traceback__ = None  # which this test alone holds on to
    assert not [each for each in gc.get_objects() if type(each).__name__ == "Failing"]


def test_failure_while_counting_is_an_error_of_its_row(workload):
    class Broken(Projector):
        def forward(self, features, grid):
            raise KeyError("lost")

    register_projector("fails_at_once", config=CountingConfig, summary="Fails.")(Broken)
    benchmark, _ = run(["fails_at_once", "linear"], workload)
    assert benchmark.measurements[0].error.startswith("KeyError")
    assert benchmark.measurements[1].error is None


def test_interruption_leaves_the_finished_rounds(workload):
    register_failing("is_stopped", KeyboardInterrupt(), 9)
    benchmark = ProjectorBenchmark(["linear", "is_stopped"], workload, num_warmup=1, num_repeats=3)
    with pytest.raises(KeyboardInterrupt):
        benchmark.run()
    linear, stopped = benchmark.measurements
    assert (len(linear.forward.seconds), len(stopped.forward.seconds)) == (2, 1)


def test_unknown_names_and_options_end_the_run_before_it_begins(workload):
    with pytest.raises(ProjectorError, match="Did you mean 'saep'"):
        ProjectorBenchmark(["sape"], workload, num_warmup=0, num_repeats=1)
    with pytest.raises(ProjectorError, match="strid"):
        ProjectorBenchmark(["saep"], workload, options={"strid": 2}, num_warmup=0, num_repeats=1)


def test_options_reach_the_projector(workload):
    benchmark, _ = run(["saep"], workload, options={"stride": 3})
    assert benchmark.measurements[0].num_tokens == 2 * 2


def count_builds(monkeypatch):
    built = []
    build_step = bench.build_step
    monkeypatch.setattr(
        bench, "build_step", lambda selection, *rest: built.append(selection.name) or build_step(selection, *rest)
    )
    return built


def test_weights_are_drawn_once_where_there_is_room(workload, monkeypatch):
    built = count_builds(monkeypatch)
    run(["linear", "saep"], workload)
    assert built == ["linear", "saep"]


def test_without_room_weights_are_drawn_for_every_turn_and_rounds_stay_interleaved(workload, monkeypatch):
    built = count_builds(monkeypatch)
    monkeypatch.setattr(bench, "names_to_keep", lambda weight_bytes, free_bytes: frozenset({"linear"}))
    benchmark, stages = run(["linear", "saep"], workload)
    assert built == ["linear", "saep", "saep", "saep", "saep"]
    assert [name for _, name in stages] == ["linear", "saep"] * 4
    assert all(len(row.forward.seconds) == 2 for row in benchmark.measurements)


def test_smallest_weights_stay_and_take_at_most_half_of_the_memory():
    sizes = {"large": 60, "small": 10, "medium": 30}
    assert names_to_keep(sizes, 200) == {"small", "medium", "large"}
    assert names_to_keep(sizes, 199) == {"small", "medium"}
    assert names_to_keep(sizes, 79) == {"small"}
    assert names_to_keep(sizes, 0) == frozenset()
    assert names_to_keep(sizes, None) == {"small", "medium", "large"}


def test_weights_that_cannot_fit_are_refused_instead_of_ending_the_run(workload, monkeypatch):
    # linear's 408 numbers take 1632 bytes, with gradients 3264.
    monkeypatch.setattr(bench, "available_memory", lambda device: 3263)
    refused = run(["linear"], workload)[0].measurements[0]
    assert "GiB" in refused.error and not refused.forward.seconds
    monkeypatch.setattr(bench, "available_memory", lambda device: 3264)
    assert run(["linear"], workload)[0].measurements[0].error is None


def test_rectangular_grid_and_number_format_are_those_of_the_workload(workload):
    wide = replace(workload, dtype=torch.bfloat16, sizes=replace(workload.sizes, grid=PatchGrid(2, 8)))
    row = run(["saep"], wide)[0].measurements[0]
    assert row.num_tokens == 1 * 4 and row.error is None
    assert row.weight_bytes == 2 * row.num_parameters


def test_default_projectors_are_registered_and_hold_saep_and_its_baseline():
    for name in DEFAULT_PROJECTORS:
        select_projector(name)
    assert {"saep", "mlp2x_gelu"} < set(DEFAULT_PROJECTORS)
