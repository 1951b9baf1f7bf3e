"""LLaVA's stages on tiny models: what each changes, what it writes, and that what it writes is what it trained."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers

from llava_saep.data.dataset import ConversationDataset
from llava_saep.model.loading import build_model, build_tokenizer, load_model
from projectors import ProjectorError, select_projector
from tests.fixtures.ranks import run_ranks, run_training, train_on_ranks
from tests.fixtures.tiny import TinyBases, TinyData, write_bases, write_data
from tests.fixtures.training import deepspeed_json, logged, loss_of_saved, training_flags

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> TinyBases:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> TinyData:
    return write_data(tmp_path_factory.mktemp("captions"), kind="captions")


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> TinyData:
    return write_data(tmp_path_factory.mktemp("conversations"), num_records=12)


@pytest.fixture(scope="module")
def stage_one(bases, captions, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("stage_one")
    flags = training_flags(
        bases, captions, output_dir, version="plain", tune_mm_mlp_adapter=True, per_device_train_batch_size=2
    )
    train_on_ranks(flags, world_size=1, output_dir=output_dir)
    return output_dir


def weights_by_part(model) -> dict[str, dict[str, torch.Tensor]]:
    parts = {"vision_tower": {}, "multi_modal_projector": {}, "language_model": {}}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[1] if name.startswith("model.") else "language_model"
        parts[part][name] = tensor
    return parts


def changed_parts(before, after) -> set[str]:
    before, after = weights_by_part(before), weights_by_part(after)
    return {
        part for part in before if any(not torch.equal(before[part][name], after[part][name]) for name in before[part])
    }


def untrained(bases):
    """The model that every run here starts from; a fresh projector follows from --seed, whose default is 42."""
    transformers.set_seed(42)
    tokenizer = build_tokenizer(str(bases.language_model))
    return build_model(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        projector=select_projector("saep"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )


def test_stage_one_writes_config_projector_and_processor_and_no_other_weights(stage_one):
    weights = [path.name for path in stage_one.iterdir() if path.suffix in (".safetensors", ".bin", ".pt")]
    assert weights == ["mm_projector.safetensors"]
    assert {"config.json", "processor_config.json", "tokenizer.json"} <= set(os.listdir(stage_one))


def test_stage_one_changes_the_projector_alone(stage_one, bases):
    assert changed_parts(untrained(bases), load_model(stage_one)) == {"multi_modal_projector"}


def test_stage_two_starts_from_stage_ones_projector(stage_one, bases, conversations, tmp_path):
    """With a learning rate of zero nothing moves, so what comes out is what went in."""
    flags = training_flags(
        bases,
        conversations,
        tmp_path,
        pretrain_mm_mlp_adapter=stage_one / "mm_projector.bin",  # LLaVA's name for it
        learning_rate=0.0,
        max_steps=1,
    )
    train_on_ranks(flags, world_size=1, output_dir=tmp_path)
    assert changed_parts(load_model(stage_one), load_model(tmp_path)) == set()


STAGES = {
    "projector": ({"tune_mm_mlp_adapter": True}, {"multi_modal_projector"}),
    "full": ({}, {"multi_modal_projector", "language_model"}),
    "lora": ({"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0}, {"multi_modal_projector", "language_model"}),
    "lora_and_tower": (
        {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0, "unfreeze_mm_vision_tower": True},
        {"multi_modal_projector", "language_model", "vision_tower"},
    ),
    "lora_alone": (
        {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0, "freeze_mm_mlp_adapter": True},
        {"language_model"},
    ),
    "packed": ({"packing": True, "model_max_length": 256}, {"multi_modal_projector", "language_model"}),
}


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("projector", None),
        ("full", 3),
        ("lora", None),
        ("lora_and_tower", 3),
        ("lora_alone", None),
        pytest.param("projector", 3, marks=pytest.mark.slow),
        pytest.param("full", None, marks=pytest.mark.slow),
        pytest.param("lora", 3, marks=pytest.mark.slow),
        pytest.param("lora_and_tower", None, marks=pytest.mark.slow),
        pytest.param("lora_alone", 3, marks=pytest.mark.slow),
    ],
)
def test_checkpoint_is_the_model_that_was_being_trained(kind, stage, bases, conversations, tmp_path):
    """The loss that step 3 logged is the loss of the model that step 2 saved, read from its folder alone."""
    flags, changed = STAGES[kind]
    deepspeed = {"deepspeed": deepspeed_json(stage)} if stage else {}
    argv = training_flags(
        bases,
        conversations,
        tmp_path,
        **flags,
        **deepspeed,
        per_device_train_batch_size=1 if stage else 2,
        save_strategy="steps",
        save_steps=2,
    )
    train_on_ranks(argv, world_size=2 if stage else 1, output_dir=tmp_path)
    losses = logged(tmp_path, "loss")
    assert abs(losses[2] - loss_of_saved(tmp_path, conversations, [4, 5])) > 1e-3  # two more steps make a difference
    saved = loss_of_saved(tmp_path / "checkpoint-2", conversations, [4, 5])
    assert saved == pytest.approx(losses[2], abs=1e-5)  # merged adapters round once more
    assert changed_parts(untrained(bases), load_model(tmp_path)) == changed


def saved_as_bases(saved: Path) -> TinyBases:
    return TinyBases(vision_tower=saved, language_model=saved)


def test_run_goes_on_from_a_saved_model_and_keeps_its_projector(stage_one, conversations, tmp_path):
    """No flag names tower or projector: the saved model's own are used (LLaVA's finetune_task.sh)."""
    argv = training_flags(saved_as_bases(stage_one), conversations, tmp_path, learning_rate=0.0, max_steps=1)
    for flag in ("--vision_tower", "--mm_projector_type"):
        del argv[argv.index(flag) : argv.index(flag) + 2]
    train_on_ranks(argv, world_size=1, output_dir=tmp_path)
    assert changed_parts(load_model(stage_one), load_model(tmp_path)) == set()


def test_adapter_on_a_saved_model_is_completed_from_that_model(bases, conversations, tmp_path):
    """The language model of the second run is the one that the first has changed, not the one that it began with."""
    first, second = tmp_path / "first", tmp_path / "second"
    train_on_ranks(training_flags(bases, conversations, first), world_size=1, output_dir=first)
    argv = training_flags(
        saved_as_bases(first), conversations, second, lora_enable=True, lora_r=4, learning_rate=0.0, max_steps=1
    )
    train_on_ranks(argv, world_size=1, output_dir=second)
    assert changed_parts(load_model(first), load_model(second)) == set()


def train_and_record_order(argv: list[str], path: Path) -> int:
    """Write the index of each sample that is read to a file, one per line."""
    get = ConversationDataset.__getitem__

    def get_and_record(self, index):
        with path.open("a") as file:
            file.write(f"{index}\n")
        return get(self, index)

    ConversationDataset.__getitem__ = get_and_record
    return run_training(argv)


def shuffled(argv: list[str]) -> list[str]:
    at = argv.index("--train_sampling_strategy")
    return argv[:at] + argv[at + 2 :]


def test_samples_are_grouped_by_modality_anew_in_each_epoch(bases, conversations, tmp_path):
    argv = training_flags(
        bases,
        conversations,
        tmp_path / "out",
        group_by_modality_length=True,
        per_device_train_batch_size=2,
        max_steps=12,
    )
    order = tmp_path / "order.txt"
    (result,) = run_ranks(train_and_record_order, shuffled(argv), order, world_size=1, output_dir=tmp_path / "ranks")
    assert result.exit_code == 0, result.output[-4000:]
    seen = [int(line) for line in order.read_text().split()]
    epochs = [seen[:12], seen[12:]]
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
        is_text_only = [(index + 1) % 3 == 0 for index in epoch]
        # Three of four pairs with images, one of two without; LLaVA puts the last pair of each kind at the end.
        assert [is_text_only[at] == is_text_only[at + 1] for at in (0, 2, 4, 6)] == [True] * 4
        assert epoch[8:] == sorted(epoch[8:])


def test_users_own_projector_trains_under_zero3_and_loads_only_when_trusted(bases, captions, tmp_path):
    example = Path(__file__).resolve().parents[2] / "playground" / "examples" / "blur_projector.py"
    argv = training_flags(
        bases,
        captions,
        tmp_path,
        version="plain",
        mm_projector_type=f"{example}:BlurProjector",
        tune_mm_mlp_adapter=True,
        deepspeed=deepspeed_json(3),
        per_device_train_batch_size=2,
    )
    train_on_ranks(argv, world_size=2, output_dir=tmp_path)
    with pytest.raises(ProjectorError, match="trust_projector_code"):
        load_model(tmp_path)
    assert type(load_model(tmp_path, trust_projector_code=True).model.multi_modal_projector).__name__ == "BlurProjector"


# Resuming


def test_resuming_with_other_parameters_is_refused(bases, conversations, tmp_path):
    argv = training_flags(bases, conversations, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    train_on_ranks(argv, world_size=1, output_dir=tmp_path)
    (result,) = run_ranks(
        run_training, [*argv, "--freeze_backbone", "True"], world_size=1, output_dir=tmp_path / "refused"
    )
    assert result.exit_code == 2
    assert "trains other parameters" in result.output


# Mistakes


def fail(argv, tmp_path, world_size=1):
    return run_ranks(run_training, argv, world_size=world_size, output_dir=tmp_path / "failed")


@pytest.fixture
def damaged(tmp_path):
    """Four records; the second one's image, which rank 1 of two meets, is none."""
    data = write_data(tmp_path / "data", num_records=4, text_only_every=0)
    (data.image_folder / "001.png").write_bytes(b"no image")
    return data


def test_damaged_image_ends_the_run_where_asked_and_is_named_by_the_rank_that_met_it(bases, damaged, tmp_path):
    output_dir = tmp_path / "out"
    argv = training_flags(bases, damaged, output_dir, per_device_train_batch_size=1, on_bad_image="error")
    results = fail(argv, tmp_path, world_size=2)
    assert results[1].exit_code == 2
    assert "error: rank 1:" in results[1].output and "001.png" in results[1].output
    assert "Traceback" not in results[1].output
    assert {path.stem for path in output_dir.iterdir()} <= {"training_summary"}  # no model, no checkpoint


def test_damaged_image_is_replaced_and_counted_over_ranks_and_workers(bases, damaged, tmp_path):
    """Two epochs: it is met twice and counts once, on rank 0 too, which never sees it."""
    output_dir = tmp_path / "out"
    argv = training_flags(bases, damaged, output_dir, per_device_train_batch_size=1, dataloader_num_workers=1)
    train_on_ranks(argv, world_size=2, output_dir=output_dir)
    assert logged(output_dir, "samples_replaced") == [1] * len(logged(output_dir, "samples_replaced"))
    account = json.loads((output_dir / "training_summary.json").read_text())["data"]
    assert account["replaced"] == {"unreadable image": 1}
    assert "sample 1 (id 'conversation-1'): " in account["examples"]["unreadable image"][0]
    assert "skipped records, by reason: {'unreadable image': 1}" in (output_dir / "ranks" / "rank_0.txt").read_text()


def test_damaged_image_can_be_found_before_training(bases, damaged, tmp_path):
    output_dir = tmp_path / "out"
    argv = training_flags(bases, damaged, output_dir, per_device_train_batch_size=1, precheck_images=True)
    results = fail(argv, tmp_path, world_size=2)
    assert [result.exit_code for result in results] == [2, 2]
    assert "".join(result.output for result in results).count("001.png: cannot be read") == 1
    train_on_ranks([*argv, "--on_bad_sample", "skip"], world_size=2, output_dir=output_dir)
    assert logged(output_dir, "samples_replaced") == []
    assert "1 samples left out (1 x unreadable image)" in (output_dir / "ranks" / "rank_0.txt").read_text()


def test_missing_image_is_found_before_any_training(bases, tmp_path):
    data = write_data(tmp_path / "data", num_records=4, text_only_every=0)
    (data.image_folder / "003.png").unlink()
    (result,) = fail(training_flags(bases, data, tmp_path / "out"), tmp_path)
    assert result.exit_code == 2
    assert "003.png" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("data_path", "absent.json", "--data_path absent.json: no such file"),
        ("image_folder", "absent", "--image_folder absent: no such folder"),
        ("deepspeed", "zero9.json", "--deepspeed zero9.json: no such file"),
        ("pretrain_mm_mlp_adapter", "absent/mm_projector.bin", "no projector weights at absent"),
        ("model_name_or_path", "absent_model", "--model_name_or_path 'absent_model'"),
        ("fp16", "True", "needs a GPU"),
        ("attn_implementation", "flex_attention", "this run is on CPU; use segments or sdpa"),
        ("resume", "absent/checkpoint-3", "no such folder"),
    ],
)
def test_wrong_value_ends_with_code_two_and_nothing_written(flag, value, message, bases, conversations, tmp_path):
    (result,) = fail(training_flags(bases, conversations, tmp_path / "out", **{flag: value}), tmp_path)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("error:") == 1
    assert not (tmp_path / "out").exists()


def test_projector_weights_of_another_shape_are_refused(stage_one, bases, conversations, tmp_path):
    argv = training_flags(
        bases, conversations, tmp_path / "out", mm_projector_type="linear", pretrain_mm_mlp_adapter=stage_one
    )
    (result,) = fail(argv, tmp_path)
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_losses_are_logged_unrounded(stage_one):
    history = json.loads((stage_one / "trainer_state.json").read_text())["log_history"]
    assert all(isinstance(entry["loss"], float) for entry in history if "loss" in entry)
    assert any(round(loss, 4) != loss for loss in logged(stage_one, "loss"))
