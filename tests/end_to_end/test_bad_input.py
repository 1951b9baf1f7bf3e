"""A wrong projector, layer, grid or weights file ends a training command in one sentence before any model is loaded.

The cases run the training script where loading a model and joining other ranks are forbidden: what can be known from
configs, keys and shapes is known without them, and what every rank finds by itself leaves none waiting for another.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from llava_saep.arguments import parse_arguments
from llava_saep.cli import main
from llava_saep.commands import train as train_command
from llava_saep.model.loading import build_processor, make_config, save_projector_weights
from llava_saep.model.projector_selection import selection_from_config
from llava_saep.train import distributed, train_mem
from llava_saep.train.planning import plan_model
from projectors import select_projector
from tests.fixtures.ranks import run_ranks, run_training
from tests.fixtures.tiny import TEXT_HIDDEN_SIZE, VISION_HIDDEN_SIZE, TinyBases, TinyData, write_bases, write_data
from tests.fixtures.training import deepspeed_json, training_flags

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> TinyBases:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TinyData:
    return write_data(tmp_path_factory.mktemp("data"), num_records=2)


def forbid_models(monkeypatch) -> None:
    """Make reading weights, and meeting other ranks, fail."""

    def forbidden(*arguments, **keywords):
        raise AssertionError("a model was loaded, or ranks met, before the mistake was found")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", forbidden)
    monkeypatch.setattr(distributed, "start_process_group", forbidden)


@pytest.fixture
def refusal(monkeypatch, capsys, tmp_path):
    """Run the training script to its one sentence, exit code 2 and nothing written."""
    forbid_models(monkeypatch)
    monkeypatch.setattr(distributed, "configure_logging", lambda: None)
    monkeypatch.setattr(distributed, "quieten_libraries", lambda: None)

    def run(argv: list[str]) -> str:
        assert train_mem.main(argv) == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert sentence.startswith("error: ")
        assert not (tmp_path / "out").exists()
        return sentence

    return run


def train_without_models(argv: list[str]) -> int:
    """What a rank does in the tests of two ranks."""
    forbid_models(pytest.MonkeyPatch())
    return run_training(argv)


# Options, grids and layers


WRONG_FLAGS = {
    "no_choice": ("saep", {"mm_projector_options": "stride=9"}, ["'stride'", "'9'", "1, 2, 3, 4"]),
    "below_the_range": ("mlp", {"mm_projector_options": "depth=0"}, ["'depth'", "got 0", "at least 1"]),
    "no_number": ("mlp", {"mm_projector_options": "depth=two"}, ["'depth'", "'two'", "int"]),
    "unknown_option": ("saep", {"mm_projector_options": "strid=2"}, ["'strid'", "Did you mean 'stride'"]),
    "grid_not_divisible": ("pixel_shuffle", {"mm_projector_options": "factor=4"}, ["6x6 grid", "factor 4"]),
    "grid_too_small": ("avg_pool", {"mm_projector_options": "num_queries=144"}, ["6x6 grid", "36", "144"]),
    "layer_beyond_the_tower": ("linear", {"mm_vision_select_layer": 40}, ["40", "4 blocks", "-5 to 4"]),
    "layer_not_applied": ("saep", {"mm_vision_select_layer": 40}, ["mm_vision_select_layer 40", "4 blocks", "-5 to 4"]),
    "layer_by_option": ("linear", {"mm_projector_options": "vision_layers=40"}, ["40", "4 blocks", "-5 to 4"]),
    "one_of_several_layers": ("saep", {"mm_projector_options": "vision_layers=1|9"}, ["layer 9", "4 blocks"]),
    "one_layer_for_several": (
        "dense_connector",
        {"mm_projector_options": "vision_layers=-2"},
        ["'dense_connector', option vision_layers: got 1", "at least 3"],
    ),
    "equal_widths": ("identity", {}, [str(VISION_HIDDEN_SIZE), str(TEXT_HIDDEN_SIZE)]),
    "class_token_on_a_map": (
        "saep",
        {"mm_vision_select_feature": "cls_patch"},
        ["'saep', option keep_cls_token", "--mm_vision_select_feature patch"],
    ),
}


def test_output_folder_that_cannot_be_made_ends_before_models_are_loaded(bases, data, tmp_path, refusal):
    (tmp_path / "notes.txt").write_text("")
    sentence = refusal(training_flags(bases, data, tmp_path / "notes.txt" / "run"))
    assert "--output_dir" in sentence and f"{tmp_path / 'notes.txt'} is a file" in sentence


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_wrong_flag_ends_before_models_are_loaded(name, bases, data, tmp_path, refusal):
    projector, flags, words = WRONG_FLAGS[name]
    argv = training_flags(bases, data, tmp_path / "out", mm_projector_type=projector, **flags)
    sentence = refusal(argv)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    "projector, options, words",
    [
        ("saep_single_layer", "", ["saep_single_layer", "[-2]", "[1, 2]"]),
        ("saep", "vision_layers=1|3", ["1 2", "1 3", "drop one"]),
    ],
)
def test_layers_by_flag_that_contradict_a_preset_or_option_are_refused(
    projector, options, words, bases, data, tmp_path, refusal
):
    flags = {"mm_projector_type": projector, "mm_projector_options": options}
    sentence = refusal([*training_flags(bases, data, tmp_path / "out", **flags), "--mm_vision_select_layer", "1", "2"])
    assert all(word in sentence for word in words), sentence


# The same on a saved model, which brings its own tower


@pytest.fixture(scope="module")
def saved(bases, tmp_path_factory) -> Path:
    """What a run that goes on from a saved model reads before weights: its config and its processor."""
    folder = tmp_path_factory.mktemp("saved")
    parts = {"language_model": str(bases.language_model), "vision_tower": str(bases.vision_tower)}
    config = make_config(**parts, projector=select_projector("linear"), image_token_id=1)
    config.save_pretrained(folder)
    build_processor(**parts, model_config=config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["grid_not_divisible", "grid_too_small", "layer_by_option", "equal_widths"])
def test_wrong_projector_for_a_saved_model_ends_before_models_are_loaded(name, saved, data, tmp_path, refusal):
    projector, flags, words = WRONG_FLAGS[name]
    on_saved = TinyBases(vision_tower=saved, language_model=saved)
    sentence = refusal(training_flags(on_saved, data, tmp_path / "out", mm_projector_type=projector, **flags))
    assert all(word in sentence for word in words), sentence


def test_layer_that_a_saved_models_tower_lacks_is_refused(saved, data, tmp_path, refusal):
    """8 lies one round of 5 hidden states beyond the kept projector's -2, and is no other name for it."""
    on_saved = TinyBases(vision_tower=saved, language_model=saved)
    argv = training_flags(on_saved, data, tmp_path / "out", mm_vision_select_layer=8)
    at = argv.index("--mm_projector_type")
    sentence = refusal(argv[:at] + argv[at + 2 :])
    assert "--mm_vision_select_layer 8" in sentence and "4 blocks" in sentence


# Weights of another projector


def make_weights(folder: Path, bases: TinyBases, spelling: str, options: dict | None = None) -> Path:
    """What stage 1 leaves: a folder with projector weights and the config beside them."""
    config = make_config(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        projector=select_projector(spelling, options),
        image_token_id=1,
    )
    projector = selection_from_config(config.projector).build(config.projector_config)
    save_projector_weights(folder, projector.state_dict(), config)
    return folder


def keys_as_in_llava(folder: Path, spelling: str, vision_hidden_size: int = VISION_HIDDEN_SIZE) -> Path:
    """A bare mm_projector.bin as LLaVA and its relatives write it, without any config."""
    selection = select_projector(spelling)
    config = selection.build_config(
        vision_hidden_size=vision_hidden_size, text_hidden_size=TEXT_HIDDEN_SIZE, num_vision_layers=4
    )
    projector = selection.build(config)
    weights = projector.to_original_state_dict(projector.state_dict())
    folder.mkdir()
    torch.save({f"model.mm_projector.{key}": tensor for key, tensor in weights.items()}, folder / "mm_projector.bin")
    return folder / "mm_projector.bin"


def alone(folder: Path) -> Path:
    """The weights file of a folder without the config beside it."""
    other = folder.with_name("alone")
    other.mkdir()
    return Path(shutil.copy(folder / "mm_projector.safetensors", other))


def narrower(bases: TinyBases, folder: Path) -> Path:
    """Weights between narrower models, as the config beside them says."""
    make_weights(folder, bases, "saep")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def whole_model(bases: TinyBases, folder: Path, spelling: str) -> Path:
    """A folder as stage 2 leaves it, as far as looking at it goes: weights of everything in one file."""
    make_weights(folder, bases, spelling)
    weights = load_file(folder / "mm_projector.safetensors") | {"lm_head.weight": torch.zeros(2, 2)}
    save_file(weights, folder / "model.safetensors")
    (folder / "mm_projector.safetensors").unlink()
    return folder


def damaged(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir()
    (folder / name).write_bytes(content)
    return folder / name


def cut_in_half(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def pickled(folder: Path, content: object) -> Path:
    folder.mkdir()
    torch.save(content, folder / "mm_projector.bin")
    return folder / "mm_projector.bin"


WRONG_WEIGHTS = {
    "another_projector": (
        lambda bases, folder: make_weights(folder, bases, "linear"),
        ["linear projector", "projector is saep", "config.json", "--mm_projector_type linear."],
    ),
    "another_projector_with_options": (
        lambda bases, folder: make_weights(folder, bases, "pixel_shuffle", {"factor": 3}),
        ["pixel_shuffle projector", """--mm_projector_type pixel_shuffle --mm_projector_options '{"factor": 3}'"""],
    ),
    "another_projectors_file_alone": (
        lambda bases, folder: alone(make_weights(folder, bases, "c_abstractor", {"num_queries": 4})),
        ["weights of c_abstractor", "projector is saep", "--mm_projector_type c_abstractor"],
    ),
    "llavas_mlp": (
        lambda bases, folder: keys_as_in_llava(folder, "mlp3x_gelu"),
        ["weights of mlp3x_gelu", "projector is saep", "--mm_projector_type mlp3x_gelu"],
    ),
    "whole_model_of_another_projector": (
        lambda bases, folder: whole_model(bases, folder, "linear") / "model.safetensors",
        ["linear projector", "projector is saep"],
    ),
    "folder_of_a_whole_model": (
        lambda bases, folder: whole_model(bases, folder, "linear"),
        ["holds a whole model", "--model_name_or_path", "model.safetensors"],
    ),
    "other_options_of_the_same_shapes": (
        lambda bases, folder: make_weights(folder, bases, "saep", {"stride": 3}),
        ["stride is 3 there and 2 here", """--mm_projector_options '{"stride": 3}'"""],
    ),
    "other_options_of_other_shapes": (
        lambda bases, folder: make_weights(folder, bases, "saep", {"kernel_size": 5}),
        ["kernel_size is 5 there and 3 here"],
    ),
    "other_layers": (
        lambda bases, folder: make_weights(folder, bases, "saep", {"vision_layers": [1, 2]}),
        ["vision_layers is [1, 2] there and [2, 3, 4] here"],
    ),
    "other_options_without_a_config": (
        lambda bases, folder: alone(make_weights(folder, bases, "saep", {"kernel_size": 5})),
        ["(24, 1, 5, 5)", "(24, 1, 3, 3)"],
    ),
    "other_widths": (lambda bases, folder: narrower(bases, folder), ["16 channels", "24 and 32"]),
    "other_widths_without_a_config": (
        lambda bases, folder: keys_as_in_llava(folder, "saep", vision_hidden_size=16),
        ["(16, 48)", "(24, 72)"],
    ),
    "nobodys": (
        lambda bases, folder: pickled(folder, {f"blocks.{i}.w": torch.zeros(2) for i in range(5)}),
        ["5 tensors (blocks.0.w, ", "no registered projector"],
    ),
    "empty": (lambda bases, folder: damaged(folder, "mm_projector.bin", b""), ["is empty (0 bytes)"]),
    "empty_safetensors": (lambda bases, folder: damaged(folder, "w.safetensors", b""), ["is empty (0 bytes)"]),
    "text": (lambda bases, folder: damaged(folder, "mm_projector.bin", b"hello"), ["(5 bytes)", "no readable"]),
    "truncated": (
        lambda bases, folder: cut_in_half(keys_as_in_llava(folder, "saep")),
        ["bytes)", "cut off"],
    ),
    "truncated_safetensors": (
        lambda bases, folder: cut_in_half(make_weights(folder, bases, "saep") / "mm_projector.safetensors"),
        ["bytes)", "cut off"],
    ),
    "nested": (
        lambda bases, folder: pickled(folder, {"model": {"weight": torch.zeros(2)}}),
        ["dictionary of tensors"],
    ),
    "code": (lambda bases, folder: pickled(folder, Path("x")), ["no readable weights file"]),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_weights_that_are_not_this_projectors_end_before_models_are_loaded(name, bases, data, tmp_path, refusal):
    write, words = WRONG_WEIGHTS[name]
    path = write(bases, tmp_path / "weights")
    sentence = refusal(training_flags(bases, data, tmp_path / "out", pretrain_mm_mlp_adapter=path))
    assert str(path) in sentence
    assert all(word in sentence for word in words), sentence


def test_weights_of_the_same_projector_in_another_depth_are_named_as_such(bases, data, tmp_path, refusal):
    path = keys_as_in_llava(tmp_path / "weights", "mlp3x_gelu")
    flags = {"mm_projector_type": "mlp2x_gelu", "pretrain_mm_mlp_adapter": path}
    sentence = refusal(training_flags(bases, data, tmp_path / "out", **flags))
    assert "weights of mlp3x_gelu, but this run's projector is mlp" in sentence


@pytest.mark.parametrize("options", [{"init": "trunc_normal"}, {"vision_layers": [2, 3, -1]}])
def test_options_that_mean_the_same_weights_are_no_mistake(options, bases, data, tmp_path, monkeypatch):
    """How a fresh projector would have begun, and another spelling of the same layers."""
    forbid_models(monkeypatch)
    path = make_weights(tmp_path / "weights", bases, "saep")
    flags = {"pretrain_mm_mlp_adapter": path, "mm_projector_options": json.dumps(options)}
    _, model_config = plan_model(parse_arguments(training_flags(bases, data, tmp_path / "out", **flags)))
    assert model_config.projector["name"] == "saep"


# As a user starts it


def test_command_refuses_before_it_launches_ranks(bases, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_command, "run_launcher", lambda *arguments: pytest.fail("ranks were launched"))
    path = make_weights(tmp_path / "weights", bases, "linear")
    argv = training_flags(bases, data, tmp_path / "out", pretrain_mm_mlp_adapter=path)
    assert main(["train", "--num_processes", "2", *argv]) == 2
    assert "llava-saep train: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["options", "weights"])
def test_two_ranks_find_the_mistake_without_meeting_and_say_it_once(kind, bases, data, tmp_path):
    if kind == "options":
        flags = {"mm_projector_type": "pixel_shuffle", "mm_projector_options": "factor=4"}
    else:
        flags = {"pretrain_mm_mlp_adapter": make_weights(tmp_path / "weights", bases, "linear")}
    argv = training_flags(bases, data, tmp_path / "out", deepspeed=deepspeed_json(3), **flags)
    results = run_ranks(train_without_models, argv, world_size=2, output_dir=tmp_path / "ranks")
    output = "".join(result.output for result in results)
    assert [result.exit_code for result in results] == [2, 2], output[-4000:]
    assert output.count("error: ") == 1
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_deepspeed_launcher_ends_with_one_sentence_and_no_rank_waits(bases, data, tmp_path):
    path = make_weights(tmp_path / "weights", bases, "linear")
    argv = training_flags(bases, data, tmp_path / "out", pretrain_mm_mlp_adapter=path, deepspeed=deepspeed_json(3))
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    launcher += ["--master_port", str(train_command.free_port())]
    done = subprocess.run(
        [*launcher, str(train_command.TRAINING_SCRIPT), *argv],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "linear projector" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
