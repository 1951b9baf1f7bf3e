"""The JSON document: its fields, and its quotients against sums by hand."""

import json
import platform

import pytest
import torch

from llava_saep.bench.projectors import ProjectorBenchmark
from llava_saep.bench.report import bench_document, compare, seconds_per_gflop
from llava_saep.bench.timing import Timing
from llava_saep.machine import describe_machine
from llava_saep.memory import available_memory

ROW_FIELDS = {
    "name",
    "error",
    "selection",
    "vision_layers",
    "num_tokens",
    "num_parameters",
    "weight_bytes",
    "flops",
    "peak_memory_bytes",
    "forward",
    "forward_backward",
    "relative_to_baseline",
}
TIMING_FIELDS = {"seconds", "median_seconds", "quartiles_seconds", "spread", "seconds_per_gflop"}


@pytest.fixture
def document(workload):
    benchmark = ProjectorBenchmark(["saep", "mlp2x_gelu", "identity"], workload, num_warmup=0, num_repeats=2)
    benchmark.run()
    machine = describe_machine(workload.device)
    made = bench_document(benchmark, command=["llava-saep", "projectors", "bench"], machine=machine)
    return json.loads(json.dumps(made))


def test_document_holds_settings_machine_methods_and_every_repeat(document):
    assert set(document) == {
        "command", "machine", "settings", "method", "baseline", "interrupted", "projectors", "profile"
    }  # fmt: skip
    assert document["settings"] == {
        "vision_hidden_size": 16,
        "text_hidden_size": 24,
        "grid": [4, 6],
        "num_vision_layers": 6,
        "batch_size": 2,
        "dtype": "float32",
        "device": "cpu",
        "train_tower": False,
        "compile": False,
        "num_warmup": 0,
        "num_repeats": 2,
    }
    saep = document["projectors"][0]
    assert set(saep) == ROW_FIELDS and set(saep["forward"]) == TIMING_FIELDS
    assert len(saep["forward"]["seconds"]) == len(saep["forward_backward"]["seconds"]) == 2
    assert saep["vision_layers"] == [3, 4, 6] and saep["selection"]["name"] == "saep"
    assert "torch.profiler" in document["method"]["peak_memory_bytes"]


def test_machine_is_named_with_its_versions_and_threads(document):
    machine = document["machine"]
    assert machine["torch"] == torch.__version__ and machine["python"] == platform.python_version()
    assert machine["num_threads"] == torch.get_num_threads()
    assert machine["processor"] and machine["num_cores"] >= 1 and machine["memory_bytes"] > 2**20


def test_row_that_failed_has_the_same_fields_without_numbers(document):
    identity = document["projectors"][2]
    assert set(identity) == ROW_FIELDS
    assert identity["error"] and identity["num_tokens"] is None and identity["forward"]["seconds"] == []
    assert identity["forward"]["median_seconds"] is None and identity["relative_to_baseline"] is None


def test_quotients_are_those_of_the_medians_and_operations(document):
    saep, baseline = document["projectors"][:2]
    relative = saep["relative_to_baseline"]
    for kind, operations in (
        ("forward", lambda row: row["flops"]["forward"]),
        ("forward_backward", lambda row: sum(row["flops"].values())),
    ):
        flops = operations(saep) / operations(baseline)
        seconds = saep[kind]["median_seconds"] / baseline[kind]["median_seconds"]
        assert relative[f"{kind}_flops"] == pytest.approx(flops)
        assert relative[f"{kind}_seconds"] == pytest.approx(seconds)
        assert relative[f"{kind}_seconds_per_flop"] == pytest.approx(seconds / flops)
        per_gflop = saep[kind]["median_seconds"] / (operations(saep) / 1e9)
        assert saep[kind]["seconds_per_gflop"] == pytest.approx(per_gflop)
    assert set(baseline["relative_to_baseline"].values()) == {1.0}


def test_without_the_baseline_nothing_is_compared(workload):
    benchmark = ProjectorBenchmark(["linear"], workload, num_warmup=0, num_repeats=1)
    benchmark.run()
    document = bench_document(benchmark, command=[], machine={})
    assert document["baseline"] is None and document["projectors"][0]["relative_to_baseline"] is None


def test_projector_that_computes_nothing_has_no_time_per_operation(workload):
    assert seconds_per_gflop(Timing((1.0,)), 0) is None
    assert seconds_per_gflop(Timing(), 10) is None
    benchmark = ProjectorBenchmark(["linear"], workload, num_warmup=0, num_repeats=1)
    untimed = benchmark.measurements[0]
    assert compare(untimed, untimed) is None


def test_free_memory_is_part_of_the_machines_memory():
    free = available_memory(torch.device("cpu"))
    assert free is None or 0 < free <= describe_machine(torch.device("cpu"))["memory_bytes"]
    assert available_memory(torch.device("meta")) is None
