"""What a run checks before anything slow or lasting: its files, DeepSpeed's settings against the flags."""

import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from llava_saep.arguments import parse_arguments
from llava_saep.errors import UserError
from llava_saep.train.deepspeed_config import check_deepspeed_agrees, complete_deepspeed_config
from llava_saep.train.run import check_paths, compute_dtype, weights_dtype


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "data.json").write_text("[]")
    for name in ("lm", "tower"):
        (tmp_path / name).mkdir()
    return [
        *("--model_name_or_path", str(tmp_path / "lm"), "--vision_tower", str(tmp_path / "tower")),
        *("--data_path", str(tmp_path / "data.json"), "--output_dir", str(tmp_path / "out"), "--use_cpu", "True"),
    ]


@pytest.mark.parametrize("flag", ["model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter"])
def test_trained_model_does_not_replace_what_the_run_starts_from(flags, flag, tmp_path):
    folder = tmp_path / "lm"
    (folder / "mm_projector.safetensors").touch()
    with pytest.raises(UserError, match=f"holds what --{flag} starts from"):
        given = folder / "mm_projector.bin" if flag == "pretrain_mm_mlp_adapter" else folder
        other = ["--model_name_or_path", str(tmp_path / "tower"), f"--{flag}", str(given)]
        check_paths(parse_arguments([*flags, *other, "--output_dir", f"{folder}/../lm"]))


def test_output_beside_the_inputs_is_fine(flags):
    check_paths(parse_arguments(flags))


@pytest.mark.parametrize(
    ("flags", "multiplies_in", "keeps"),
    [
        ({"bf16": True}, torch.bfloat16, torch.float32),
        ({"bf16": True, "deepspeed": "zero2.json"}, torch.bfloat16, torch.bfloat16),
        ({"fp16": True}, torch.float16, torch.float32),
        ({"deepspeed": "zero2.json"}, torch.float32, torch.float32),
    ],
)
def test_layers_multiply_in_the_dtype_of_the_flags_and_weights_have_it_under_deepspeed(flags, multiplies_in, keeps):
    """Without DeepSpeed autocast does it, for which the weights stay in float32."""
    arguments = SimpleNamespace(**{"bf16": False, "fp16": False, "deepspeed": None, **flags})
    assert (compute_dtype(arguments), weights_dtype(arguments)) == (multiplies_in, keeps)


# DeepSpeed's settings


@pytest.mark.parametrize(("stage", "is_refused"), [(1, False), (2, False), (3, True)])
def test_zero3_is_refused_for_a_quantised_language_model_before_anything_is_loaded(
    stage, is_refused, flags, monkeypatch
):
    monkeypatch.setattr("llava_saep.arguments.require_bitsandbytes", lambda asked: None)
    flags += ["--lora_enable", "True", "--deepspeed", f"deepspeed_configs/zero{stage}.json"]
    check_paths(parse_arguments(flags))
    config = parse_arguments([*flags, "--bits", "4"])
    if is_refused:
        with pytest.raises(UserError, match=r"--bits 4 does not work under ZeRO-3 .* use deepspeed_configs/zero2.json"):
            check_paths(config)
    else:
        check_paths(config)


def test_zero3_always_gathers_the_weights_that_it_saves(caplog):
    """Without it DeepSpeed writes shards that no `from_pretrained` reads, and transformers only warns."""
    given = {"zero_optimization": {"stage": 3, "overlap_comm": True}}
    with caplog.at_level(logging.WARNING, "llava_saep"):
        completed = complete_deepspeed_config(given)
    zero = {"stage": 3, "overlap_comm": True, "stage3_gather_16bit_weights_on_model_save": True}
    assert completed == {"zero_optimization": zero}
    assert "stage3_gather_16bit_weights_on_model_save is set to true" in caplog.text


@pytest.mark.parametrize(
    "zero", [{"stage": 2}, {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}], ids=["zero2", "zero3"]
)
def test_other_settings_stay_as_they_are(zero, caplog):
    with caplog.at_level(logging.WARNING, "llava_saep"):
        assert complete_deepspeed_config({"zero_optimization": zero}) == {"zero_optimization": zero}
    assert complete_deepspeed_config({"fp16": {"enabled": False}}) == {"fp16": {"enabled": False}}
    assert not caplog.records


def joined(tmp_path, **settings):
    """Settings and flags after transformers has compared them, as TrainingArguments leaves them."""
    arguments = transformers.TrainingArguments(str(tmp_path / "out"), use_cpu=True, per_device_train_batch_size=2)
    config = HfTrainerDeepSpeedConfig({"zero_optimization": {"stage": 2}, **settings})
    config.trainer_config_process(arguments)
    return SimpleNamespace(deepspeed=config.config, hf_deepspeed_config=config)


def test_settings_that_contradict_a_flag_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="train_micro_batch_size_per_gpu=7 against --per_device_train_batch_size=2"):
        check_deepspeed_agrees(joined(tmp_path, train_micro_batch_size_per_gpu=7))


@pytest.mark.parametrize("batch_size", [2, "auto"])
def test_settings_that_agree_with_the_flags_are_taken(tmp_path, batch_size):
    check_deepspeed_agrees(joined(tmp_path, train_micro_batch_size_per_gpu=batch_size))


def test_run_without_deepspeed_has_no_settings_to_compare(tmp_path):
    check_deepspeed_agrees(transformers.TrainingArguments(str(tmp_path / "out"), use_cpu=True))
