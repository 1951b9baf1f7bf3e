"""A loss that is no number on one rank: all ranks stop together, or leave the same micro-batch out."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llava_saep.data.dataset import ConversationDataset
from llava_saep.train import checkpointing
from tests.fixtures.ranks import run_ranks, run_training
from tests.fixtures.tiny import TinyData
from tests.fixtures.training import deepspeed_json, logged, training_flags

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

TOLERANCE = 1e-5
"""As in test_zero_equals_one_process."""


def train_on_bad_pixels(argv: list[str], ids: list[str]) -> int:
    """What a rank does: train, with NaN in place of the pixels of some records."""
    load_sample = ConversationDataset.load_sample

    def load(self, index):
        sample = load_sample(self, index)
        if self._records[index].source.id in ids:
            sample["pixel_values"] = torch.full_like(sample["pixel_values"], float("nan"))
        return sample

    ConversationDataset.load_sample = load
    try:
        return run_training(argv)
    finally:
        ConversationDataset.load_sample = load_sample


def run(argv, ids, output_dir, world_size=2):
    return run_ranks(
        train_on_bad_pixels, argv, ids, world_size=world_size, output_dir=output_dir / "ranks", timeout_seconds=120
    )


def without(data: TinyData, positions: set[int], folder) -> TinyData:
    records = json.loads(data.data_path.read_text())
    folder.mkdir()
    path = folder / "fewer.json"
    path.write_text(json.dumps([record for at, record in enumerate(records) if at not in positions]))
    return data._replace(data_path=path)


@pytest.mark.parametrize(
    "stage", [pytest.param(None, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_step_with_a_bad_loss_is_left_out_on_all_ranks(stage, bases, conversations, tmp_path):
    """Records 2 and 3 make the second step; rank 0's is bad. What is left is a run on the other records."""
    flags = {
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 1,
        "on_nan_loss": "skip",
        "learning_rate": 1e-3,
    }
    flags |= {} if stage is None else {"deepspeed": deepspeed_json(stage)}
    argv = training_flags(bases, conversations, tmp_path, **flags)
    results = run(argv, ["conversation-2"], tmp_path)
    assert [result.exit_code for result in results] == [0, 0], results[0].output[-3000:]
    assert re.search(r"step 2: the loss is nan on rank 0 \(.*id 'conversation-2'.*images 002.png", results[0].output)
    rest = without(conversations, {2, 3}, tmp_path / "rest")
    argv = training_flags(bases, rest, tmp_path / "expected", **{**flags, "max_steps": 3})
    assert [result.exit_code for result in run(argv, [], tmp_path / "expected")] == [0, 0]
    expected = logged(tmp_path / "expected", "loss")
    assert len(expected) == 3
    assert logged(tmp_path, "loss") == pytest.approx(expected, abs=TOLERANCE, rel=0)
    assert logged(tmp_path, "micro_batches_left_out") == [1, 1, 1]


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_other_micro_batches_of_the_step_count(stage, bases, conversations, tmp_path):
    """The last micro-batch is the one in whose backward pass ZeRO joins gradients, so it is not simply dropped."""
    flags = {"on_nan_loss": "skip", "gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 1e-3}
    alone = training_flags(bases, conversations, tmp_path / "alone", per_device_train_batch_size=2, **flags)
    assert run(alone, ["conversation-2"], tmp_path / "alone", world_size=1)[0].exit_code == 0
    norms = logged(tmp_path / "alone", "grad_norm")
    assert all(norm > 0.1 for norm in norms)
    flags |= {"per_device_train_batch_size": 1, "deepspeed": deepspeed_json(stage)}
    results = run(training_flags(bases, conversations, tmp_path, **flags), ["conversation-2"], tmp_path)
    assert [result.exit_code for result in results] == [0, 0], results[0].output[-3000:]
    assert logged(tmp_path, "loss") == pytest.approx(logged(tmp_path / "alone", "loss"), abs=TOLERANCE, rel=0)
    assert logged(tmp_path, "grad_norm") == pytest.approx(norms, rel=TOLERANCE)


def test_resumed_run_logs_no_loss_for_a_step_that_is_left_out(bases, conversations, tmp_path):
    """The first entry after a resumption counts the steps since then, not those before."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = {"per_device_train_batch_size": 1, "on_nan_loss": "skip", "save_strategy": "steps", "save_steps": 2}
    for output_dir in (whole, resumed):
        argv = training_flags(bases, conversations, output_dir, **flags)
        assert run(argv, ["conversation-2"], output_dir, world_size=1)[0].exit_code == 0
        if output_dir is whole:
            shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    assert len(logged(whole, "loss")) == 3
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_run_stops_on_all_ranks_and_keeps_its_last_good_checkpoint(bases, conversations, tmp_path):
    flags = {
        "save_strategy": "steps",
        "save_steps": 1,
        "deepspeed": deepspeed_json(2),
        "per_device_train_batch_size": 1,
    }
    results = run(training_flags(bases, conversations, tmp_path, **flags), ["conversation-4"], tmp_path)
    assert [result.exit_code for result in results] == [2, 2], results[0].output[-3000:]
    said = "".join(result.output for result in results)
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.search(
        r"step 3: the loss is nan on rank 0 \(.*sample 4 \(id 'conversation-4'\), images 004.png\)", sentence
    )
    assert "--on_nan_loss skip" in sentence
    newest, passed_over = checkpointing.find_newest_complete(tmp_path)
    assert newest.name == "checkpoint-2" and not passed_over
    summary = json.loads((tmp_path / "training_summary.json").read_text())
    assert summary["outcome"].startswith("stopped: step 3: the loss is nan")
    assert (summary["steps"], summary["planned_steps"]) == (2, 4)
    assert summary["checkpoints"] == ["checkpoint-2", "checkpoint-1"]
    weights = load_file(newest / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
