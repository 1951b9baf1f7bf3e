"""A run that goes on from a checkpoint equals one that was never interrupted, on as many ranks or another number."""

import functools

import pytest

from llava_saep.train.checkpointing import MANIFEST_NAME, why_incomplete
from tests.fixtures.ranks import run_ranks, run_training, train_on_ranks
from tests.fixtures.runs import LOGGED, replaced, with_dropout
from tests.fixtures.tiny import write_data
from tests.fixtures.training import deepspeed_json, logged, resume_from_copy, training_flags

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

KINDS = {
    "full": {"mm_projector_lr": 3e-3, "weight_decay": 0.1},
    "projector": {"tune_mm_mlp_adapter": True},
    "lora": {"lora_enable": True, "lora_r": 4, "weight_decay": 0.1},
    "packed": {"packing": True, "model_max_length": 256},
    "tower": {"unfreeze_mm_vision_tower": True, "gradient_checkpointing": True},
}
ORDERS = {
    "shuffled": {"train_sampling_strategy": None},
    "by_length": {"train_sampling_strategy": "group_by_length"},
    "by_modality": {"train_sampling_strategy": None, "group_by_modality_length": True},
}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three steps of four samples are an epoch: step 2 lies in the middle of the first, step 4 in the second."""
    return write_data(tmp_path_factory.mktemp("resume"), num_records=12)


def flags_of(bases, data, output_dir, *, kind, stage, order="shuffled", **more):
    deepspeed = {"deepspeed": deepspeed_json(stage)} if stage else {}
    order = {"train_sampling_strategy": "sequential", "group_by_modality_length": False, **ORDERS[order]}
    values = {"save_strategy": "steps", "save_steps": 2, **deepspeed, **KINDS[kind], **order, **more}
    removed = {name: None for name, value in values.items() if value is None}
    return replaced(training_flags(bases, data, output_dir, **values), **removed)


@pytest.mark.parametrize(
    ("kind", "stage", "order"),
    [
        ("full", 1, "by_modality"),
        ("lora", 3, "by_length"),
        ("full", None, "shuffled"),
        ("packed", 2, "shuffled"),
        slow("packed", 3, "shuffled"),
        slow("packed", None, "shuffled"),
        slow("lora", 2, "by_modality"),
        slow("projector", 2, "shuffled"),
        slow("full", 2, "by_length"),
        slow("full", 3, "by_modality"),
        slow("projector", 3, "shuffled"),
        slow("lora", None, "by_modality"),
        slow("tower", 2, "shuffled"),
    ],
)
def test_resumed_run_equals_one_without_a_break(kind, stage, order, bases, data, tmp_path):
    """Bit for bit, with dropout: weights, optimizer, schedule, order of samples and random numbers all come back."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    argv = flags_of(
        with_dropout(bases, tmp_path),
        data,
        whole,
        kind=kind,
        stage=stage,
        order=order,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    train_on_ranks(argv, world_size=2, output_dir=whole)
    assert why_incomplete(whole / "checkpoint-2") is None
    resume_from_copy(argv, whole, 2, resumed, world_size=2)
    for name in LOGGED:
        assert logged(resumed, name) == logged(whole, name)
    assert len(set(logged(whole, "loss"))) == 4
    log = (resumed / "ranks" / "rank_0.txt").read_text()
    assert f"passing over {resumed / 'checkpoint-3'}: it has no readable {MANIFEST_NAME}" in log


# Another number of ranks

TOLERANCE = 1e-5
"""Sums in float32 in another order differ by a few units in the last place: about 1e-6 for losses near 6."""


def samples_per_step(kind):
    """A divisor of an epoch: what is left over at its end is filled up differently for each number of ranks."""
    return 2 if kind == "packed" else 4  # six rows hold the twelve samples


@pytest.fixture(scope="module")
def whole_run(bases, data, tmp_path_factory):
    """A run without a break, by what it trains, ZeRO's stage and the number of ranks."""

    @functools.cache
    def run(kind, stage, world_size):
        output_dir = tmp_path_factory.mktemp(f"whole_{kind}_{stage}_{world_size}")
        argv = flags_of(
            bases,
            data,
            output_dir,
            kind=kind,
            stage=stage,
            order="shuffled" if kind == "packed" else "by_modality",
            per_device_train_batch_size=samples_per_step(kind) // world_size,
            **({"lora_dropout": 0.0} if kind == "lora" else {}),
        )
        train_on_ranks(argv, world_size=world_size, output_dir=output_dir)
        return output_dir, argv

    return run


@pytest.mark.parametrize(
    ("kind", "stage", "before", "after"),
    [
        ("full", 3, 2, 1),
        ("lora", 2, 1, 2),
        slow("full", 3, 1, 2),
        slow("full", 2, 2, 1),
        slow("full", 2, 1, 2),
        slow("full", 1, 2, 1),
        slow("full", 1, 1, 2),
        slow("full", None, 2, 1),
        slow("full", None, 1, 2),
        slow("lora", 3, 2, 1),
        slow("lora", 3, 1, 2),
        slow("lora", 2, 2, 1),
        slow("projector", 3, 2, 1),
        slow("projector", 2, 1, 2),
        slow("projector", None, 2, 1),
        slow("packed", 2, 2, 1),
    ],
)
def test_resumed_run_on_another_number_of_ranks_stays_on_course(kind, stage, before, after, whole_run, tmp_path):
    """The same samples follow in the same steps, and decay, rates and step counters are each parameter's own."""
    whole, argv = whole_run(kind, stage, before)
    argv = replaced(argv, per_device_train_batch_size=samples_per_step(kind) // after)
    resume_from_copy(argv, whole, 2, tmp_path, world_size=after)
    losses = logged(whole, "loss")
    assert logged(tmp_path, "loss") == pytest.approx(losses, abs=TOLERANCE, rel=0)
    assert logged(tmp_path, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=10 * TOLERANCE)
    assert logged(tmp_path, "learning_rate") == logged(whole, "learning_rate")
    assert min(abs(losses[step] - losses[step - 1]) for step in (1, 2, 3)) > 10 * TOLERANCE, "nothing is learnt"
    assert f"was saved by {before} rank(s), this run has {after}" in (tmp_path / "ranks" / "rank_0.txt").read_text()
    assert not list(tmp_path.glob(".universal*"))


def test_resuming_with_another_number_of_samples_per_step_is_refused(whole_run, tmp_path):
    """Two ranks took two samples each; one that still takes two would lose its place in the data."""
    whole, argv = whole_run("full", 3, 2)
    argv = replaced(argv, output_dir=tmp_path / "out")
    (result,) = run_ranks(
        run_training, [*argv, "--resume", str(whole / "checkpoint-2")], world_size=1, output_dir=tmp_path / "refused"
    )
    assert result.exit_code == 2
    assert "4 samples per step on 2 rank(s), this one takes 2 on 1" in result.output
    assert (whole / "checkpoint-4").is_dir()
