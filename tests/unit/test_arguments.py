"""The command line: flags of LLaVA's and ours, and mistakes that end in one clear message."""

import importlib.util
import logging
from pathlib import Path

import pytest

from llava_saep import arguments
from llava_saep.arguments import parse_arguments, translate_removed_flags
from llava_saep.data.templates import TEMPLATE_NAMES
from llava_saep.errors import UserError
from llava_saep.flags import own_flags
from llava_saep.model.quantization import QuantizationConfig
from projectors import ProjectorError, registered_projectors
from tests.fixtures.llava_scripts import LLAVA_SCRIPTS, argument_list

REQUIRED = "--model_name_or_path lm --vision_tower tower --data_path data.json --output_dir out".split()


@pytest.fixture
def bitsandbytes_is_there(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *rest: n == "bitsandbytes" or find_spec(n, *rest))


def test_quantisation_is_what_the_flags_say(bitsandbytes_is_there):
    assert parse_arguments([*REQUIRED, "--lora_enable", "True"]).model.quantization is None
    flags = [*REQUIRED, *"--tune_mm_mlp_adapter True --bits 4 --quant_type fp4 --double_quant False".split()]
    fp4 = QuantizationConfig(bits=4, quant_type="fp4", double_quant=False)
    assert parse_arguments(flags).model.quantization == fp4
    assert parse_arguments([*flags, "--mm_use_im_start_end", "True"]).model.quantization == fp4  # learns an embedding


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "can then not be trained; add --lora_enable"),
        ("--freeze_backbone True --unfreeze_mm_vision_tower True", "not be saved with the tower .*; add --lora_enable"),
        ("--lora_enable True --lora_bias all", "--lora_bias all with --bits 8: .* use --lora_bias none"),
    ],
)
def test_training_rounded_weights_is_refused(flags, message, bitsandbytes_is_there):
    with pytest.raises(UserError, match=message):
        parse_arguments([*REQUIRED, "--bits", "8", *flags.split()])


def test_what_is_for_four_bits_is_said_to_have_no_effect_on_others(bitsandbytes_is_there, caplog):
    with caplog.at_level(logging.WARNING, "llava_saep"):
        parse_arguments([*REQUIRED, *"--bits 8 --lora_enable True --quant_type fp4".split()])
    assert "--quant_type and --double_quant (for --bits 4)" in caplog.text


def test_own_flags_change_only_on_purpose():
    """A frozen list: people's scripts depend on these names, so a new or missing one is a visible decision."""
    assert " ".join(own_flags()) == (
        "apply_exif_orientation attn_implementation bits cache_dir cache_vision_features data_path double_quant "
        "eval_data_path eval_image_folder freeze_backbone freeze_mm_mlp_adapter group_by_modality_length "
        "image_aspect_ratio image_folder image_grid_pinpoints is_multimodal jpeg_draft lazy_preprocess lora_alpha "
        "lora_bias lora_dropout lora_enable lora_r lora_weight_path mm_patch_merge_type mm_projector_lr "
        "mm_projector_options mm_projector_type mm_use_im_patch_token mm_use_im_start_end mm_vision_select_feature "
        "mm_vision_select_layer model_max_length model_name_or_path mpt_attn_impl on_bad_image on_bad_sample "
        "on_nan_loss on_too_long optim packing precheck_images pretrain_mm_mlp_adapter quant_type "
        "remove_unused_columns report_to resume stage trust_projector_code tune_mm_mlp_adapter "
        "unfreeze_mm_vision_tower version vision_tower"
    )


def test_help_lists_every_registered_projector(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in registered_projectors())


def test_every_flag_of_llava_parses():
    """The three dataclasses of llava/train/train.py, each flag with LLaVA's default or a harmless value."""
    llava = """
        --version v0 --freeze_backbone False --tune_mm_mlp_adapter False --mm_vision_select_layer -1
        --mm_projector_type linear --mm_use_im_start_end False --mm_use_im_patch_token True --mm_patch_merge_type flat
        --mm_vision_select_feature patch --lazy_preprocess False --is_multimodal False --image_folder images
        --image_aspect_ratio square --cache_dir cache --optim adamw_torch --remove_unused_columns False
        --freeze_mm_mlp_adapter False --mpt_attn_impl triton --model_max_length 512 --double_quant True --quant_type nf4
        --bits 16 --lora_enable False --lora_r 64 --lora_alpha 16 --lora_dropout 0.05 --lora_bias none
        --mm_projector_lr 1e-4 --group_by_modality_length False
    """.split()
    config = parse_arguments([*REQUIRED, *llava, "--lora_weight_path", ""])
    assert list(config.model.projector.options["vision_layers"]) == [-1]
    assert config.data.conversation_template == "v1"  # LLaVA's v0 trains with the v1 template


@pytest.mark.parametrize("version", [*TEMPLATE_NAMES, "v0.5", "chat_template"])
def test_version_names_every_template_of_llava(version):
    template = parse_arguments([*REQUIRED, "--version", version]).data.conversation_template
    assert template == {"v0": "v1", "v0.5": "v1"}.get(version, version)


def test_removed_flags_are_translated_with_one_warning_that_lists_all(caplog):
    removed = (
        "--evaluation_strategy no --warmup_ratio=0.1 --group_by_length True --no_cuda True --save_safetensors True"
    )
    with caplog.at_level(logging.WARNING, "llava_saep"):
        config = parse_arguments([*REQUIRED, *removed.split()])
    warnings = [record.getMessage() for record in caplog.records if "translated" in record.getMessage()]
    assert len(warnings) == 1
    for note in (
        "--evaluation_strategy no -> --eval_strategy no",
        "--warmup_ratio 0.1 -> --warmup_steps 0.1",
        "--group_by_length True -> --train_sampling_strategy group_by_length",
        "--no_cuda True -> --use_cpu True",
        "--save_safetensors True is ignored",
    ):
        assert note in warnings[0]
    arguments = config.training.trainer_arguments
    assert arguments["warmup_steps"] == 0.1
    assert arguments["use_cpu"] is True
    assert arguments["train_sampling_strategy"] == "group_by_length"


def test_todays_flags_need_no_translation(caplog):
    with caplog.at_level(logging.WARNING, "llava_saep"):
        parse_arguments([*REQUIRED, "--eval_strategy", "no", "--warmup_steps", "3"])
    assert not caplog.records


def test_translation_leaves_other_arguments_alone():
    argv = ["--output_dir", "--odd-name", "--bf16", "--mm_vision_select_layer", "-2"]
    assert translate_removed_flags(argv) == (argv, [])


@pytest.mark.parametrize(("value", "resume"), [("True", "auto"), ("False", "never"), ("runs/checkpoint-3", None)])
def test_transformers_resume_flag_means_ours(value, resume):
    config = parse_arguments([*REQUIRED, "--resume_from_checkpoint", value])
    assert config.training.resume == (resume or value)


@pytest.mark.parametrize("grouping", ["--group_by_modality_length True", "--group_by_length True"])
def test_grouping_gives_way_to_packing_with_one_warning(grouping, caplog):
    """LLaVA's scripts group; rows are full already."""
    with caplog.at_level(logging.WARNING, "llava_saep"):
        config = parse_arguments([*REQUIRED, "--packing", "True", *grouping.split()])
    assert config.data.packing
    assert not config.training.group_by_modality_length
    assert "train_sampling_strategy" not in config.training.trainer_arguments
    assert sum("(--packing True fills rows by length already)" in record.message for record in caplog.records) == 1


def test_order_of_packed_rows_can_be_fixed():
    config = parse_arguments([*REQUIRED, "--packing", "True", "--train_sampling_strategy", "sequential"])
    assert config.training.trainer_arguments["train_sampling_strategy"] == "sequential"


# Layers and options of the projector


@pytest.fixture(autouse=True)
def nothing_has_been_warned_of():
    arguments._warn_layer_not_applied.cache_clear()


def projector_options(*flags):
    return dict(parse_arguments([*REQUIRED, *flags]).model.projector.options)


def test_single_layer_is_not_applied_to_a_projector_of_several_layers(caplog):
    with caplog.at_level(logging.WARNING, "llava_saep"):
        options = projector_options("--mm_projector_type", "saep", "--mm_vision_select_layer", "-2")
    assert "vision_layers" not in options
    assert sum("is not applied" in record.getMessage() for record in caplog.records) == 1


def test_what_is_not_applied_is_said_once_however_often_the_flags_are_read(caplog):
    flags = ["--mm_projector_type", "saep", "--mm_vision_select_layer", "-3"]
    with caplog.at_level(logging.WARNING, "llava_saep"):
        for _ in range(2):  # as `llava-saep train` with one process does: to check the flags, then to train
            projector_options(*flags)
    assert sum("is not applied" in record.getMessage() for record in caplog.records) == 1


def test_single_layer_is_applied_to_a_projector_of_one_layer(caplog):
    with caplog.at_level(logging.WARNING, "llava_saep"):
        options = projector_options("--mm_projector_type", "linear", "--mm_vision_select_layer", "-3")
    assert list(options["vision_layers"]) == [-3]
    assert not caplog.records


def test_a_preset_that_names_its_layer_ignores_the_scripts_single_one(caplog):
    with caplog.at_level(logging.WARNING, "llava_saep"):
        options = projector_options("--mm_projector_type", "saep_single_layer", "--mm_vision_select_layer", "-1")
    assert list(options["vision_layers"]) == [-2]
    assert not caplog.records
    with pytest.raises(ProjectorError, match="saep_single_layer"):
        projector_options("--mm_projector_type", "saep_single_layer", "--mm_vision_select_layer", "3", "6")


def test_dense_connector_reads_the_layers_of_its_kind(caplog):
    flags = ["--mm_projector_type", "dense_connector_sci", "--mm_vision_select_layer", "-2"]
    with caplog.at_level(logging.WARNING, "llava_saep"):
        assert "vision_layers" not in projector_options(*flags)
    assert "is not applied" in caplog.text


def test_several_layers_are_applied():
    options = projector_options("--mm_projector_type", "saep", "--mm_vision_select_layer", "3", "6", "9")
    assert list(options["vision_layers"]) == [3, 6, 9]


def test_layers_among_the_options_win(caplog):
    flags = ["--mm_projector_type", "saep", "--mm_vision_select_layer", "-2"]
    with caplog.at_level(logging.WARNING, "llava_saep"):
        options = projector_options(*flags, "--mm_projector_options", '{"vision_layers": [4, 8]}')
    assert list(options["vision_layers"]) == [4, 8]
    assert not caplog.records


@pytest.mark.parametrize("text", ['{"stride": 3}', "stride=3", "stride=3,vision_layers=[4, 8]"])
def test_projector_options_come_as_json_or_pairs(text):
    assert projector_options("--mm_projector_type", "saep", "--mm_projector_options", text)["stride"] == 3


def test_class_token_is_kept_where_the_flag_says_so():
    assert projector_options("--mm_projector_type", "linear", "--mm_vision_select_feature", "cls_patch") == {
        "keep_cls_token": True
    }


def test_no_projector_flag_keeps_the_one_of_a_saved_model():
    assert parse_arguments(REQUIRED).model.keeps_saved_projector
    assert not parse_arguments([*REQUIRED, "--mm_projector_type", "saep"]).model.keeps_saved_projector


# Mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tune_mm_mlp_adapter True --freeze_mm_mlp_adapter True", "contradicts --freeze_mm_mlp_adapter"),
        ("--tune_mm_mlp_adapter True --lora_enable True", "contradicts --lora_enable"),
        ("--freeze_backbone True --freeze_mm_mlp_adapter True", "nothing to train"),
        ("--freeze_mm_mlp_adapter True --mm_projector_lr 1e-3", "keeps the projector"),
        ("--image_aspect_ratio wide", "expected square, pad, anyres"),
        ("--mm_patch_merge_type spatial_unpad", "use --image_aspect_ratio anyres with it"),
        ("--image_aspect_ratio anyres --mm_patch_merge_type unpad", "expected flat, spatial, spatial_unpad"),
        ("--image_aspect_ratio anyres --image_grid_pinpoints 336", "expected pairs of width and height"),
        ("--bits 4 --lora_enable True", "--bits 4: bitsandbytes is not installed"),
        ("--bits 5", "invalid choice"),
        ("--bits 4 --quant_type nf5", "invalid choice"),
        ("--cache_vision_features cache --unfreeze_mm_vision_tower True", "changes the tower; drop one"),
        ("--jpeg_draft True --image_aspect_ratio anyres", "--jpeg_draft True: .*use square or pad"),
        ("--version vicuna", "--version: unknown conversation template 'vicuna'.*; say --version v1 for that"),
        ("--eval_strategy steps", "--eval_data_path is missing"),
        ("--warmup_ratio 0.03 --warmup_steps 10", "old name of --warmup_steps"),
        ("--bf16 True --fp16 True", "choose one"),
        ("--fsdp full_shard", "use --deepspeed"),
        ("--label_smoothing_factor 0.1", "use 0"),
        ("--group_by_modality_length True --train_sampling_strategy sequential", "contradicts"),
        ("--mm_projecter_type saep", "Did you mean --mm_projector_type"),
        ("--lora_enable maybe", "maybe"),
        ("--on_bad_sample ignore", "invalid choice"),
        ("stray", "belongs to no flag"),
    ],
)
def test_mistake_ends_in_one_message(flags, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        parse_arguments([*REQUIRED, *flags.split()])


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("learning_rate", "-1", "0 or more"),
        ("learning_rate", "nan", "0 or more"),
        ("learning_rate", "inf", "0 or more"),
        ("mm_projector_lr", "-0.001", "0 or more"),
        ("weight_decay", "-0.1", "0 or more"),
        ("warmup_ratio", "-0.1", "0 or more"),
        ("dataloader_num_workers", "-1", "0 or more"),
        ("adam_epsilon", "-0.001", "0 or more"),
        ("adam_beta1", "1", "less than 1"),
        ("adam_beta2", "-0.5", "less than 1"),
        ("per_device_train_batch_size", "0", "at least 1"),
        ("gradient_accumulation_steps", "0", "at least 1"),
        ("model_max_length", "0", "at least 1"),
        ("num_train_epochs", "0", "more than 0"),
        ("lora_r", "0", "at least 1"),
        ("lora_alpha", "-16", "at least 1"),
        ("lora_dropout", "2", "less than 1"),
        ("lora_dropout", "1", "less than 1"),
    ],
)
def test_impossible_number_is_refused_by_its_flag(flag, value, expected):
    name = {"warmup_ratio": "warmup_steps"}.get(flag, flag)
    with pytest.raises(UserError, match=rf"--{name} \S+: expected .*{expected}"):
        parse_arguments([*REQUIRED, "--lora_enable", "True", f"--{flag}", value])


def test_smallest_possible_numbers_are_taken():
    flags = "--learning_rate 0 --mm_projector_lr 0 --lora_r 1 --lora_dropout 0 --gradient_accumulation_steps 1"
    assert parse_arguments([*REQUIRED, "--lora_enable", "True", *flags.split()]).training.lora.rank == 1


def test_unknown_attention_is_named_with_those_that_exist():
    with pytest.raises(UserError, match="--attn_implementation foo: expected one of segments, eager, sdpa, "):
        parse_arguments([*REQUIRED, "--attn_implementation", "foo"])


@pytest.mark.parametrize("version", [2, 3, 4])
def test_flash_attention_needs_its_package_or_the_hubs_kernels(version, monkeypatch):
    flags = [*REQUIRED, "--attn_implementation", f"flash_attention_{version}"]
    available = f"transformers.utils.is_flash_attn_{version}_available"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(available, lambda: False)
    with pytest.raises(UserError, match=f"flash_attention_{version}: its package is not installed"):
        parse_arguments(flags)
    monkeypatch.setattr(available, lambda: True)
    assert parse_arguments(flags).model.attn_implementation == f"flash_attention_{version}"
    monkeypatch.setattr(available, lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "kernels" else None)
    assert parse_arguments(flags).model.attn_implementation == f"flash_attention_{version}"


@pytest.mark.parametrize("name", ["segments", "eager", "sdpa", "flex_attention", "kernels-community/flash-attn"])
def test_attention_that_needs_no_package_is_taken(name):
    assert parse_arguments([*REQUIRED, "--attn_implementation", name]).model.attn_implementation == name


@pytest.mark.parametrize("missing", ["model_name_or_path", "data_path", "output_dir"])
def test_missing_flag_is_named(missing):
    at = REQUIRED.index(f"--{missing}")
    with pytest.raises(UserError, match=f"--{missing} is missing"):
        parse_arguments(REQUIRED[:at] + REQUIRED[at + 2 :])


def test_unknown_projector_is_named_with_the_nearest():
    with pytest.raises(ProjectorError, match="saep"):
        parse_arguments([*REQUIRED, "--mm_projector_type", "sape"])


def test_unknown_projector_option_is_named():
    with pytest.raises(ProjectorError, match="stried"):
        parse_arguments([*REQUIRED, "--mm_projector_type", "saep", "--mm_projector_options", "stried=3"])


# Stage presets

STAGES = {"pretrain": "v1_5/pretrain.sh", "finetune": "v1_5/finetune.sh", "lora": "v1_5/finetune_lora.sh"}
NOT_OF_THE_RECIPE = {
    "per_device_eval_batch_size",  # without evaluation
    "report_to",
    "save_steps",  # LLaVA's 24,000 and 50,000 lose a run that is killed before
}


def without_paths(config):
    training = dict(config.training.trainer_arguments)
    training["deepspeed"] = Path(training["deepspeed"]).name
    return {name: value for name, value in training.items() if name not in NOT_OF_THE_RECIPE}


@pytest.mark.parametrize("stage", STAGES)
def test_stage_sets_what_llavas_published_script_sets(stage):
    script = parse_arguments(argument_list(LLAVA_SCRIPTS[STAGES[stage]]))
    preset = parse_arguments([*REQUIRED, "--image_folder", "images", "--stage", stage])
    assert without_paths(preset) == without_paths(script)
    for name in ("trainable", "lora", "projector_learning_rate", "group_by_modality_length", "save_total_limit"):
        assert getattr(preset.training, name) == getattr(script.training, name)
    for name in ("conversation_template", "max_length", "image_aspect_ratio"):
        assert getattr(preset.data, name) == getattr(script.data, name)
    named = parse_arguments([*REQUIRED[:2], *REQUIRED[4:], "--stage", stage]).model
    assert named.tower_for_language_model == script.model.vision_tower
    assert named.projector.build_config(
        vision_hidden_size=8, text_hidden_size=8, num_vision_layers=4
    ) == script.model.projector.build_config(vision_hidden_size=8, text_hidden_size=8, num_vision_layers=4)


@pytest.mark.parametrize("stands_before", [True, False])
def test_a_flag_overrides_the_stage_wherever_it_stands(stands_before):
    own, stage = ["--learning_rate", "3e-4", "--bf16", "False", "--mm_projector_type", "saep"], ["--stage", "pretrain"]
    config = parse_arguments([*REQUIRED, *(own + stage if stands_before else stage + own)])
    assert config.training.trainer_arguments["learning_rate"] == 3e-4
    assert "bf16" not in config.training.trainer_arguments
    assert config.model.projector.name == "saep"
    assert set(config.training.preset.overridden) >= {"learning_rate", "bf16", "mm_projector_type"}
    assert "learning_rate" not in config.training.preset.values


@pytest.mark.parametrize(
    ("stage", "own"),
    [
        ("finetune", "--group_by_length True"),
        ("lora", "--freeze_mm_mlp_adapter True"),
        ("pretrain", "--lora_enable True"),
        ("finetune", "--fp16 True"),
        ("finetune", "--tune_mm_mlp_adapter True"),
        ("lora", "--tune_mm_mlp_adapter True"),
    ],
)
def test_a_stage_gives_way_to_flags_that_exclude_its_own(stage, own):
    parse_arguments([*REQUIRED, "--stage", stage, *own.split()])


def test_a_stages_projector_and_tower_leave_a_saved_models_alone():
    config = parse_arguments([*REQUIRED[:2], *REQUIRED[4:], "--stage", "finetune"])
    assert config.model.keeps_saved_projector
    assert config.model.vision_tower is None
    assert not parse_arguments(
        [*REQUIRED, "--stage", "finetune", "--mm_projector_type", "saep"]
    ).model.keeps_saved_projector


# Held-out data


def test_held_out_data_are_measured_at_epochs_unless_steps_are_given():
    def strategy(*flags):
        config = parse_arguments([*REQUIRED, "--image_folder", "images", "--eval_data_path", "held_out.json", *flags])
        assert config.data.eval_image_folder == "images"
        return config.training.trainer_arguments["eval_strategy"]

    assert strategy() == "epoch"
    assert strategy("--eval_steps", "50") == "steps"
    assert strategy("--eval_strategy", "epoch", "--eval_steps", "50") == "epoch"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--evaluation_strategy steps --eval_steps 5", "--eval_data_path is missing"),
        ("--eval_data_path held_out.json --evaluation_strategy no", "contradicts --eval_strategy no"),
        ("--eval_data_path held_out.json --eval_strategy steps", "--eval_steps is missing"),
        ("--eval_data_path held_out.json --eval_steps 0", "--eval_steps 0.0: expected more than 0"),
        ("--eval_image_folder images", "without --eval_data_path"),
        ("--eval_data_path held_out.json --load_best_model_at_end True", "not supported"),
    ],
)
def test_unclear_evaluation_is_refused(flags, words):
    with pytest.raises(UserError, match=words):
        parse_arguments([*REQUIRED, *flags.split()])
