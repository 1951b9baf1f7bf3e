"""LLaVA's flags keep their names, defaults and abbreviations, and its scripts mean here what they mean there."""

import dataclasses
import re
from pathlib import Path

import pytest
import transformers

from llava_saep import flags
from llava_saep.arguments import parse_arguments
from llava_saep.flags import DataArguments, ModelArguments, TrainingArguments
from llava_saep.model.quantization import QuantizationConfig
from llava_saep.train.config import LoraConfig
from llava_saep.train.deepspeed_config import read_deepspeed_config
from tests.fixtures.llava_scripts import LLAVA_SCRIPTS, argument_list

# The three dataclasses of llava/train/train.py.
LLAVA_DEFAULTS = {
    ModelArguments: {
        "model_name_or_path": "facebook/opt-125m",
        "version": "v0",
        "freeze_backbone": False,
        "tune_mm_mlp_adapter": False,
        "vision_tower": None,
        "mm_vision_select_layer": -1,
        "pretrain_mm_mlp_adapter": None,
        "mm_projector_type": "linear",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": True,
        "mm_patch_merge_type": "flat",
        "mm_vision_select_feature": "patch",
    },
    DataArguments: {
        "data_path": None,
        "lazy_preprocess": False,
        "is_multimodal": False,
        "image_folder": None,
        "image_aspect_ratio": "square",
    },
    TrainingArguments: {
        "cache_dir": None,
        "optim": "adamw_torch",
        "remove_unused_columns": False,
        "freeze_mm_mlp_adapter": False,
        "mpt_attn_impl": "triton",
        "model_max_length": 512,
        "double_quant": True,
        "quant_type": "nf4",
        "bits": 16,
        "lora_enable": False,
        "lora_r": 64,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "lora_weight_path": "",
        "lora_bias": "none",
        "mm_projector_lr": None,
        "group_by_modality_length": False,
    },
}
OTHER_DEFAULTS = {
    "model_name_or_path": None,  # no language model is trained that was not named
    "mm_vision_select_layer": None,  # the projector's own choice: -2 where it reads one layer
    "mm_use_im_start_end": None,  # off, or as a saved model has it
    "mm_projector_type": None,  # linear, or the projector of a saved model
    "mm_patch_merge_type": None,  # flat, or as a saved model has it
}
LLAVA_FLAGS = [name for defaults in LLAVA_DEFAULTS.values() for name in defaults]


@pytest.mark.parametrize("kind", LLAVA_DEFAULTS, ids=lambda kind: kind.__name__)
def test_flags_have_llavas_names_and_defaults(kind):
    ours = {f.name: f.default for f in dataclasses.fields(kind)}
    theirs = LLAVA_DEFAULTS[kind]
    assert theirs.keys() <= ours.keys()
    different = {name: ours[name] for name, default in theirs.items() if ours[name] != default}
    assert different == {name: default for name, default in OTHER_DEFAULTS.items() if name in theirs}


def shortest_abbreviation(flag):
    """The shortest beginning of a flag that no other flag of LLaVA's or transformers' has."""
    others = {f.name for f in dataclasses.fields(transformers.TrainingArguments)} | set(LLAVA_FLAGS)
    others.discard(flag)
    lengths = (n for n in range(1, len(flag) + 1) if not any(other.startswith(flag[:n]) for other in others))
    return flag[: next(lengths, len(flag))]


def test_no_flag_of_llava_counts_as_one_that_was_added():
    assert set(LLAVA_FLAGS) == flags.LLAVA_FLAGS


@pytest.mark.parametrize("flag", LLAVA_FLAGS)
def test_what_abbreviates_a_flag_of_llava_does_so_here(flag, parsed_flags):
    """argparse takes any unambiguous beginning of a flag; a flag that is added here must not make one ambiguous."""
    value = {"mm_vision_select_layer": "3", "mm_projector_lr": "1e-3", "lora_bias": "all", "quant_type": "fp4"}.get(
        flag
    )
    value = "8" if flag == "bits" else value
    default = {**LLAVA_DEFAULTS[ModelArguments], **LLAVA_DEFAULTS[DataArguments], **LLAVA_DEFAULTS[TrainingArguments]}
    if value is None:
        kind = type(default[flag])
        value = {bool: str(not default[flag]), int: "7", float: "0.5"}.get(kind, "cls_patch")
    assert parsed_flags(f"--{shortest_abbreviation(flag)}", value)[flag] not in (
        default[flag],
        OTHER_DEFAULTS.get(flag),
    )


@pytest.mark.parametrize(
    ("given", "name", "value"), [("--evaluation_s=no", "eval_strategy", "no"), ("--warmup_r", "warmup_steps", 0.1)]
)
def test_abbreviation_of_a_flag_that_transformers_removed_is_translated(given, name, value, caplog):
    argv = argument_list(LLAVA_SCRIPTS["finetune.sh"])
    for flag in ("--evaluation_strategy", "--warmup_ratio"):
        del argv[argv.index(flag) : argv.index(flag) + 2]
    config = parse_arguments([*argv, *([given] if "=" in given else [given, "0.1"])])
    assert f"--{name} {value}" in caplog.text
    assert config.training.trainer_arguments.get(name, "no") == value


@pytest.fixture
def parsed_flags():
    from llava_saep.arguments import _parse_namespace

    return lambda *argv: vars(_parse_namespace(argv))


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What LLaVA does with a script's flags."""

    trainable: set
    learning_rate: float
    zero_stage: int
    batch_size: int = 16
    epochs: float = 1
    template: str = "v1"
    projector: tuple = ("mlp", 2)
    aspect_ratio: str = "pad"
    groups_by_modality: bool = True
    lora: LoraConfig | None = None
    projector_learning_rate: float | None = None


LORA_V1_5 = LoraConfig(rank=128, alpha=256, dropout=0.05, bias="none")
FULL, ADAPTERS, STAGE_1 = {"projector", "language_model"}, {"projector", "lora"}, {"projector"}
OLDER = {"projector": ("linear", None), "aspect_ratio": "square", "groups_by_modality": False}
MEANINGS = {
    "v1_5/pretrain.sh": Meaning(STAGE_1, 1e-3, 2, 32, 1, "plain", aspect_ratio="square", groups_by_modality=False),
    "v1_5/finetune.sh": Meaning(FULL, 2e-5, 3),
    "v1_5/finetune_lora.sh": Meaning(ADAPTERS, 2e-4, 3, lora=LORA_V1_5, projector_learning_rate=2e-5),
    "v1_5/finetune_task.sh": Meaning(FULL, 2e-5, 3),
    "v1_5/finetune_task_lora.sh": Meaning(ADAPTERS, 2e-4, 3, lora=LORA_V1_5, projector_learning_rate=2e-5),
    "pretrain.sh": Meaning(STAGE_1, 2e-3, 2, template="v0_plain", **OLDER),
    "finetune.sh": Meaning(FULL, 2e-5, 2, **OLDER),
    "finetune_full_schedule.sh": Meaning(FULL, 2e-5, 2, epochs=3, **OLDER),
    "finetune_lora.sh": Meaning(ADAPTERS, 2e-5, 2, lora=LoraConfig(rank=64, alpha=16, dropout=0.05), **OLDER),
    "finetune_sqa.sh": Meaning(FULL, 2e-5, 2, epochs=12, **OLDER),
}


@pytest.mark.parametrize("script", MEANINGS)
def test_script_means_what_it_means_in_llava(script):
    config = parse_arguments(argument_list(LLAVA_SCRIPTS[script]))
    arguments = config.training.trainer_arguments
    options = config.model.projector.options
    assert MEANINGS[script] == Meaning(
        trainable=set(config.training.trainable),
        learning_rate=arguments["learning_rate"],
        zero_stage=read_deepspeed_config(arguments["deepspeed"])["zero_optimization"]["stage"],
        batch_size=arguments["per_device_train_batch_size"],
        epochs=arguments.get("num_train_epochs", 3.0),  # transformers' default
        template=config.data.conversation_template,
        projector=(config.model.projector.name, options.get("depth")),
        aspect_ratio=config.data.image_aspect_ratio,
        groups_by_modality=config.training.group_by_modality_length,
        lora=config.training.lora,
        projector_learning_rate=config.training.projector_learning_rate,
    )


def test_qlora_script_means_what_the_lora_script_means_on_four_bits(monkeypatch):
    monkeypatch.setattr("llava_saep.arguments.require_bitsandbytes", lambda asked: None)
    lora, qlora = (parse_arguments(argument_list(LLAVA_SCRIPTS[f"finetune_{kind}.sh"])) for kind in ("lora", "qlora"))
    four_bits = QuantizationConfig(bits=4, quant_type="nf4", double_quant=True)
    assert qlora == dataclasses.replace(lora, model=dataclasses.replace(lora.model, quantization=four_bits))


@pytest.mark.parametrize("script", MEANINGS)
def test_script_keeps_what_all_of_llavas_scripts_say(script):
    flags = LLAVA_SCRIPTS[script]
    config = parse_arguments(argument_list(flags))
    assert (config.model.language_model, config.model.vision_tower, config.model.projector_weights) == (
        flags["model_name_or_path"],
        flags["vision_tower"],
        flags.get("pretrain_mm_mlp_adapter"),
    )
    assert (config.data.data_path, config.data.image_folder) == (flags["data_path"], flags["image_folder"])
    assert list(config.model.projector.options["vision_layers"]) == [-2]
    assert config.data.max_length == 2048
    assert (config.training.output_dir, config.training.save_total_limit) == (flags["output_dir"], 1)
    arguments = config.training.trainer_arguments
    said = {
        "bf16": True,
        "tf32": True,
        "save_steps": int(flags["save_steps"]),
        "warmup_steps": 0.03,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "activation_checkpointing": True,
        "dataloader_num_workers": 4,
        "report_to": "wandb",
        "optim": "adamw_torch",
        "per_device_eval_batch_size": 4,
    }
    assert {name: arguments[name] for name in said} == said
    # What a script leaves at the default: one step per batch, no decay, batch-wise saving, no evaluation.
    made = transformers.TrainingArguments(output_dir="out", use_cpu=True, report_to="none")
    defaults = {"gradient_accumulation_steps": 1, "weight_decay": 0.0, "save_strategy": "steps", "eval_strategy": "no"}
    assert {name: getattr(made, name) for name in defaults} == defaults
    assert not defaults.keys() & arguments.keys()
    assert "save_total_limit" not in arguments  # applied only after a checkpoint is known to be complete


def test_documentation_names_every_flag_of_llava():
    page = (Path(__file__).parents[2] / "docs" / "coming_from_llava.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`--([\w-]+)", page))
    unchanged = {"remove_unused_columns"}  # transformers' own, whose only value here is LLaVA's
    assert set(LLAVA_FLAGS) - named == unchanged


def test_hub_models_are_kept_where_the_flag_says(tmp_path):
    flags = LLAVA_SCRIPTS["finetune.sh"] | {"cache_dir": str(tmp_path)}
    assert parse_arguments(argument_list(flags)).model.hub_cache == str(tmp_path)
