"""Packed training is unpacked training: the same losses and gradients, whatever attends and however many ranks."""

import functools
import json
import re

import pytest

from tests.fixtures.ranks import run_ranks, run_training, train_on_ranks
from tests.fixtures.tiny import write_data, write_image
from tests.fixtures.training import deepspeed_json, logged, training_flags

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

TOLERANCE = 1e-5
"""As in test_zero_equals_one_process."""

ROW_LENGTH = 256
"""Two to three conversations of the tiny data."""

KINDS = {
    "full": {},
    "lora": {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """Twelve, eight of them with an image."""
    return write_data(tmp_path_factory.mktemp("conversations"), num_records=12)


def flags_of(bases, data, output_dir, **flags):
    """All of the data in each step, so that every plan of rows learns from the same conversations."""
    return training_flags(
        bases, data, output_dir, **{"per_device_train_batch_size": 12, "model_max_length": ROW_LENGTH, **flags}
    )


@pytest.fixture(scope="module")
def unpacked(bases, conversations, tmp_path_factory):
    """Losses and gradient norms of padded, unpacked batches with transformers' eager attention."""

    @functools.cache
    def run(kind: str):
        output_dir = tmp_path_factory.mktemp(f"unpacked_{kind}")
        argv = flags_of(bases, conversations, output_dir, attn_implementation="eager", **KINDS[kind])
        train_on_ranks(argv, world_size=1, output_dir=output_dir)
        return logged(output_dir, "loss"), logged(output_dir, "grad_norm")

    return run


def check_equal(output_dir, expected):
    losses, norms = expected
    assert max(losses) - min(losses) > 100 * TOLERANCE, "nothing is learnt, so equal losses would mean nothing"
    assert logged(output_dir, "loss") == pytest.approx(losses, abs=TOLERANCE, rel=0)
    assert logged(output_dir, "grad_norm") == pytest.approx(norms, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("packing", "attention"),
    [(True, None), (True, "sdpa"), (False, "segments"), pytest.param(True, "eager", marks=pytest.mark.slow)],
)
def test_one_process_equals_unpacked(packing, attention, unpacked, bases, conversations, tmp_path):
    attention = {} if attention is None else {"attn_implementation": attention}
    argv = flags_of(bases, conversations, tmp_path, packing=packing, **attention)
    train_on_ranks(argv, world_size=1, output_dir=tmp_path)
    check_equal(tmp_path, unpacked("full"))


def planned_rows(output_dir) -> int:
    (num_rows,) = re.findall(r"packing: 12 conversations in (\d+) rows", (output_dir / "ranks/rank_0.txt").read_text())
    return int(num_rows)


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("full", 2),
        ("lora", 3),
        pytest.param("full", None, marks=pytest.mark.slow),
        pytest.param("full", 1, marks=pytest.mark.slow),
        pytest.param("full", 3, marks=pytest.mark.slow),
        pytest.param("lora", 2, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_unpacked(kind, stage, unpacked, bases, conversations, tmp_path):
    deepspeed = {"deepspeed": deepspeed_json(stage)} if stage else {}
    argv = flags_of(
        bases, conversations, tmp_path, packing=True, per_device_train_batch_size=3, **deepspeed, **KINDS[kind]
    )
    train_on_ranks(argv, world_size=2, output_dir=tmp_path)
    assert planned_rows(tmp_path) == 6, "both ranks have three rows, and no row comes twice"
    check_equal(tmp_path, unpacked(kind))
    assert logged(tmp_path, "conversations") == [12] * 4
    assert logged(tmp_path, "images") == [8] * 4
    assert logged(tmp_path, "padding") == [0] * 4


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_rank_with_text_alone_makes_the_calls_of_one_with_images(stage, bases, tmp_path):
    """Rows are single conversations here, and ZeRO waits for ever where ranks make other calls than each other."""
    data = write_data(tmp_path / "data", num_records=10)
    argv = flags_of(
        bases,
        data,
        tmp_path,
        packing=True,
        per_device_train_batch_size=1,
        model_max_length=128,
        deepspeed=deepspeed_json(stage),
    )
    train_on_ranks(argv, world_size=2, output_dir=tmp_path)
    assert logged(tmp_path, "conversations") == [2] * 4
    assert 1 in logged(tmp_path, "images")


def test_grouped_batches_say_what_they_waste(bases, conversations, tmp_path):
    argv = flags_of(
        bases,
        conversations,
        tmp_path,
        train_sampling_strategy="group_by_length",
        attn_implementation="sdpa",
        per_device_train_batch_size=3,
        max_steps=4,
    )
    train_on_ranks(argv, world_size=1, output_dir=tmp_path)
    text = (tmp_path / "ranks" / "rank_0.txt").read_text()
    (planned,) = re.findall(r"grouped by length, ([\d.]+)% of all positions will be padding", text)
    tokens, padding = logged(tmp_path, "tokens"), logged(tmp_path, "padding")
    num_padding = sum(count / (1 - share) * share for count, share in zip(tokens, padding, strict=True))
    assert float(planned) == pytest.approx(100 * num_padding / (sum(tokens) + num_padding), abs=0.06)


def test_packing_without_a_row_long_enough_ends_before_anything_is_written(bases, conversations, tmp_path):
    """An image alone has nine tokens."""
    argv = flags_of(bases, conversations, tmp_path / "out", packing=True, model_max_length=20)
    (result,) = run_ranks(run_training, argv, world_size=1, output_dir=tmp_path / "failed")
    assert result.exit_code == 2
    assert "raise --model_max_length" in result.output
    assert not (tmp_path / "out").exists()


def test_crops_and_several_images_are_packed_with_their_conversations(bases, tmp_path):
    """Images of 3, 4 and 5 crops, and two in one conversation, in rows of two or three conversations."""
    data = write_data(tmp_path / "data", num_records=6, text_only_every=3)
    for path, (height, width) in zip(
        sorted(data.image_folder.iterdir()), [(36, 36), (72, 20), (24, 40), (40, 36)], strict=True
    ):
        write_image(path, height=height, width=width)
    records = json.loads(data.data_path.read_text())
    records[0]["image"] = [records[0]["image"], records[1]["image"]]
    records[0]["conversations"][0]["value"] = "<image>\n<image>\nWhich is red?"
    data.data_path.write_text(json.dumps(records))
    common = {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "model_max_length": 512,
        "max_steps": 2,
        "per_device_train_batch_size": 6,
    }
    runs = {"unpacked": {"attn_implementation": "eager"}, "packed": {"packing": True}}
    for name, flags in runs.items():
        argv = training_flags(bases, data, tmp_path / name, **common, **flags)
        train_on_ranks(argv, world_size=1, output_dir=tmp_path / name)
    for name in ("loss", "grad_norm"):
        assert logged(tmp_path / "packed", name) == pytest.approx(logged(tmp_path / "unpacked", name), abs=TOLERANCE)
    assert logged(tmp_path / "packed", "images") == [5, 5]
    assert logged(tmp_path / "packed", "conversations") == [6, 6]
