"""LLaVA's training scripts, run on tiny models: only paths and the models' names differ from what stands in them."""

from pathlib import Path

import pytest
import torch

from llava_saep.model.loading import load_model
from tests.fixtures.llava_scripts import LLAVA_SCRIPTS, argument_list
from tests.fixtures.ranks import train_on_ranks
from tests.fixtures.tiny import TinyBases, TinyData, write_bases, write_data
from tests.fixtures.training import logged

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> TinyBases:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> TinyData:
    return write_data(tmp_path_factory.mktemp("conversations"), num_records=32)


def run_script(script: str, bases: TinyBases, data: TinyData, output_dir: Path, **paths: Path) -> str:
    """Run a script's flags on one rank and return what it said; with two batches, the second one changes weights.

    Only `--use_cpu` is added, so that a machine with a GPU does the same.
    """
    flags = LLAVA_SCRIPTS[script] | {
        "model_name_or_path": bases.language_model,
        "vision_tower": bases.vision_tower,
        "data_path": data.data_path,
        "image_folder": data.image_folder,
        "output_dir": output_dir,
        **paths,
    }
    train_on_ranks([*argument_list(flags), "--use_cpu", "True"], world_size=1, output_dir=output_dir)
    losses = logged(output_dir, "loss")
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    return (output_dir / "ranks" / "rank_0.txt").read_text()


@pytest.fixture(scope="module")
def stage_one(bases, tmp_path_factory) -> Path:
    captions = write_data(tmp_path_factory.mktemp("captions"), kind="captions", num_records=64)
    output_dir = tmp_path_factory.mktemp("stage_one")
    said = run_script("v1_5/pretrain.sh", bases, captions, output_dir)
    for note in ("--evaluation_strategy no -> --eval_strategy no", "--tf32 True is ignored", "--report_to wandb"):
        assert note in said
    assert said.count("deepspeed_configs/zero2.json") == 1
    return output_dir


@pytest.fixture(scope="module")
def stage_two(bases, conversations, stage_one, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("stage_two")
    paths = {"pretrain_mm_mlp_adapter": stage_one / "mm_projector.bin"}
    run_script("v1_5/finetune.sh", bases, conversations, output_dir, **paths)
    return output_dir


def parts(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of the tower, of the projector and of the language model, each in one row."""
    rows: dict[str, list[torch.Tensor]] = {"vision_tower": [], "multi_modal_projector": [], "language_model": []}
    for name, tensor in load_model(folder).state_dict().items():
        rows[name.split(".")[1] if name.startswith("model.") else "language_model"].append(tensor.bfloat16().flatten())
    return {part: torch.cat(tensors) for part, tensors in rows.items()}


def changed(before: Path, after: Path) -> set[str]:
    """Which parts differ in bf16, where none may differ by more than one step's update and bf16's rounding."""
    old, new = parts(before), parts(after)
    for part in old:
        # A step of Adam moves a weight by its learning rate (2e-5), and a product with 128 adapter weights, each moved
        # by 2e-4, by less than 1e-2; a projector that had started anew would be off by ten times that.
        torch.testing.assert_close(new[part], old[part], atol=1e-2, rtol=2**-7)
    return {part for part in old if not torch.equal(old[part], new[part])}


def test_stage_two_trains_projector_and_language_model_from_stage_ones(stage_one, stage_two):
    assert changed(stage_one, stage_two) == {"multi_modal_projector", "language_model"}


def test_task_script_goes_on_from_the_model_and_its_projector(stage_two, bases, conversations, tmp_path):
    run_script("v1_5/finetune_task.sh", bases._replace(language_model=stage_two), conversations, tmp_path)
    assert changed(stage_two, tmp_path) == {"multi_modal_projector", "language_model"}


@pytest.mark.slow
def test_lora_script_trains_adapters_beside_the_projector(stage_one, bases, conversations, tmp_path):
    paths = {"pretrain_mm_mlp_adapter": stage_one / "mm_projector.bin"}
    run_script("v1_5/finetune_lora.sh", bases, conversations, tmp_path, **paths)
    assert changed(stage_one, tmp_path) == {"multi_modal_projector", "language_model"}


@pytest.mark.slow
def test_task_script_with_lora_adapts_the_finetuned_model(stage_two, bases, conversations, tmp_path):
    run_script("v1_5/finetune_task_lora.sh", bases._replace(language_model=stage_two), conversations, tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    assert changed(stage_two, tmp_path) == {"multi_modal_projector", "language_model"}
