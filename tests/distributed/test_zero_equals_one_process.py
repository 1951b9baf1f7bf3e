"""Two ranks under ZeRO do what one process does with the same batch: the same losses and the same gradients."""

import functools
import json
import os
import random
import shutil

import pytest

from tests.fixtures.ranks import train_on_ranks
from tests.fixtures.tiny import TinyData, conversation_record, write_image
from tests.fixtures.training import deepspeed_json, logged, training_flags

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

TOLERANCE = 1e-5
"""Sums in float32 in another order differ by a few units in the last place: about 1e-6 for losses near 6."""

KINDS = {
    "full": {},
    "projector": {"tune_mm_mlp_adapter": True},
    "start_end": {"tune_mm_mlp_adapter": True, "mm_use_im_start_end": True},  # the token embedding learns too
    "lora": {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0, "gradient_checkpointing": True},
    "tower": {"unfreeze_mm_vision_tower": True, "mm_projector_lr": 1e-3},
    "checkpointed": {"gradient_checkpointing": True},
}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def alone(bases, conversations, tmp_path_factory):
    """Losses and gradient norms of one process without DeepSpeed, by what it trains."""

    @functools.cache
    def run(kind: str, batch_size: int):
        output_dir = tmp_path_factory.mktemp(f"alone_{kind}")
        flags = training_flags(bases, conversations, output_dir, per_device_train_batch_size=batch_size, **KINDS[kind])
        train_on_ranks(flags, world_size=1, output_dir=output_dir)
        return logged(output_dir, "loss"), logged(output_dir, "grad_norm")

    return run


def check_equal_to_alone(alone, bases, data, output_dir, *, kind, stage, batch_size, config=None, seconds=90, **more):
    """Train on two ranks and compare; adapters start from zero, so a constant factor would show in the norms only."""
    flags = training_flags(
        bases,
        data,
        output_dir,
        deepspeed=deepspeed_json(stage) if config is None else config,
        per_device_train_batch_size=batch_size,
        **KINDS[kind],
        **more,
    )
    train_on_ranks(flags, world_size=2, output_dir=output_dir, timeout_seconds=seconds)
    losses, norms = alone(kind, 2 * batch_size * more.get("gradient_accumulation_steps", 1))
    assert len(losses) == 4
    assert max(losses) - min(losses) > 100 * TOLERANCE, "nothing is learnt, so equal losses would mean nothing"
    assert logged(output_dir, "loss") == pytest.approx(losses, abs=TOLERANCE, rel=0)
    assert logged(output_dir, "grad_norm") == pytest.approx(norms, rel=TOLERANCE)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_full_finetuning_equals_one_process(stage, alone, bases, conversations, tmp_path):
    check_equal_to_alone(alone, bases, conversations, tmp_path, kind="full", stage=stage, batch_size=2)


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("projector", 2),
        ("start_end", 2),
        ("lora", 2),
        ("tower", 2),
        ("start_end", 3),
        ("lora", 3),
        *(slow(kind, 1) for kind in ("projector", "lora", "tower")),
        *(slow(kind, 3) for kind in ("projector", "tower", "checkpointed")),
    ],
)
def test_training_parts_of_the_model_equals_one_process(kind, stage, alone, bases, conversations, tmp_path):
    check_equal_to_alone(alone, bases, conversations, tmp_path, kind=kind, stage=stage, batch_size=2)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("stage", "offload", "compiled"),
    [
        (3, ("optimizer", "param"), False),
        slow(2, ("optimizer",), False),
        slow(3, ("param",), False),
        # DeepSpeed's own Adam, as in the shipped configs: a compiler works for minutes, once per machine.
        pytest.param(3, ("optimizer", "param"), True, marks=[pytest.mark.slow, pytest.mark.compiles]),
    ],
)
def test_training_with_offload_equals_one_process(stage, offload, compiled, alone, bases, conversations, tmp_path):
    if compiled and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    config = deepspeed_json(stage, offload=offload, compiled=compiled)
    check_equal_to_alone(
        alone, bases, conversations, tmp_path, kind="full", stage=stage, batch_size=2, config=config, seconds=800
    )


@pytest.fixture(scope="module")
def assignments(bases, tmp_path_factory):
    """One sample per rank and step: text beside an image, an image beside text, twice text, twice an image."""
    folder = tmp_path_factory.mktemp("assignments")
    rng, records = random.Random(0), []
    for index, has_image in enumerate([False, True, True, False, False, False, True, True]):
        name = f"{index}.png" if has_image else None
        records.append(conversation_record(index, name, rng))
        write_image(folder / f"{index}.png", seed=index)
    (folder / "data.json").write_text(json.dumps(records))
    data = TinyData(folder / "data.json", folder)
    flags = training_flags(bases, data, folder / "alone", per_device_train_batch_size=2)
    train_on_ranks(flags, world_size=1, output_dir=folder / "alone")
    losses = logged(folder / "alone", "loss"), logged(folder / "alone", "grad_norm")
    return data, lambda kind, batch_size: losses


@pytest.mark.parametrize("stage", [2, 3, slow(1)])
def test_ranks_may_have_any_kind_of_batch(stage, assignments, bases, tmp_path):
    """Ranks whose samples differ in kind make the same calls; otherwise ZeRO crashes, or waits for ever."""
    data, alone = assignments
    check_equal_to_alone(alone, bases, data, tmp_path, kind="full", stage=stage, batch_size=1)


@pytest.mark.parametrize("stage", [3, slow(1), slow(2)])
def test_bf16_on_two_ranks_equals_bf16_in_one_process(stage, bases, conversations, tmp_path):
    losses = {}
    for world_size in (1, 2):
        argv = training_flags(
            bases,
            conversations,
            tmp_path / str(world_size),
            deepspeed=deepspeed_json(stage),
            per_device_train_batch_size=4 // world_size,
            bf16=True,
        )
        train_on_ranks(argv, world_size=world_size, output_dir=tmp_path / str(world_size))
        losses[world_size] = logged(tmp_path / str(world_size), "loss")
    # Weights are rounded to 8 bits of mantissa after each step and gradients before they are summed; losses near 6 come
    # out within a few thousandths.
    assert losses[2] == pytest.approx(losses[1], abs=5e-3)
    assert max(losses[1]) - min(losses[1]) > 0.05


def test_gradient_accumulation_equals_one_batch(alone, bases, conversations, tmp_path):
    """The loss is a mean over the tokens of the whole step, not a mean of micro-batches' means."""
    check_equal_to_alone(
        alone, bases, conversations, tmp_path, kind="full", stage=2, batch_size=1, gradient_accumulation_steps=2
    )


def test_bf16_under_zero3_trains_projector_and_adapters(alone, bases, conversations, tmp_path):
    """ZeRO-3 keeps one dtype per group and fails on a float32 projector or adapter in a bf16 model."""
    argv = training_flags(
        bases,
        conversations,
        tmp_path,
        deepspeed=deepspeed_json(3),
        per_device_train_batch_size=2,
        bf16=True,
        **KINDS["lora"],
    )
    train_on_ranks(argv, world_size=2, output_dir=tmp_path)
    losses, _ = alone("lora", 4)
    # bf16 has 8 bits of mantissa: losses near 6 come out within a few hundredths.
    assert logged(tmp_path, "loss") == pytest.approx(losses, abs=0.03)
    assert logged(tmp_path, "loss") != pytest.approx(losses, abs=1e-5)
