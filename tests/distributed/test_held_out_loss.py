"""Held-out loss and accuracy: equal to a plain computation, for any number of ranks, and without effect on training."""

import json

import pytest
import torch
from torch.nn import functional as F

from llava_saep.arguments import parse_arguments
from llava_saep.constants import IGNORE_INDEX
from llava_saep.data.collator import ConversationCollator
from llava_saep.model.loading import load_model
from llava_saep.train.planning import plan_model
from llava_saep.train.run import build_held_out_dataset
from tests.fixtures.ranks import train_on_ranks
from tests.fixtures.tiny import TinyData, write_data
from tests.fixtures.training import deepspeed_json, logged, training_flags

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> TinyData:
    """Seven records: with two ranks and batches of two, the last batch of one rank is half empty."""
    return write_data(tmp_path_factory.mktemp("held_out"), num_records=7, text_only_every=2, seed=9)


def flags_with(held_out: TinyData, **flags) -> dict:
    return {
        "eval_data_path": held_out.data_path,
        "eval_image_folder": held_out.image_folder,
        "eval_steps": 2,
        "per_device_eval_batch_size": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        **flags,
    }


def held_out_dataset(argv):
    config = parse_arguments(argv)
    processor, model_config = plan_model(config)
    return build_held_out_dataset(config.data, processor, model_config), processor


def compute_plainly(argv, model_folder) -> tuple[float, float]:
    """Token mean of the loss, and share of tokens predicted, record by record from whole logits."""
    dataset, processor = held_out_dataset(argv)
    collator = ConversationCollator(processor.tokenizer.pad_token_id, dataset.image_size, 512)
    model = load_model(str(model_folder), dtype=torch.float32).eval()
    losses, hits = [], []
    for index in range(len(dataset)):
        batch = collator([dataset.load_sample(index)])
        batch.pop("sample_indices")
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[0, :-1]
        losses += F.cross_entropy(logits, labels, reduction="none")[labels != IGNORE_INDEX].tolist()
        hits += (logits.argmax(-1) == labels)[labels != IGNORE_INDEX].tolist()
    return sum(losses) / len(losses), sum(hits) / len(hits)


def check_what_was_said(output_dir, losses):
    """Rank 0 shows steps, held-out losses and the summary, which is in the folder too; rank 1 nothing of it."""
    said = [(output_dir / "ranks" / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert "step 4/4 (100%): loss " in said[0] and "tokens/s, padding " in said[0]
    assert f"step 4: held-out loss {losses[-1]:.4f}, token accuracy" in said[0]
    assert "step " not in said[1]
    page = (output_dir / "training_summary.txt").read_text()
    assert page.splitlines()[0].split() == ["outcome", "finished"]
    assert page.splitlines()[1] in said[0]
    summary = json.loads((output_dir / "training_summary.json").read_text())
    assert summary["losses"]["held_out_last"] == [losses[-1], 4]
    assert summary["tokens"]["tokens"] == sum(logged(output_dir, "tokens"))
    assert summary["world_size"] == 2 and summary["peak_memory_bytes"] > 2**27
    assert summary["projector"]["name"] == "saep"
    assert summary["tokens_per_image"] == 9  # 6 x 6 patches at stride 2


@pytest.mark.parametrize(
    "stage", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.slow)]
)
def test_two_ranks_measure_what_a_plain_computation_gives(stage, bases, conversations, held_out, tmp_path):
    flags = flags_with(held_out) | ({} if stage is None else {"deepspeed": deepspeed_json(stage)})
    argv = training_flags(bases, conversations, tmp_path, **flags)
    train_on_ranks(argv, world_size=2, output_dir=tmp_path)
    losses, accuracies = logged(tmp_path, "eval_loss"), logged(tmp_path, "eval_token_accuracy")
    assert len(losses) == len(accuracies) == 2
    loss, accuracy = compute_plainly(argv, tmp_path)
    # Sums of float32 losses in another order and with other padding: a few units in the seventh digit.
    assert losses[-1] == pytest.approx(loss, rel=1e-5)
    assert accuracies[-1] == pytest.approx(accuracy, abs=1e-9)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    check_what_was_said(tmp_path, losses)


def test_measuring_changes_nothing_in_training_and_damaged_images_do_not_count(bases, conversations, tmp_path):
    """Dropout and shuffling draw random numbers, which evaluation must leave as they are."""
    held_out = write_data(tmp_path, num_records=7, text_only_every=2, seed=9)
    image = held_out.image_folder / "000.png"
    image.write_bytes(image.read_bytes()[:60])
    dropout = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.3, "train_sampling_strategy": "random"}
    measuring = flags_with(held_out, dataloader_num_workers=1)
    for name, flags in (("without", {"per_device_train_batch_size": 2, "learning_rate": 1e-3}), ("with", measuring)):
        argv = training_flags(bases, conversations, tmp_path / name, **dropout, **flags)
        train_on_ranks(argv, world_size=1, output_dir=tmp_path / name)
    assert logged(tmp_path / "without", "loss") == logged(tmp_path / "with", "loss")
    dataset, _ = held_out_dataset(argv)
    labels = [dataset.load_sample(index)["labels"][1:] for index in range(1, 7)]
    assert logged(tmp_path / "with", "eval_supervised")[0] == sum(int((row != IGNORE_INDEX).sum()) for row in labels)


@pytest.mark.slow
def test_packed_rows_and_stored_features_measure_the_same(bases, conversations, held_out, tmp_path):
    """Held-out records are not packed, and what the tower sees in their images is stored as well."""
    more = {"packing": True, "model_max_length": 256, "cache_vision_features": tmp_path / "cache"}
    argv = training_flags(bases, conversations, tmp_path / "out", **flags_with(held_out), **more)
    train_on_ranks(argv, world_size=1, output_dir=tmp_path / "out")
    loss, accuracy = compute_plainly(argv, tmp_path / "out")
    assert logged(tmp_path / "out", "eval_loss")[-1] == pytest.approx(loss, rel=1e-5)
    assert logged(tmp_path / "out", "eval_token_accuracy")[-1] == pytest.approx(accuracy, abs=1e-9)
