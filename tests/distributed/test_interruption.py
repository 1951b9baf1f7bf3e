"""Runs that are stopped, killed, or meet a full disk: they end by themselves, damage nothing, and go on."""

import json
import os
import signal

import pytest

from llava_saep.train.checkpointing import list_checkpoints, why_incomplete
from llava_saep.train.interruption import STOPPED_EXIT_CODE
from tests.fixtures.ranks import run_ranks, train_on_ranks
from tests.fixtures.runs import (
    LOGGED,
    replaced,
    train_and_signal,
    train_until_disk_is_full,
    train_until_killed_while_saving,
    train_until_result_is_due,
    with_dropout,
)
from tests.fixtures.training import deepspeed_json, logged, training_flags

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def undisturbed(bases, conversations, tmp_path_factory):
    """A run with dropout under ZeRO-2 on two ranks that nothing happens to, and its command line."""
    output_dir = tmp_path_factory.mktemp("undisturbed")
    argv = training_flags(
        with_dropout(bases, tmp_path_factory.mktemp("dropout")),
        conversations,
        output_dir,
        tune_mm_mlp_adapter=True,
        deepspeed=deepspeed_json(2),
        per_device_train_batch_size=1,
        dataloader_num_workers=1,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
    )
    train_on_ranks(argv, world_size=2, output_dir=output_dir)
    return output_dir, argv


def check_going_on(undisturbed, output_dir):
    """Give the same command again: what is logged equals the run that nothing happened to, bit for bit."""
    whole, argv = undisturbed
    train_on_ranks(replaced(argv, output_dir=output_dir), world_size=2, output_dir=output_dir)
    for name in LOGGED:
        assert logged(output_dir, name) == logged(whole, name)
    assert (output_dir / "mm_projector.safetensors").is_file()


def test_signal_to_one_rank_stops_all_with_a_checkpoint_of_that_step(undisturbed, tmp_path):
    """No checkpoint is due after step 3; the data loader's workers are still there to finish it."""
    argv = replaced(undisturbed[1], output_dir=tmp_path)
    results = run_ranks(
        train_and_signal, argv, 3, 1, signal.SIGTERM, world_size=2, output_dir=tmp_path / "stopped", timeout_seconds=60
    )
    assert [result.exit_code for result in results] == [STOPPED_EXIT_CODE] * 2, results
    assert "stopped after step 3 of 4" in results[0].output
    summary = json.loads((tmp_path / "training_summary.json").read_text())
    assert (summary["outcome"], summary["steps"]) == ("stopped: it was told to stop", 3)
    assert "Traceback" not in results[0].output + results[1].output
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert not (tmp_path / "mm_projector.safetensors").exists()
    check_going_on(undisturbed, tmp_path)


def test_rank_killed_while_saving_leaves_no_checkpoint_to_be_resumed_from(undisturbed, tmp_path):
    argv = replaced(undisturbed[1], output_dir=tmp_path)
    results = run_ranks(train_until_killed_while_saving, argv, 4, 1, world_size=2, output_dir=tmp_path / "killed")
    assert results[1].exit_code == -signal.SIGKILL
    assert results[0].exit_code not in (0, None)
    assert (tmp_path / "checkpoint-4" / "latest").is_file()  # what DeepSpeed alone would trust
    assert "interrupted" in why_incomplete(tmp_path / "checkpoint-4")
    assert why_incomplete(tmp_path / "checkpoint-2") is None  # not deleted before checkpoint-4 was complete
    check_going_on(undisturbed, tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("rank", "others_wait"),
    [(0, False), pytest.param(1, False, marks=pytest.mark.slow), pytest.param(1, True, marks=pytest.mark.slow)],
)
def test_full_disk_ends_all_ranks_and_leaves_what_was_complete(rank, others_wait, undisturbed, tmp_path):
    argv = replaced(undisturbed[1], output_dir=tmp_path)
    folder = tmp_path / "checkpoint-4"
    results = run_ranks(
        train_until_disk_is_full,
        argv,
        4,
        rank,
        4096,
        others_wait,
        world_size=2,
        output_dir=tmp_path / "full",
        timeout_seconds=60,
    )
    assert 0 not in [result.exit_code for result in results]
    assert results[rank].exit_code == 2
    assert f"error: rank {rank}: {folder} could not be written" in results[rank].output
    assert "MiB are free" in results[rank].output
    other = results[1 - rank].output
    assert "could not be written" not in other
    if others_wait:
        assert f"error: rank {1 - rank}: {folder} disappeared while it was being saved" in other
    assert why_incomplete(tmp_path / "checkpoint-2") is None
    check_going_on(undisturbed, tmp_path)


def test_run_killed_before_its_result_only_writes_it(undisturbed, tmp_path):
    """transformers would train a step more than asked for where the last one is not the last of an epoch."""
    argv = replaced(undisturbed[1], output_dir=tmp_path, deepspeed=None, max_steps=3)
    (result,) = run_ranks(train_until_result_is_due, argv, world_size=1, output_dir=tmp_path / "killed")
    assert result.exit_code == -signal.SIGKILL
    train_on_ranks(argv, world_size=1, output_dir=tmp_path)
    assert len(logged(tmp_path, "loss")) == 3
    assert "mm_projector.safetensors" in os.listdir(tmp_path)
