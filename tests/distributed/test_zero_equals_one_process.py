"""Two ranks under ZeRO do what one process does with the same batch: the same losses and the same gradients."""

import functools

import pytest

from tests.fixtures.ranks import train_on_ranks
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
}


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


def check_equal_to_alone(alone, bases, data, output_dir, *, kind, stage, batch_size, **more):
    """Train on two ranks and compare; adapters start from zero, so a constant factor would show in the norms only."""
    flags = training_flags(
        bases,
        data,
        output_dir,
        deepspeed=deepspeed_json(stage),
        per_device_train_batch_size=batch_size,
        **KINDS[kind],
        **more,
    )
    train_on_ranks(flags, world_size=2, output_dir=output_dir)
    losses, norms = alone(kind, 2 * batch_size * more.get("gradient_accumulation_steps", 1))
    assert len(losses) == 4
    assert max(losses) - min(losses) > 100 * TOLERANCE, "nothing is learnt, so equal losses would mean nothing"
    assert logged(output_dir, "loss") == pytest.approx(losses, abs=TOLERANCE, rel=0)
    assert logged(output_dir, "grad_norm") == pytest.approx(norms, rel=TOLERANCE)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_full_finetuning_equals_one_process(stage, alone, bases, conversations, tmp_path):
    check_equal_to_alone(alone, bases, conversations, tmp_path, kind="full", stage=stage, batch_size=2)


@pytest.mark.parametrize("kind", ["projector", "start_end", "lora", "tower"])
def test_training_parts_of_the_model_equals_one_process(kind, alone, bases, conversations, tmp_path):
    check_equal_to_alone(alone, bases, conversations, tmp_path, kind=kind, stage=2, batch_size=2)


@pytest.mark.parametrize("kind", [pytest.param("projector", marks=pytest.mark.slow), "start_end", "lora"])
def test_training_parts_of_a_split_model_equals_one_process(kind, alone, bases, conversations, tmp_path):
    check_equal_to_alone(alone, bases, conversations, tmp_path, kind=kind, stage=3, batch_size=2)


@pytest.mark.parametrize("stage", [2, 3])
def test_text_only_rank_beside_an_image_rank(stage, alone, bases, conversations, tmp_path):
    """Ranks whose samples differ in kind make the same calls; otherwise ZeRO crashes, or waits for ever."""
    check_equal_to_alone(alone, bases, conversations, tmp_path, kind="full", stage=stage, batch_size=1)


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
