"""Figures of the summary, from a log that is known."""

import json
import math

import pytest

from llava_saep.data.ledger import DataAccount
from llava_saep.train.summary import (
    LossRecord,
    TokenCounts,
    TrainingSummary,
    count_tokens,
    find_losses,
    render,
    write,
)
from llava_saep.train.trainable import PartCount

COUNTS = {"supervised": 20, "conversations": 4, "images": 3}
HISTORY = [
    {"step": 1, "loss": 4.0, "tokens": 90, "padding": 0.1, **COUNTS},
    {"step": 2, "loss": 3.0, "tokens": 50, "padding": 0.5, **COUNTS},
    {"step": 2, "eval_loss": 3.5, "eval_token_accuracy": 0.25},
    {"step": 3, "tokens": 100, "padding": 0.0, **COUNTS},  # its loss was left out
    {"step": 3, "eval_loss": 3.25, "eval_token_accuracy": 0.5},
    {"step": 4, "eval_loss": math.nan, "eval_token_accuracy": 0.5},
    {"step": 4, "train_runtime": 7.0},
]


def test_tokens_add_up_and_padding_is_a_share_of_all_positions():
    counts = count_tokens(HISTORY)
    assert counts.tokens == 240
    assert counts.supervised == 60 and counts.conversations == 12 and counts.images == 9
    assert counts.padding == pytest.approx(1 - 240 / 300)  # 100 + 100 + 100 positions
    assert count_tokens(HISTORY, after_step=2).tokens == 100
    assert count_tokens([]).padding is None
    assert (counts.last_step, count_tokens([]).last_step) == (3, 0)


def test_losses_are_the_first_the_last_and_the_lowest_held_out():
    assert find_losses(HISTORY) == LossRecord(
        first=(4.0, 1),
        last=(3.0, 2),
        held_out_first=(3.5, 2),
        held_out_last=pytest.approx((math.nan, 4), nan_ok=True),
        held_out_best=(3.25, 3),
        token_accuracy_last=0.5,
    )
    assert find_losses([]) == LossRecord(first=None, last=None)


def summary(**fields) -> TrainingSummary:
    account = DataAccount(
        path="data.json",
        num_records=1000,
        num_used=996,
        left_out={"missing image": 1},
        replaced={"unreadable image": 3},
        num_cut=2,
        examples={"missing image": ["a"], "unreadable image": ["data.json: sample 7 (id 'x'): x.jpg"], "cut": ["c"]},
    )
    return TrainingSummary(
        **{
            "outcome": "finished",
            "resumed_at": None,
            "command": "train_mem.py --stage pretrain",
            "output_dir": "out",
            "checkpoints": ["checkpoint-3"],
            "language_model": "lm",
            "vision_tower": "tower",
            "projector": {"name": "saep", "provider": None, "options": {"stride": 2}},
            "tokens_per_image": 144,
            "parts": [PartCount("projector", 10_000, 10_000)],
            "data": account,
            "held_out_data": None,
            "world_size": 2,
            "zero_stage": 2,
            "precision": "bf16",
            "samples_per_step": 8,
            "learning_rate": 1e-3,
            "steps": 3,
            "planned_steps": 4,
            "epochs": 0.75,
            "micro_batches_left_out": 1,
            "tokens": TokenCounts(tokens=240, supervised=60, conversations=12, images=9, padding=0.2, last_step=3),
            "losses": find_losses(HISTORY),
            "seconds": 3725.0,
            "tokens_per_second": 12.3,
            "peak_memory_bytes": 3 * 2**30,
            "versions": {"torch": "2.13"},
            "commit": None,
            **fields,
        }
    )


def test_page_says_what_a_reader_asks():
    page = render(summary())
    assert len(page.splitlines()) < 50
    for words in (
        "saep (stride=2), 144 tokens per image",
        "10,000 of 10,000 parameters trained",
        "996 of 1,000 records used",
        "  3 replaced: unreadable image\n    data.json: sample 7 (id 'x'): x.jpg",
        "  2 cut to the longest allowed",
        "3 of 4 (0.75 epochs), 8 samples each, learning rate 0.001",
        "1 micro-batches left out",
        "240, 60 of them supervised; 20.0% of positions were padding",
        "4.0000 at step 1, 3.0000 at step 2",
        "the lowest 3.2500 at step 3",
        "1:02:05, 12 tokens/s",
        "3.00 GiB",
        "checkpoint-3",
    ):
        assert words in page, words


def test_page_of_a_resumed_run_says_since_when_it_counts():
    assert "resumed" not in render(summary())
    assert "at step 1,500; samples replaced, cut and left out" in render(summary(resumed_at=1500))


def test_page_says_up_to_which_step_tokens_were_counted():
    assert "logged" not in render(summary())
    assert "12 conversations, 9 images (up to step 3, the last one logged)" in render(summary(steps=4))


def test_json_and_text_lie_in_the_output_folder(tmp_path):
    write(summary(), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "training_summary.json",
        "training_summary.txt",
    ]
    read = json.loads((tmp_path / "out" / "training_summary.json").read_text())
    assert read["data"]["replaced"] == {"unreadable image": 3}
    assert read["losses"]["held_out_last"][0] is None  # NaN is no JSON
