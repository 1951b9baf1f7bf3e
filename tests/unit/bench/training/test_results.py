"""What is derived from steps, by hand; and what is said when sides cannot be compared."""

import json

import pytest
import torch

from llava_saep.bench.training.benchmark import SideResult, TrainingBenchmark, loss_disagreement, relative_to
from llava_saep.bench.training.report import training_document
from llava_saep.bench.training.side import Step
from llava_saep.commands.bench.training_tables import training_lines
from llava_saep.machine import describe_machine
from tests.fixtures.bench import plan


def result(tmp_path, *steps, which=0):
    """Result of the stock side (0) or the own one with mlp2x_gelu (1); each step (seconds, CPU-s, peak, loss)."""
    sides, workload = plan(tmp_path, "mlp2x_gelu")
    made = [
        Step(
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            batch_size=3,
            num_positions=400,
            peak_memory_bytes=peak,
            first_loss=loss,
        )
        for seconds, cpu_seconds, peak, loss in steps
    ]
    return SideResult(side=sides[which], workload=workload, steps=tuple(made))


def test_rates_are_those_of_the_median_step(tmp_path):
    measured = result(tmp_path, (2.0, 3.0, 100, None), (1.0, 2.0, 300, None), (9.0, 9.0, 200, None))
    assert measured.samples_per_second == 3 / 2.0
    assert measured.supervised_tokens_per_second == measured.num_supervised / 2.0
    assert measured.peak_memory_bytes == 300
    assert measured.padding_waste == pytest.approx((400 - measured.num_tokens) / 400)
    assert measured.num_tokens == 3 * 16 + sum(each.num_text_tokens for each in measured.conversations)


def test_ratios_above_one_are_in_favour_of_the_side(tmp_path):
    baseline = result(tmp_path, (4.0, 6.0, 900, None))
    ours = result(tmp_path, (2.0, 2.0, 300, None), which=1)
    assert relative_to(ours, baseline) == {"samples_per_second": 2.0, "cpu_seconds": 3.0, "peak_memory_bytes": 3.0}


def test_a_side_without_steps_has_no_ratios_and_no_rates(tmp_path):
    failed = result(tmp_path)
    assert relative_to(failed, result(tmp_path, (4.0, 6.0, 900, None))) is None
    assert failed.samples_per_second is failed.padding_waste is failed.peak_memory_bytes is None
    assert failed.utilisation("NVIDIA H200") is None


def test_utilisation_needs_a_known_peak(tmp_path):
    measured = result(tmp_path, (2.0, 3.0, 100, None))
    assert measured.utilisation("AMD EPYC") is None


def test_losses_are_compared_between_sides_of_one_projector(tmp_path):
    stock = result(tmp_path, (1.0, 1.0, 1, 5.0))
    assert loss_disagreement([stock, result(tmp_path, (1.0, 1.0, 1, 4.0), which=1)]) == pytest.approx(0.2)
    assert loss_disagreement([stock]) is None


def document(tmp_path, losses):
    """The report of a run whose two sides had these first losses."""
    results = [result(tmp_path, (1.0, 1.0, 1, loss), which=index) for index, loss in enumerate(losses)]
    benchmark = TrainingBenchmark(
        [each.side for each in results],
        results[0].workload,
        folder=tmp_path,
        num_warmup=1,
        num_rounds=1,
        steps_per_round=1,
        keeps_processes=True,
    )
    benchmark._results = {each.side.name: each for each in results}
    machine = describe_machine(torch.device("cpu"))
    return training_document(benchmark, command=[], machine=machine, settings={"preset": "tiny", "own_flags": []})


def test_sides_that_do_different_work_are_called_so(tmp_path):
    assert "WARNING" in "\n".join(training_lines(document(tmp_path, [5.0, 5.1]), 100))
    assert "WARNING" not in "\n".join(training_lines(document(tmp_path, [5.0, 5.00001]), 100))


def test_report_is_json_with_every_step(tmp_path):
    read = json.loads(json.dumps(document(tmp_path, [5.0, 5.0])))
    assert [side["name"] for side in read["sides"]] == ["stock mlp2x_gelu", "own mlp2x_gelu"]
    assert all(len(side["steps"]) == 1 for side in read["sides"])
    assert read["baseline"] == "stock mlp2x_gelu"
