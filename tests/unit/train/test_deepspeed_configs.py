"""The shipped DeepSpeed files say what their names say, and leave to the command line what belongs there."""

import json
from pathlib import Path

import pytest

from llava_saep.errors import UserError
from llava_saep.train.deepspeed_config import find_deepspeed_config, read_deepspeed_config

FOLDER = Path(__file__).resolve().parents[3] / "deepspeed_configs"
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero2_offload": 2, "zero3_offload": 3}


def read(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def test_every_file_is_listed_here():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(STAGES)


@pytest.mark.parametrize(("name", "stage"), STAGES.items())
def test_name_says_stage_and_offload(name, stage):
    zero = read(name)["zero_optimization"]
    assert zero["stage"] == stage
    assert ("offload_optimizer" in zero) == name.endswith("_offload")
    assert ("offload_param" in zero) == (name == "zero3_offload")  # only stage 3 can offload parameters


@pytest.mark.parametrize("name", STAGES)
def test_batch_precision_and_clipping_come_from_the_flags(name):
    config = read(name)
    for key in ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"):
        assert config[key] == "auto"
    assert config["gradient_clipping"] == config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"


@pytest.mark.parametrize("name", STAGES)
def test_no_file_names_an_optimizer(name):
    """DeepSpeed would compile FusedAdam for it, for minutes; the Trainer brings the optimizer."""
    assert not {"optimizer", "scheduler"} & read(name).keys()


@pytest.mark.parametrize("name", ["zero3", "zero3_offload"])
def test_zero3_gathers_weights_when_it_saves(name):
    assert read(name)["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


def test_llavas_path_finds_our_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_deepspeed_config("./scripts/zero3_offload.json") == FOLDER / "zero3_offload.json"


def test_unknown_file_is_named():
    with pytest.raises(UserError, match="zero9.json: no such file"):
        find_deepspeed_config("scripts/zero9.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", r"holds \[\]"),
        ("{}", r"holds \{\}"),
        ("", "not valid JSON"),
        ('"zero2"', "holds"),
    ],
)
def test_file_that_holds_no_settings_is_named(tmp_path, text, message):
    """transformers takes an empty value for no --deepspeed at all."""
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(UserError, match=rf"mine.json: {message}"):
        read_deepspeed_config(str(tmp_path / "mine.json"))


@pytest.mark.parametrize(("text", "message"), [("{bad", "not valid JSON"), ("{}", "expected a JSON object")])
def test_settings_on_the_command_line_are_checked_alike(text, message):
    with pytest.raises(UserError, match=message):
        read_deepspeed_config(text)


def test_settings_are_read_from_file_or_command_line():
    assert read_deepspeed_config(str(FOLDER / "zero2.json")) == read("zero2")
    assert read_deepspeed_config(json.dumps(read("zero2"))) == read("zero2")
