"""LLaVA's training flags, and how they become a `RunConfig`.

The flags are declared in `llava_saep.flags`. What LLaVA and older transformers called differently is translated first,
with one warning that lists every translation.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import transformers
from transformers import HfArgumentParser

from llava_saep.data.images import AspectRatio, parse_grid_pinpoints
from llava_saep.data.templates import check_template_name
from llava_saep.errors import UserError
from llava_saep.flags import CHANGED_DEFAULTS, DataArguments, ModelArguments, TrainingArguments, added_flags
from llava_saep.model.anyres import PatchMergeType
from llava_saep.model.quantization import QuantizationConfig, require_bitsandbytes
from llava_saep.model.segment_attention import SEGMENTS
from llava_saep.program import AbbreviatingParser
from llava_saep.train.config import DataConfig, LoraConfig, ModelConfig, RunConfig, TrainablePart, TrainingConfig
from llava_saep.train.liger import require_liger
from llava_saep.train.saving import output_kind
from llava_saep.train.stage_presets import use_preset
from projectors import (
    ProjectorSelection,
    parse_projector_options,
    registered_presets,
    registered_projectors,
    select_projector,
)

logger = logging.getLogger(__name__)

DEFAULT_PROJECTOR = "linear"

ATTENTION_NAMES = (
    SEGMENTS,
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)
"""What `--attn_implementation` takes, beside kernels of the hub ("owner/name")."""

_AT_LEAST_ONE = "per_device_train_batch_size gradient_accumulation_steps model_max_length lora_r lora_alpha".split()
_NOT_NEGATIVE = "learning_rate mm_projector_lr weight_decay warmup_steps dataloader_num_workers adam_epsilon".split()
_RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(_AT_LEAST_ONE, (lambda value: value >= 1, "at least 1")),
    **dict.fromkeys(_NOT_NEGATIVE, (lambda value: 0 <= value < math.inf, "0 or more")),
    **dict.fromkeys(("num_train_epochs", "eval_steps"), (lambda value: 0 < value < math.inf, "more than 0")),
    **dict.fromkeys(
        ("lora_dropout", "adam_beta1", "adam_beta2"), (lambda value: 0 <= value < 1, "0 or more, and less than 1")
    ),
}
"""Flag -> whether a value is possible, and the same in words; written so that NaN is not."""


# Flags of earlier versions

_RENAMED_FLAGS = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "push_to_hub_token": "hub_token",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "resume_from_checkpoint": "resume",
}
"""Old name -> new name, the value staying as it is. A warmup below 1 is a share of all steps in both spellings."""

_REPLACED_SWITCHES = {
    "group_by_length": ("--train_sampling_strategy", "group_by_length"),
    "adafactor": ("--optim", "adafactor"),
    "include_tokens_per_second": ("--include_num_input_tokens_seen", "all"),
}
"""A switch that became a value of another flag; False is the default and is dropped."""

_DROPPED_FLAGS = {
    "save_safetensors": "weights are always written as safetensors",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR",
    "overwrite_output_dir": "--resume never starts anew beside what is there",
    "use_mps_device": "the device is found by itself",
    "jit_mode_eval": "removed from transformers",
    "fp16_backend": "removed from transformers",
    "half_precision_backend": "removed from transformers",
    "fp16_opt_level": "removed from transformers",
    "past_index": "removed from transformers",
    "tpu_num_cores": "removed from transformers",
    "use_ipex": "removed from transformers",
}
"""Flags without a successor, with the reason."""

_REMOVED_FLAGS = frozenset({*_RENAMED_FLAGS, *_REPLACED_SWITCHES, *_DROPPED_FLAGS})


def _switch_value(flag: str, value: str | None) -> bool:
    """Read a True/False word; a bare switch is True."""
    if value is None:
        return True
    if value.lower() in ("true", "1", "yes", "y", "t"):
        return True
    if value.lower() in ("false", "0", "no", "n", "f"):
        return False
    raise UserError(f"--{flag} {value}: expected True or False")


def _translate_flag(name: str, value: str | None) -> tuple[list[str], str] | None:
    """Return the present spelling of an old flag and a note about it; None if `name` is no old flag."""
    shown = f"--{name}" if value is None else f"--{name} {value}"
    if name in _DROPPED_FLAGS:
        return [], f"{shown} is ignored: {_DROPPED_FLAGS[name]}"
    if name in _REPLACED_SWITCHES:
        if not _switch_value(name, value):
            return [], f"{shown} is ignored: it is the default"
        tokens = list(_REPLACED_SWITCHES[name])
        return tokens, f"{shown} -> {' '.join(tokens)}"
    if name not in _RENAMED_FLAGS:
        return None
    if name == "resume_from_checkpoint" and value is not None and value.lower() in ("true", "false"):
        value = "auto" if value.lower() == "true" else "never"
    tokens = [f"--{_RENAMED_FLAGS[name]}"] + ([] if value is None else [value])
    return tokens, f"{shown} -> {' '.join(tokens)}"


def _removed_flag(token: str) -> str | None:
    """Return the old flag that an argument names, in full or by a beginning that no flag of today has."""
    if not token.startswith("--"):
        return None
    name = token.removeprefix("--").partition("=")[0].replace("-", "_")
    if name in _REMOVED_FLAGS:
        return name
    candidates = [flag for flag in _REMOVED_FLAGS if name and flag.startswith(name)]
    if len(candidates) != 1 or any(flag.startswith(f"--{name}") for flag in _flag_names()):
        return None
    return candidates[0]


def translate_removed_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Rewrite flags that transformers removed.

    Returns:
        the arguments in today's spelling, and one note per translation ("--warmup_ratio 0.03 -> --warmup_steps 0.03").
    Raises:
        UserError: an old and its new spelling are both given.
    """
    tokens, notes, position = [], [], 0
    given = {token.split("=")[0].lstrip("-").replace("-", "_") for token in argv if token.startswith("--")}
    while position < len(argv):
        token = argv[position]
        position += 1
        name = _removed_flag(token)
        if name is None:
            tokens.append(token)
            continue
        _, has_value, value = token.partition("=")
        if not has_value:
            value = None
            if position < len(argv) and not argv[position].startswith("--"):
                value = argv[position]
                position += 1
        replacement, note = _translate_flag(name, value)
        if replacement and replacement[0].removeprefix("--") in given:
            raise UserError(f"--{name} is the old name of {replacement[0]}, and both are given; drop --{name}")
        tokens += replacement
        notes.append(note)
    return tokens, notes


# Parsing


class _Parser(AbbreviatingParser, HfArgumentParser):
    """Says what is wrong as a UserError, in place of a usage text of three screens."""

    def _get_option_tuples(self, option_string: str) -> list[tuple]:
        # What abbreviates a flag of LLaVA's or transformers' must not become ambiguous by one that is added here.
        matches = super()._get_option_tuples(option_string)
        return [match for match in matches if match[0].dest not in added_flags()] or matches

    def error(self, message: str) -> None:
        raise UserError(f"{message}. `--help` lists the flags.")


@functools.cache
def _parser() -> _Parser:
    parser = _Parser(
        [ModelArguments, DataArguments, TrainingArguments],
        prog="llava-saep train",
        description="Train a LLaVA with any registered projector. The flags are LLaVA's and transformers'.",
    )
    (action,) = (action for action in parser._actions if action.dest == "mm_projector_type")
    # Listed here and not in the dataclass, since importing this module must not import every projector.
    names = ", ".join([*registered_projectors(), *registered_presets()])
    outside = "package.module:Class or path/to/file.py:Class"
    action.help = f"projector: {names}, {outside}; None: {DEFAULT_PROJECTOR}, or the one of a saved model"
    return parser


def _flag_names() -> list[str]:
    return [option for action in _parser()._actions for option in action.option_strings if option.startswith("--")]


def _parse_namespace(argv: Sequence[str]) -> argparse.Namespace:
    namespace, unknown = _parser().parse_known_args(list(argv))
    if not unknown:
        return namespace
    first = unknown[0]
    if not first.startswith("-"):
        raise UserError(f"{first!r} belongs to no flag; every argument is given as --flag value")
    close = difflib.get_close_matches(first.split("=")[0], _flag_names(), n=1)
    hint = f" Did you mean {close[0]}?" if close else " `--help` lists the flags."
    raise UserError(f"unknown flag {first.split('=')[0]}.{hint}")


_NOT_GIVEN = object()


def _given_flags(tokens: Sequence[str]) -> frozenset[str]:
    """Name the flags that a command line gives, abbreviated ones included."""
    blank = argparse.Namespace(**{action.dest: _NOT_GIVEN for action in _parser()._actions})
    namespace, _ = _parser().parse_known_args(list(tokens), namespace=blank)
    return frozenset(name for name, value in vars(namespace).items() if value is not _NOT_GIVEN)


def _parse_with_preset(tokens: Sequence[str]) -> argparse.Namespace:
    """Parse a command line, with a stage's values where it says nothing else.

    Returns:
        the flags, and with them `given`, the names of those on the command line, and `preset_use`, or None.
    """
    namespace = _parse_namespace(tokens)
    namespace.given, namespace.preset_use = _given_flags(tokens), None
    if namespace.stage is None:
        return namespace
    use = use_preset(namespace.stage, namespace.given)
    preset = [word for name, value in use.values.items() for word in (f"--{name}", str(value))]
    completed = _parse_namespace([*preset, *tokens])
    completed.given, completed.preset_use = namespace.given, use
    return completed


def _is_from_preset(flags: argparse.Namespace, name: str) -> bool:
    return flags.preset_use is not None and name in flags.preset_use.values


def parse_arguments(argv: Sequence[str] | None = None) -> RunConfig:
    """Read a command line of LLaVA's training script.

    Args:
        argv: the arguments without the program; None: those of this process.
    Raises:
        UserError: a flag is unknown, misses, contradicts another, or has a value that is not supported.
        projectors.ProjectorError: the projector or one of its options is unknown.
    """
    tokens, notes = translate_removed_flags(sys.argv[1:] if argv is None else argv)
    namespace = _parse_with_preset(tokens)
    if notes:
        logger.warning("flags of an earlier transformers were translated: %s", "; ".join(notes))
    _refuse_unsupported(namespace)
    _refuse_out_of_range(namespace)
    _refuse_absent_attention(namespace.attn_implementation)
    if namespace.use_liger_kernel:
        require_liger()
    _warn_without_effect(namespace)
    return RunConfig(model=_model_config(namespace), data=_data_config(namespace), training=_training_config(namespace))


def _refuse_unsupported(flags: argparse.Namespace) -> None:
    """Stop at values that LLaVA or transformers accept and this project does not implement."""
    _refuse_unknown_cutting(flags)
    if flags.remove_unused_columns:
        raise UserError("--remove_unused_columns True would drop the images; leave it at False")
    if flags.cache_vision_features and flags.unfreeze_mm_vision_tower:
        raise UserError(
            "--cache_vision_features keeps what a frozen tower sees, and --unfreeze_mm_vision_tower True changes the "
            "tower; drop one"
        )
    if flags.jpeg_draft and flags.image_aspect_ratio == "anyres":
        raise UserError(
            "--jpeg_draft True: --image_aspect_ratio anyres cuts images at full size; drop it, or use square or pad"
        )
    _refuse_unclear_evaluation(flags)
    if flags.label_smoothing_factor != 0:
        raise UserError("--label_smoothing_factor: not supported, the loss is computed inside the model; use 0")
    if flags.fsdp:
        raise UserError("--fsdp is not supported; use --deepspeed with a file of deepspeed_configs/")
    if flags.bf16 and flags.fp16:
        raise UserError("--bf16 and --fp16 are both True; choose one (bf16 where the GPU has it)")


def _refuse_unknown_cutting(flags: argparse.Namespace) -> None:
    """Stop at a way of preparing images, or of putting their crops together, that does not exist or has no crops."""
    if flags.image_aspect_ratio not in get_args(AspectRatio):
        raise UserError(f"--image_aspect_ratio {flags.image_aspect_ratio}: expected {', '.join(get_args(AspectRatio))}")
    merge_type = flags.mm_patch_merge_type
    if merge_type is None:
        return
    if merge_type not in get_args(PatchMergeType):
        raise UserError(f"--mm_patch_merge_type {merge_type}: expected {', '.join(get_args(PatchMergeType))}")
    if merge_type != "flat" and flags.image_aspect_ratio != "anyres":
        raise UserError(
            f"--mm_patch_merge_type {merge_type} puts an image's crops together, and --image_aspect_ratio "
            f"{flags.image_aspect_ratio} makes a single one; use --image_aspect_ratio anyres with it"
        )


def _refuse_unclear_evaluation(flags: argparse.Namespace) -> None:
    """Stop where it is not clear whether, when and on what held-out records the loss shall be measured."""
    strategy, has_data = str(getattr(flags.eval_strategy, "value", flags.eval_strategy)), bool(flags.eval_data_path)
    if strategy != "no" and not has_data:
        raise UserError(
            f"--eval_strategy {strategy}: --eval_data_path is missing: expected a JSON file of held-out records; or "
            "leave it at no, and evaluate checkpoints with `llava-saep eval`"
        )
    if has_data and strategy == "no" and "eval_strategy" in flags.given:
        raise UserError("--eval_data_path contradicts --eval_strategy no; say steps or epoch, or drop one of them")
    if strategy == "steps" and flags.eval_steps is None:
        raise UserError("--eval_strategy steps: --eval_steps is missing: expected every how many steps")
    if flags.eval_image_folder is not None and not has_data:
        raise UserError("--eval_image_folder is given without --eval_data_path; add the file, or drop the folder")
    if flags.load_best_model_at_end:
        raise UserError(
            "--load_best_model_at_end True is not supported: checkpoints leave out what is frozen; the summary names "
            "the step of the lowest held-out loss, and `llava-saep convert` and chat take its checkpoint-N folder"
        )


def _refuse_out_of_range(flags: argparse.Namespace) -> None:
    """Stop at numbers that torch, peft or the Trainer would trip over, much later and without the flag's name."""
    for name, (is_possible, expected) in _RANGES.items():
        value = getattr(flags, name)
        if value is not None and not is_possible(value):
            raise UserError(f"--{name} {value}: expected {expected}")


def _refuse_absent_attention(name: str | None) -> None:
    """Stop at attention that transformers does not know, or cannot run here, before any weights are read."""
    if name is None or "/" in name:  # a kernel from the hub, which transformers looks up itself
        return
    if name not in ATTENTION_NAMES:
        raise UserError(f"--attn_implementation {name}: expected one of {', '.join(ATTENTION_NAMES)}")
    is_available = getattr(transformers.utils, f"is_{name.replace('flash_attention', 'flash_attn')}_available", None)
    # With the package `kernels`, transformers takes the hub's build of flash attention.
    if is_available is None or is_available() or importlib.util.find_spec("kernels") is not None:
        return
    raise UserError(
        f"--attn_implementation {name}: its package is not installed, or has no GPU here; use sdpa, or install it"
    )


def _warn_without_effect(flags: argparse.Namespace) -> None:
    ignored = []
    if flags.mpt_attn_impl not in (None, "triton"):
        ignored.append("--mpt_attn_impl (see --attn_implementation)")
    if flags.image_grid_pinpoints and flags.image_aspect_ratio != "anyres":
        ignored.append("--image_grid_pinpoints (for --image_aspect_ratio anyres)")
    if flags.bits != 4 and (flags.quant_type != "nf4" or not flags.double_quant):
        ignored.append("--quant_type and --double_quant (for --bits 4)")
    if flags.liger_kernel_config is not None:
        ignored.append("--liger_kernel_config (norms, rotary embeddings and MLPs are Liger's, loss and head are not)")
    if flags.packing and _grouping(flags) is not None:
        ignored.append(f"{_grouping(flags)} (--packing True fills rows by length already)")
    if flags.lora_weight_path:
        ignored.append("--lora_weight_path (nor has it in LLaVA)")
    if ignored:
        logger.warning("flags without effect: %s", ", ".join(ignored))


def _grouping(flags: argparse.Namespace) -> str | None:
    """Return the flag that asks for batches of like lengths, as it was given."""
    if flags.group_by_modality_length:
        return "--group_by_modality_length True"
    strategy = flags.train_sampling_strategy
    return None if strategy in ("random", "sequential") else f"--train_sampling_strategy {strategy}"


def _require(flags: argparse.Namespace, name: str, meaning: str) -> str:
    value = getattr(flags, name)
    if not value:
        raise UserError(f"--{name} is missing: expected {meaning}")
    return value


# The model


def _default_num_layers_read(selection: ProjectorSelection) -> int:
    """Return how many hidden states a projector reads by default; on a tower of 24 layers, since towers differ."""
    return len(selection.spec.config_class.default_vision_layers(24, selection.options))


def _select_projector(flags: argparse.Namespace) -> ProjectorSelection:
    """Choose the projector and write the layers that it reads into its options.

    LLaVA's scripts always pass `--mm_vision_select_layer -2`. A projector that combines several layers ignores a
    single one, so that swapping the projector stays a change of one flag.
    """
    options = parse_projector_options(flags.mm_projector_options or "")
    layers = flags.mm_vision_select_layer
    if flags.mm_vision_select_feature == "cls_patch":
        options.setdefault("keep_cls_token", True)
    spelling = flags.mm_projector_type or DEFAULT_PROJECTOR
    selection = select_projector(spelling, options, trust_projector_code=True)  # the user names it here
    if layers is None:
        return selection
    if "vision_layers" in options:
        _refuse_contradicting_layers(layers, selection.options["vision_layers"])
        return selection
    if len(layers) == 1 and "vision_layers" in selection.options:
        return selection  # a preset's name says which layers
    if len(layers) == 1 and _default_num_layers_read(selection) > 1:
        _warn_layer_not_applied(layers[0], selection.name)
        return selection
    return select_projector(spelling, {**options, "vision_layers": layers}, trust_projector_code=True)


@functools.cache  # `llava-saep train` reads the flags twice: to check them, then to train
def _warn_layer_not_applied(layer: int, projector_name: str) -> None:
    logger.warning(
        "--mm_vision_select_layer %d is not applied: projector %s combines several layers. To choose them, give "
        "several (--mm_vision_select_layer 12 16 22), or vision_layers in --mm_projector_options",
        layer,
        projector_name,
    )


def _refuse_contradicting_layers(layers: Sequence[int], option: Sequence[int]) -> None:
    """Stop at several layers by flag that are not those of the option; LLaVA's scripts always name a single one."""
    if len(layers) > 1 and list(layers) != list(option):
        raise UserError(
            f"--mm_vision_select_layer {' '.join(map(str, layers))} contradicts vision_layers "
            f"{' '.join(map(str, option))} in --mm_projector_options; drop one of them"
        )


def _quantization(flags: argparse.Namespace) -> QuantizationConfig | None:
    """Read how the language model is rounded.

    Raises:
        UserError: rounded weights would have to be trained or saved, or bitsandbytes is not installed.
    """
    if flags.bits == 16:
        return None
    parts = _trainable_parts(flags)
    if output_kind(parts) == "full":
        what = "trained" if "language_model" in parts else "saved with the tower of --unfreeze_mm_vision_tower True"
        raise UserError(
            f"--bits {flags.bits} rounds the language model's weights, which can then not be {what}; add --lora_enable "
            "True (adapters are trained: QLoRA) or --tune_mm_mlp_adapter True (the projector alone), or use --bits 16"
        )
    if flags.lora_bias != "none":
        raise UserError(
            f"--lora_bias {flags.lora_bias} with --bits {flags.bits}: bitsandbytes casts biases to the dtype that it "
            "multiplies in, so they would be trained in it; use --lora_bias none"
        )
    require_bitsandbytes(f"--bits {flags.bits}")
    return QuantizationConfig(bits=flags.bits, quant_type=flags.quant_type, double_quant=flags.double_quant)


def _model_config(flags: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        language_model=_require(flags, "model_name_or_path", "a language model (folder or hub name)"),
        vision_tower=None if _is_from_preset(flags, "vision_tower") else flags.vision_tower,
        default_vision_tower=flags.vision_tower if _is_from_preset(flags, "vision_tower") else None,
        projector=_select_projector(flags),
        keeps_saved_projector=flags.mm_projector_options is None
        and (flags.mm_projector_type is None or _is_from_preset(flags, "mm_projector_type")),
        named_layers=tuple(flags.mm_vision_select_layer or ()),
        projector_weights=flags.pretrain_mm_mlp_adapter,
        mm_patch_merge_type=flags.mm_patch_merge_type,
        image_grid_pinpoints=parse_grid_pinpoints(flags.image_grid_pinpoints),
        use_im_start_end=flags.mm_use_im_start_end,
        attn_implementation=flags.attn_implementation,
        trust_projector_code=flags.trust_projector_code,
        quantization=_quantization(flags),
        hub_cache=flags.cache_dir,
    )


# The data


def _template_name(version: str) -> str:
    """Return the template that `--version` trains with: LLaVA's v0 and v0.5 only change the token that pads.

    LLaVA trains an unknown name as v1 without a word. Here it is an error: the wrong template shows only when the model
    answers badly, after days, and a name is mended in a minute.
    """
    if version in ("v0", "v0.5"):
        return "v1"
    try:
        return check_template_name(version)
    except UserError as error:
        raise UserError(f"--version: {error}. LLaVA trains an unknown name as v1; say --version v1 for that") from error


def _data_config(flags: argparse.Namespace) -> DataConfig:
    return DataConfig(
        data_path=_require(flags, "data_path", "a JSON file of LLaVA records"),
        image_folder=flags.image_folder,
        image_aspect_ratio=flags.image_aspect_ratio,
        apply_exif_orientation=flags.apply_exif_orientation,
        jpeg_draft=flags.jpeg_draft,
        cache_vision_features=flags.cache_vision_features,
        conversation_template=_template_name(flags.version),
        max_length=flags.model_max_length,
        on_bad_sample=flags.on_bad_sample,
        packing=flags.packing,
        on_bad_image=flags.on_bad_image,
        on_too_long=flags.on_too_long,
        precheck_images=flags.precheck_images,
        eval_data_path=flags.eval_data_path,
        eval_image_folder=flags.eval_image_folder or flags.image_folder,
    )


# The loop


def _trainable_parts(flags: argparse.Namespace) -> frozenset[TrainablePart]:
    """Turn LLaVA's five switches into one set.

    Raises:
        UserError: two of them contradict each other, or nothing is left to train.
    """
    if flags.tune_mm_mlp_adapter:
        for other in ("freeze_mm_mlp_adapter", "lora_enable", "unfreeze_mm_vision_tower"):
            if getattr(flags, other):
                raise UserError(
                    f"--tune_mm_mlp_adapter True trains the projector alone and contradicts --{other} True; drop one"
                )
        return frozenset({"projector", "token_embedding"} if flags.mm_use_im_start_end else {"projector"})
    if flags.lora_enable:
        parts = {"projector", "lora"}
    elif flags.freeze_backbone:
        parts = {"projector"}
    else:
        parts = {"projector", "language_model"}
    if flags.freeze_mm_mlp_adapter:
        parts.remove("projector")
    if flags.unfreeze_mm_vision_tower:
        parts.add("vision_tower")
    if not parts:
        raise UserError("--freeze_backbone True and --freeze_mm_mlp_adapter True leave nothing to train; drop one")
    return frozenset(parts)


def _trainer_arguments(flags: argparse.Namespace) -> Mapping[str, Any]:
    """Collect what transformers.TrainingArguments is to be made with: what was given, and our own defaults."""
    handled_here = {"output_dir", "save_total_limit", "local_rank", "resume_from_checkpoint", "gradient_checkpointing"}
    handled_here |= {"use_liger_kernel", "liger_kernel_config"}
    defaults = _parser().parse_args([])
    values = {
        f.name: getattr(flags, f.name)
        for f in dataclasses.fields(transformers.TrainingArguments)
        if f.init
        and f.name not in handled_here
        # Our defaults are compared as the parser reads them: it turns some of transformers' strings into booleans.
        and (f.name in CHANGED_DEFAULTS or getattr(flags, f.name) != getattr(defaults, f.name))
    }
    if flags.gradient_checkpointing is not None and flags.activation_checkpointing is None:
        values["activation_checkpointing"] = flags.gradient_checkpointing
    if flags.packing and _grouping(flags) is not None:
        values.pop("train_sampling_strategy", None)
    if flags.eval_data_path and flags.eval_strategy == "no":
        values["eval_strategy"] = "epoch" if flags.eval_steps is None else "steps"
    return values


def _training_config(flags: argparse.Namespace) -> TrainingConfig:
    trainable = _trainable_parts(flags)
    if flags.mm_projector_lr is not None and "projector" not in trainable:
        raise UserError("--mm_projector_lr is given, but --freeze_mm_mlp_adapter True keeps the projector; drop one")
    if flags.group_by_modality_length and flags.train_sampling_strategy != "random":
        raise UserError(
            f"--group_by_modality_length True contradicts --train_sampling_strategy {flags.train_sampling_strategy}"
        )
    lora = None
    if "lora" in trainable:
        lora = LoraConfig(rank=flags.lora_r, alpha=flags.lora_alpha, dropout=flags.lora_dropout, bias=flags.lora_bias)
    return TrainingConfig(
        output_dir=_require(flags, "output_dir", "a folder for checkpoints and the trained model"),
        trainable=trainable,
        lora=lora,
        projector_learning_rate=flags.mm_projector_lr,
        group_by_modality_length=flags.group_by_modality_length and not flags.packing,
        save_total_limit=flags.save_total_limit,
        resume=flags.resume,
        preset=flags.preset_use,
        on_nan_loss=flags.on_nan_loss,
        liger_kernels=flags.use_liger_kernel,
        trainer_arguments=_trainer_arguments(flags),
    )
