"""A checkpoint is resumed from only if it is complete, and only by the run that it belongs to."""

import dataclasses
import logging
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from llava_saep.errors import UserError
from llava_saep.train.checkpointing import (
    MANIFEST_NAME,
    CheckpointFacts,
    SavingError,
    check_same_run,
    choose_checkpoint,
    describe_files,
    find_newest_complete,
    publish,
    read_facts,
    remove_old_checkpoints,
    removing_what_fails,
    set_aside,
    why_incomplete,
    write_manifest,
)

FACTS = CheckpointFacts(
    global_step=4, world_size=2, zero_stage=2, trainable={"projector.weight": (3, 4)}, samples_per_step=8, num_rows=64
)


def make_checkpoint(output_dir, step, *, finished=True):
    folder = output_dir / f"checkpoint-{step}"
    (folder / f"global_step{step}").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights %d" % step)
    (folder / f"global_step{step}" / "rank_1.pt").write_bytes(b"optimizer shard")
    if finished:
        write_manifest(folder, dataclasses.replace(FACTS, global_step=step))
    return folder


def names(folders):
    return [folder.name for folder in folders]


def test_finished_checkpoint_is_complete_and_tells_its_run(tmp_path):
    folder = make_checkpoint(tmp_path, 4)
    assert why_incomplete(folder) is None
    assert read_facts(folder) == FACTS


def test_torn_checkpoint_is_passed_over_for_an_older_complete_one(tmp_path):
    """What a rank killed while it saved leaves: the newest folder, without a manifest."""
    make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 10, finished=False)
    folder, passed_over = find_newest_complete(tmp_path)
    assert folder.name == "checkpoint-2"
    assert [(path.name, MANIFEST_NAME in reason) for path, reason in passed_over] == [("checkpoint-10", True)]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda shard: shard.unlink(), "is missing"),
        (lambda shard: shard.write_bytes(b"half"), "4 bytes instead of 15"),
        (lambda shard: shard.write_bytes(b"optimizer sharp"), "another content"),
    ],
)
def test_damage_after_saving_is_found_and_named(tmp_path, damage, reason):
    folder = make_checkpoint(tmp_path, 4)
    damage(folder / "global_step4" / "rank_1.pt")
    assert "global_step4/rank_1.pt" in why_incomplete(folder)
    assert reason in why_incomplete(folder)


def test_checkpoint_of_weights_alone_is_not_resumed_from(tmp_path):
    folder = make_checkpoint(tmp_path, 4)
    write_manifest(folder, dataclasses.replace(FACTS, is_resumable=False))
    assert "--save_only_model" in why_incomplete(folder)


def test_newest_is_by_number_not_by_name(tmp_path):
    for step in (9, 10, 100):
        make_checkpoint(tmp_path, step)
    assert choose_checkpoint(tmp_path, "auto").name == "checkpoint-100"


def test_auto_says_which_it_takes_and_which_it_passes_over(tmp_path, caplog):
    make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 4, finished=False)
    with caplog.at_level(logging.INFO, "llava_saep"):
        choose_checkpoint(tmp_path, "auto")
    assert "passing over" in caplog.text and "checkpoint-4" in caplog.text
    assert "resuming from" in caplog.text and "checkpoint-2" in caplog.text


def test_auto_starts_from_the_beginning_where_there_is_nothing(tmp_path):
    assert choose_checkpoint(tmp_path / "new", "auto") is None
    assert choose_checkpoint(tmp_path, "auto") is None


def test_auto_does_not_start_anew_where_a_complete_checkpoint_was_damaged(tmp_path):
    make_checkpoint(tmp_path, 4, finished=False)
    (make_checkpoint(tmp_path, 2) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds 2 checkpoint.*--resume never"):
        choose_checkpoint(tmp_path, "auto")


def test_run_killed_during_its_first_save_starts_again_and_says_so(tmp_path, caplog):
    """A job that a scheduler puts back into its queue has nobody to say --resume never."""
    make_checkpoint(tmp_path, 2, finished=False)
    with caplog.at_level(logging.WARNING):
        assert choose_checkpoint(tmp_path, "auto") is None
    assert "starting from the beginning" in caplog.text


def test_never_ignores_what_is_there(tmp_path):
    make_checkpoint(tmp_path, 4)
    assert choose_checkpoint(tmp_path, "never") is None


def test_named_checkpoint_must_exist_and_be_complete(tmp_path):
    torn = make_checkpoint(tmp_path, 4, finished=False)
    with pytest.raises(UserError, match="no such folder"):
        choose_checkpoint(tmp_path, str(tmp_path / "checkpoint-5"))
    with pytest.raises(UserError, match="interrupted"):
        choose_checkpoint(tmp_path, str(torn))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_step": 4}, "8 samples per step on 2 rank.*takes 4 on 2.*product with the number of ranks is 8"),
        ({"zero_stage": 3}, "ZeRO stage 2"),
        ({"trainable": {"projector.weight": (3, 5)}}, "projector.weight"),
        ({"trainable": {}}, "trains other parameters"),
        ({"quantization": "4 bits (nf4)"}, r"16 bits or more, this run has 4 bits \(nf4\) \(--bits"),
    ],
)
def test_state_of_another_run_is_refused(tmp_path, change, message):
    folder = make_checkpoint(tmp_path, 4)
    with pytest.raises(UserError, match=message):
        check_same_run(folder, read_facts(folder), dataclasses.replace(FACTS, **change))
    check_same_run(folder, read_facts(folder), dataclasses.replace(FACTS, global_step=0))


def test_old_checkpoints_go_and_complete_ones_stay(tmp_path):
    for step in (2, 4, 6):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 5, finished=False)
    make_checkpoint(tmp_path, 8, finished=False)
    removed = remove_old_checkpoints(tmp_path, keep=2)
    assert names(removed) == ["checkpoint-5", "checkpoint-2"]
    # checkpoint-8 is newer than any complete one: another process may be writing it.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_old_checkpoint_that_cannot_be_deleted_costs_no_run(tmp_path, monkeypatch, caplog):
    """On shared storage a file that somebody reads keeps its folder from going away."""
    for step in (2, 4):
        make_checkpoint(tmp_path, step)

    def refuse(folder, *_, **__):
        raise OSError(39, "Directory not empty", str(folder))

    monkeypatch.setattr("llava_saep.train.checkpointing.shutil.rmtree", refuse)
    with caplog.at_level(logging.WARNING):
        assert remove_old_checkpoints(tmp_path, keep=1) == []
    assert "checkpoint-2 is no longer needed and could not be deleted" in caplog.text
    assert choose_checkpoint(tmp_path, "auto").name == "checkpoint-4"
    assert why_incomplete(tmp_path / "checkpoint-2") is not None  # half of it may be gone


def test_files_are_on_the_disk_before_a_manifest_lists_them(tmp_path, monkeypatch):
    """Some file systems find only then that they have no room."""
    folder = make_checkpoint(tmp_path, 2, finished=False)

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llava_saep.train.checkpointing.os.fsync", refuse)
    with pytest.raises(SavingError, match="No space left"), removing_what_fails(folder):
        write_manifest(folder, FACTS, describe_files(folder, world_size=2))
    assert not folder.exists()


def test_without_a_limit_every_complete_checkpoint_stays(tmp_path):
    for step in (2, 4):
        make_checkpoint(tmp_path, step)
    assert remove_old_checkpoints(tmp_path, keep=None) == []


def test_earlier_runs_checkpoints_are_moved_out_of_the_way(tmp_path):
    make_checkpoint(tmp_path, 100)
    assert set_aside(tmp_path) == tmp_path / "earlier_run_1"
    assert (tmp_path / "earlier_run_1" / "checkpoint-100" / MANIFEST_NAME).is_file()
    assert choose_checkpoint(tmp_path, "auto") is None
    assert set_aside(tmp_path) is None


def test_resuming_an_older_checkpoint_moves_the_abandoned_newer_ones_away(tmp_path):
    """Counted by number, checkpoint-20 would push the new checkpoint-10 out, and be resumed from."""
    for step in (2, 5, 20):
        make_checkpoint(tmp_path, step)
    torn = make_checkpoint(tmp_path, 30, finished=False)
    assert set_aside(tmp_path, resumed=tmp_path / "checkpoint-5") == tmp_path / "earlier_run_1"
    assert names((tmp_path / "earlier_run_1").iterdir()) == ["checkpoint-20"]
    make_checkpoint(tmp_path, 10)
    assert names(remove_old_checkpoints(tmp_path, keep=1)) == ["checkpoint-5", "checkpoint-2"]
    assert torn.exists()  # never resumed from, and replaced when its step is saved
    assert choose_checkpoint(tmp_path, "auto").name == "checkpoint-10"


def test_newest_checkpoint_is_resumed_from_where_it_lies(tmp_path):
    for step in (2, 5):
        make_checkpoint(tmp_path, step)
    (tmp_path / "latest").symlink_to(tmp_path / "checkpoint-5")
    assert set_aside(tmp_path, resumed=tmp_path / "checkpoint-5") is None
    assert set_aside(tmp_path, resumed=tmp_path / "latest") is None


def test_resuming_from_another_folder_moves_every_checkpoint_away(tmp_path):
    for step in (2, 20):
        make_checkpoint(tmp_path, step)
    elsewhere = make_checkpoint(tmp_path / "other", 5)
    set_aside(tmp_path, resumed=elsewhere)
    assert choose_checkpoint(tmp_path, "auto") is None
    assert why_incomplete(elsewhere) is None


@pytest.mark.parametrize(
    "stale",
    [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "non_lora_trainables.bin",
        "mm_projector.bin",
    ],
)
def test_weights_of_an_earlier_model_do_not_outlive_the_published_one(tmp_path, stale):
    """A folder with model.safetensors loads as a full model, whatever was published over it."""
    staging = tmp_path / ".saving"
    staging.mkdir()
    for name in ("config.json", "mm_projector.safetensors"):
        (staging / name).write_text("new")
        (tmp_path / name).write_text("old")
    for name in (stale, "notes.txt", "my_model.safetensors", "trainer_state.json"):
        (tmp_path / name).write_text("old")
    publish(staging, tmp_path)
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = dict.fromkeys(("notes.txt", "my_model.safetensors", "trainer_state.json"), "old")
    assert left == {"config.json": "new", "mm_projector.safetensors": "new"} | kept


def test_published_model_appears_config_last(tmp_path, monkeypatch):
    staging = tmp_path / "out" / ".saving"
    (staging / "sub").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "sub/more.json"):
        (staging / name).write_text(name)
    (tmp_path / "out" / "config.json").write_text("old")
    moved = []
    import os

    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (moved.append(target.name), replace(source, target)))
    publish(staging, tmp_path / "out")
    assert moved[-1] == "config.json" and len(moved) == 4
    assert (tmp_path / "out" / "config.json").read_text() == "config.json"
    assert not staging.exists()


def test_ranks_describe_together_what_one_alone_would(tmp_path):
    """Each reads what it wrote itself, every file is read once, and the answers make the same manifest."""
    for name in ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"):
        (tmp_path / name).write_bytes(name.encode())
    for name in ("rng_state_0.pth", "rng_state_1.pth", "model.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    parts = [describe_files(tmp_path, rank=rank, world_size=2) for rank in range(2)]
    assert set(parts[1]) == {"bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "rng_state_1.pth"}
    assert not parts[0].keys() & parts[1].keys()
    assert parts[0] | parts[1] == describe_files(tmp_path)


def test_resuming_on_another_number_of_ranks_is_no_other_run(tmp_path):
    check_same_run(tmp_path, FACTS, dataclasses.replace(FACTS, world_size=1))


def test_checkpoint_saved_before_samples_were_written_down_is_still_resumed_from(tmp_path, caplog):
    check_same_run(tmp_path, dataclasses.replace(FACTS, samples_per_step=None, num_rows=None), FACTS)
    assert not caplog.records


def test_run_on_other_data_goes_on_and_says_so(tmp_path, caplog):
    """A record may have been mended meanwhile; only that it is not silent."""
    with caplog.at_level(logging.WARNING):
        check_same_run(tmp_path, FACTS, dataclasses.replace(FACTS, num_rows=65))
    (record,) = caplog.records
    assert "a run on 64 samples or packed rows, this one has 65" in record.getMessage()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # torch.save
        RuntimeError("basic_ios::clear: iostream error"),  # torch.save of something small
        Exception("No space left on device (os error 28)"),  # tokenizers
    ],
)
def test_what_could_not_be_written_is_removed_and_told_with_the_free_space(tmp_path, error):
    folder = make_checkpoint(tmp_path, 4, finished=False)
    with pytest.raises(SavingError, match=rf"{folder}.*MiB of .* MiB are free.*same command again"):
        with removing_what_fails(folder):
            raise error
    assert not folder.exists()


def _write_bytes(path):
    path.write_bytes(b"rest")


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(_write_bytes, id="python"),
        pytest.param(lambda path: torch.save({}, path), id="torch"),
        pytest.param(lambda path: save_file({"weight": torch.zeros(1)}, path), id="safetensors"),
        pytest.param(lambda path: Tokenizer(WordLevel()).save(str(path)), id="tokenizers"),
    ],
)
def test_rank_whose_folder_another_one_removed_does_not_speak_of_a_full_disk(tmp_path, write):
    folder = make_checkpoint(tmp_path, 4, finished=False)
    with pytest.raises(SavingError, match=rf"{folder} disappeared.*another rank could not write there") as caught:
        with removing_what_fails(folder):
            shutil.rmtree(folder)
            write(folder / "rest")
    assert "could not be written" not in str(caught.value)
    assert "MiB are free" not in str(caught.value)


def test_rank_that_writes_on_where_another_one_removed_leaves_nothing(tmp_path):
    """DeepSpeed makes its folders anew when it finds none."""
    folder = make_checkpoint(tmp_path, 4, finished=False)
    with pytest.raises(SavingError, match="disappeared"), removing_what_fails(folder):
        shutil.rmtree(folder)
        (folder / "global_step4").mkdir(parents=True)
        (folder / "latest.d" / "file").write_bytes(b"")
    assert not folder.exists()


def test_failure_of_another_rank_is_not_taken_for_a_full_disk(tmp_path):
    folder = make_checkpoint(tmp_path, 4, finished=False)
    with pytest.raises(RuntimeError, match="Connection closed"):
        with removing_what_fails(folder):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:36561")
    assert folder.exists()
