"""The recipes parse, every projector goes through every stage, and the values are LLaVA-1.5's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_saep.arguments import parse_arguments
from llava_saep.data.images import parse_grid_pinpoints
from tests.fixtures.llava_scripts import LLAVA_SCRIPTS, argument_list

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "playground" / "recipes"
STAGES = sorted(path.stem for path in (RECIPES / "stages").glob("*.sh") if path.stem != "common")
PROJECTORS = {"llava_1_5": "mlp", "saep": "saep", "c_abstractor": "c_abstractor", "qformer": "qformer"}

FAKE_DEEPSPEED = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["RECORDED_COMMAND"], "w") as file:
    json.dump(sys.argv[1:], file)
"""


@pytest.fixture
def run_recipe(tmp_path):
    """Run a recipe with a launcher that only writes down what it is given; return the launcher's part and the flags."""
    launcher = tmp_path / "deepspeed"
    launcher.write_text(FAKE_DEEPSPEED)
    launcher.chmod(0o755)
    recorded = tmp_path / "command.json"

    def run(recipe, *arguments, **settings):
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = {**os.environ, **settings, "PATH": path, "RECORDED_COMMAND": str(recorded)}
        command = ["bash", str(RECIPES / f"{recipe}.sh"), *arguments]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=60, capture_output=True, text=True)
        words = json.loads(recorded.read_text())
        at = words.index("llava_saep/train/train_mem.py")
        return words[:at], words[at + 1 :]

    return run


def value(flags, name):
    """What a flag is set to; of several settings, the last."""
    return flags[len(flags) - 1 - flags[::-1].index(f"--{name}") + 1]


def test_every_recipe_is_a_projector_that_is_tested_here():
    assert {path.stem for path in RECIPES.glob("*.sh")} == {*PROJECTORS, "stage"}
    assert all(os.access(path, os.X_OK) for path in RECIPES.rglob("*.sh") if path.stem != "common")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("recipe", PROJECTORS)
def test_recipe_parses(recipe, stage, run_recipe, monkeypatch):
    monkeypatch.setattr("llava_saep.arguments.require_bitsandbytes", lambda asked: None)
    settings = {"MERGE_TYPE": "flat"} if recipe == "qformer" else {}
    launcher, flags = run_recipe(recipe, stage, **settings)
    assert launcher == ["--num_gpus", "8"]
    assert (ROOT / value(flags, "deepspeed")).is_file()
    assert parse_arguments(flags).model.projector.name == PROJECTORS[recipe]


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "finetune_lora", "finetune_task", "finetune_task_lora"])
def test_values_are_those_of_llavas_script_of_this_name(stage, run_recipe):
    theirs = parse_arguments(argument_list(LLAVA_SCRIPTS[f"v1_5/{stage}.sh"]))
    _, flags = run_recipe("llava_1_5", stage)
    ours = parse_arguments(flags)
    assert ours.training.trainable == theirs.training.trainable
    assert ours.training.lora == theirs.training.lora
    assert ours.training.projector_learning_rate == theirs.training.projector_learning_rate
    assert ours.training.group_by_modality_length == theirs.training.group_by_modality_length
    assert ours.data == theirs.data
    assert ours.model.vision_tower == theirs.model.vision_tower
    assert (ours.model.projector_weights is None) == (theirs.model.projector_weights is None)
    spec = ours.model.projector.spec
    assert tuple(spec.config_class.default_vision_layers(24, {})) == (-2,)
    different = {
        name
        for name in ours.training.trainer_arguments.keys() | theirs.training.trainer_arguments.keys()
        if ours.training.trainer_arguments.get(name) != theirs.training.trainer_arguments.get(name)
    }
    # Ours: what is saved when, and no report. The batch for evaluation is unused. The ZeRO stage follows below.
    assert different - {"per_device_eval_batch_size"} <= {"save_steps", "report_to", "deepspeed"}
    zero = [Path(c.training.trainer_arguments["deepspeed"]).name for c in (ours, theirs)]
    assert zero[0] == zero[1]


@pytest.mark.parametrize(
    ("recipe", "stage"), [("pretrain", "pretrain"), ("finetune", "finetune"), ("finetune_lora", "lora")]
)
def test_values_are_those_that_the_stage_flag_sets(recipe, stage, run_recipe):
    _, flags = run_recipe("llava_1_5", recipe)
    ours = parse_arguments(flags)
    names = ("model_name_or_path", "data_path", "image_folder", "output_dir")
    places = argument_list({name: value(flags, name) for name in names})
    if ours.model.projector_weights is not None:
        places += ["--pretrain_mm_mlp_adapter", ours.model.projector_weights]
    preset = parse_arguments([*places, "--stage", stage])
    assert ours.data == preset.data
    assert ours.model.projector == preset.model.projector
    training = ("trainable", "lora", "projector_learning_rate", "group_by_modality_length", "save_total_limit")
    for name in training:
        assert getattr(ours.training, name) == getattr(preset.training, name)
    said, set_by_stage = (dict(c.training.trainer_arguments) for c in (ours, preset))
    assert Path(said.pop("deepspeed")).name == Path(set_by_stage.pop("deepspeed")).name
    assert said == set_by_stage


def test_anyres_cuts_images_as_llava_1_6_does(run_recipe):
    config = parse_arguments(run_recipe("llava_1_5", "finetune_anyres")[1])
    assert (config.data.image_aspect_ratio, config.model.mm_patch_merge_type) == ("anyres", "spatial_unpad")
    grid = "[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]"  # config.json of llava-v1.6-vicuna-7b
    assert config.model.image_grid_pinpoints == parse_grid_pinpoints(grid)
    assert config.data.max_length == 4096


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "finetune_anyres"])
@pytest.mark.parametrize(("num_gpus", "per_gpu"), [("8", None), ("2", None), ("1", "1")])
def test_a_step_sees_llavas_batch_on_any_number_of_gpus(stage, num_gpus, per_gpu, run_recipe):
    settings = {"NUM_GPUS": num_gpus} | ({} if per_gpu is None else {"PER_GPU": per_gpu})
    launcher, flags = run_recipe("saep", stage, **settings)
    assert launcher == ["--num_gpus", num_gpus]
    batch = int(value(flags, "per_device_train_batch_size")) * int(value(flags, "gradient_accumulation_steps"))
    assert batch * int(num_gpus) == (256 if stage == "pretrain" else 128)


def test_batch_that_cannot_be_divided_is_refused(run_recipe):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run_recipe("saep", "finetune", NUM_GPUS="3")
    assert failed.value.returncode == 2
    assert "NUM_GPUS=3 x PER_GPU=16 does not divide the batch of 128" in failed.value.stderr


def test_unknown_stage_lists_those_that_there_are(run_recipe):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run_recipe("saep", "finetun")
    assert failed.value.returncode == 2
    assert failed.value.stderr.split()[-len(STAGES) :] == STAGES


def test_flags_behind_the_stage_win_and_settings_reach_the_projector(run_recipe):
    settings = {"PROJECTOR": "saep", "PROJECTOR_OPTIONS": "stride=3", "NAME": "mine", "LAUNCHER_FLAGS": "--hostfile h"}
    launcher, flags = run_recipe("stage", "finetune", "--learning_rate", "1e-4", **settings)
    config = parse_arguments(flags)
    assert launcher == ["--hostfile", "h"]
    assert config.training.trainer_arguments["learning_rate"] == 1e-4
    assert config.model.projector.options["stride"] == 3
    assert config.model.projector_weights == "./checkpoints/mine-pretrain"
    assert config.training.output_dir == "./checkpoints/mine"
