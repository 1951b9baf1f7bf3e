"""`--stage`: the recipe's values on machines that are not LLaVA's eight GPUs."""

import pytest

from llava_saep.arguments import parse_arguments
from llava_saep.train.stage_presets import describe_use, fit_preset

REQUIRED = "--model_name_or_path lm --data_path data.json --output_dir out".split()


def fit(*flags, **machine):
    config = parse_arguments([*REQUIRED, *flags]).training
    machine = {"on_accelerator": True, "has_bf16": True, "world_size": 8, "cores_per_rank": 16, **machine}
    fitted, notes = fit_preset(config.trainer_arguments, config.preset, **machine)
    return fitted, describe_use(config.preset, notes)


def test_llavas_machine_gets_the_recipe_unchanged():
    fitted, said = fit("--stage", "finetune")
    assert fitted["bf16"] and fitted["tf32"] and fitted["deepspeed"].endswith("zero3.json")
    assert fitted["gradient_accumulation_steps"] == 1
    assert "learning_rate 2e-05" in said and "here:" not in said


@pytest.mark.parametrize(("stage", "batch_size"), [("pretrain", 256), ("finetune", 128), ("lora", 128)])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_fewer_processes_accumulate_to_the_recipes_batch(stage, batch_size, world_size):
    fitted, said = fit("--stage", stage, world_size=world_size)
    steps = fitted["gradient_accumulation_steps"]
    assert fitted["per_device_train_batch_size"] * world_size * steps == batch_size
    assert f"{steps} micro-batches per step" in said


def test_ones_own_batch_is_kept():
    fitted, _ = fit("--stage", "pretrain", "--per_device_train_batch_size", "4", world_size=2)
    assert (fitted["per_device_train_batch_size"], fitted["gradient_accumulation_steps"]) == (4, 32)
    fitted, _ = fit("--stage", "pretrain", "--gradient_accumulation_steps", "1", world_size=2)
    assert fitted.get("gradient_accumulation_steps", 1) == 1
    _, said = fit("--stage", "finetune", "--per_device_train_batch_size", "48", world_size=2)
    assert "a batch of 96 in place of 128" in said


def test_a_laptop_trains_in_one_process_without_what_it_does_not_have():
    fitted, said = fit("--stage", "pretrain", on_accelerator=False, has_bf16=False, world_size=1, cores_per_rank=2)
    assert fitted["dataloader_num_workers"] == 2
    assert not {"bf16", "tf32", "deepspeed"} & fitted.keys()
    assert fitted["learning_rate"] == 1e-3
    for word in ("without bf16", "without DeepSpeed", "8 micro-batches per step"):
        assert word in said


def test_ranks_without_accelerators_still_split():
    fitted, _ = fit("--stage", "pretrain", on_accelerator=False, has_bf16=False, world_size=2)
    assert fitted["deepspeed"].endswith("zero2.json")


def test_what_the_command_line_asks_for_is_not_taken_back():
    own = ["--bf16", "True", "--deepspeed", "own.json"]
    fitted, said = fit("--stage", "pretrain", *own, on_accelerator=False, has_bf16=False, world_size=1)
    assert fitted["bf16"] and fitted["deepspeed"] == "own.json"
    assert "left to your flags: bf16, deepspeed" in said
