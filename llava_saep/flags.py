"""The training flags themselves: LLaVA's, transformers', and ours, with defaults and help.

They are declared as dataclasses for transformers' HfArgumentParser, but never instantiated: making a TrainingArguments
starts devices and process groups, while a command line must be checkable anywhere.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Literal

import transformers

from llava_saep.data.templates import TEMPLATE_NAMES

CHANGED_DEFAULTS = frozenset({"optim", "remove_unused_columns", "report_to"})
"""Flags of transformers with another default here."""

LLAVA_FLAGS = frozenset(
    "model_name_or_path version freeze_backbone tune_mm_mlp_adapter vision_tower mm_vision_select_layer "
    "pretrain_mm_mlp_adapter mm_projector_type mm_use_im_start_end mm_use_im_patch_token mm_patch_merge_type "
    "mm_vision_select_feature data_path lazy_preprocess is_multimodal image_folder image_aspect_ratio cache_dir optim "
    "remove_unused_columns freeze_mm_mlp_adapter mpt_attn_impl model_max_length double_quant quant_type bits "
    "lora_enable lora_r lora_alpha lora_dropout lora_weight_path lora_bias mm_projector_lr "
    "group_by_modality_length".split()
)
"""Flags of llava/train/train.py, whose abbreviations keep their meaning whatever is added here."""


@dataclass
class ModelArguments:
    """Flags of LLaVA's ModelArguments, and ours on the projector."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "language model (folder or hub name), or a model that was saved by a run"}
    )
    version: str = field(
        default="v0",
        metadata={
            "help": f"conversation template: {', '.join(TEMPLATE_NAMES)} (v0 and v0.5 train as v1, as in LLaVA), or "
            "chat_template for the tokenizer's own"
        },
    )
    vision_tower: str | None = field(
        default=None,
        metadata={"help": "vision tower (folder or hub name); several side by side with commas between them"},
    )
    mm_projector_type: str | None = field(default=None, metadata={"help": "projector by name"})
    mm_projector_options: str | None = field(
        default=None, metadata={"help": "options of the projector: '{\"stride\": 3}' or stride=3,kernel_size=7"}
    )
    trust_projector_code: bool = field(
        default=False, metadata={"help": "let a saved config import a projector from outside this package"}
    )
    mm_vision_select_layer: list[int] | None = field(
        default=None,
        metadata={"help": "hidden state(s) of the tower that the projector reads; None: the projector's own choice"},
    )
    mm_vision_select_feature: Literal["patch", "cls_patch"] = field(
        default="patch", metadata={"help": "cls_patch keeps the class token"}
    )
    pretrain_mm_mlp_adapter: str | None = field(
        default=None, metadata={"help": "projector weights to start from (stage 1's output: the file or its folder)"}
    )
    tune_mm_mlp_adapter: bool = field(default=False, metadata={"help": "stage 1: train the projector alone"})
    freeze_backbone: bool = field(default=False, metadata={"help": "keep the language model as it is"})
    unfreeze_mm_vision_tower: bool = field(default=False, metadata={"help": "train the vision tower too"})
    mm_use_im_start_end: bool | None = field(
        default=None,
        metadata={
            "help": "write <im_start> and <im_end> around images; with --tune_mm_mlp_adapter the token embedding "
            "learns too; None: as a saved model does, else False"
        },
    )
    mm_use_im_patch_token: bool = field(default=True, metadata={"help": "accepted for LLaVA's scripts; no effect"})
    mm_patch_merge_type: str | None = field(
        default=None,
        metadata={
            "help": "how the crops of an image are put together (anyres): flat, spatial or spatial_unpad; None: flat, "
            "or as a saved model does"
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "segments (each conversation by itself, no padding), sdpa, eager, flex_attention, "
            "flash_attention_2; None: segments where the language model can"
        },
    )


@dataclass
class DataArguments:
    """Flags of LLaVA's DataArguments, and ours on bad records."""

    _argument_group_name = "data"

    data_path: str | None = field(default=None, metadata={"help": "LLaVA JSON file"})
    image_folder: str | None = field(default=None, metadata={"help": "folder that the records' images are relative to"})
    image_aspect_ratio: str = field(default="square", metadata={"help": "square (crop), pad or anyres (several crops)"})
    image_grid_pinpoints: str | None = field(
        default=None,
        metadata={
            "help": "sizes that an image may be brought to with anyres: '[(336, 672), (672, 336)]', width and height "
            "in pixels; None: 1x2, 2x1, 2x2, 3x1 and 1x3 times the tower's input"
        },
    )
    apply_exif_orientation: bool = field(
        default=False, metadata={"help": "turn images as their EXIF tags say (released LLaVA models saw them unturned)"}
    )
    jpeg_draft: bool = field(
        default=False,
        metadata={
            "help": "decode large JPEGs at 1/2, 1/4 or 1/8 of their size where the tower sees a smaller image anyway: "
            "faster, and pixels differ slightly from LLaVA's"
        },
    )
    cache_vision_features: str | None = field(
        default=None,
        metadata={
            "help": "folder for what a frozen tower sees in each image, computed once and read from then on, in later "
            "epochs and runs too (large: the run says how large when it starts)"
        },
    )
    on_bad_sample: Literal["error", "skip"] = field(
        default="error",
        metadata={"help": "a record that cannot be used ends the run before it starts, or is counted and skipped"},
    )
    on_bad_image: Literal["skip", "error"] = field(
        default="skip",
        metadata={"help": "an image found damaged while training is replaced and counted, or ends the run"},
    )
    on_too_long: Literal["truncate", "skip", "error"] = field(
        default="truncate",
        metadata={"help": "records of more tokens than --model_max_length are cut (as in LLaVA), skipped, or an error"},
    )
    precheck_images: bool = field(
        default=False, metadata={"help": "decode every image before training starts; --on_bad_sample says what then"}
    )
    eval_data_path: str | None = field(
        default=None, metadata={"help": "held-out LLaVA JSON file: its loss and token accuracy are logged at intervals"}
    )
    eval_image_folder: str | None = field(
        default=None, metadata={"help": "folder of the held-out images; None: --image_folder"}
    )
    packing: bool = field(
        default=False,
        metadata={"help": "several whole conversations in one row of at most --model_max_length tokens"},
    )
    lazy_preprocess: bool = field(default=False, metadata={"help": "accepted for LLaVA's scripts; always lazy"})
    is_multimodal: bool = field(default=False, metadata={"help": "accepted for LLaVA's scripts; no effect"})


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Flags of LLaVA's TrainingArguments on top of transformers', and ours on resuming."""

    _argument_group_name = "training"

    cache_dir: str | None = field(
        default=None, metadata={"help": "where models of the hub are kept, in place of HF_HOME"}
    )
    optim: str = field(default="adamw_torch", metadata={"help": "optimizer (see transformers' OptimizerNames)"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "only False is supported"})
    report_to: str | None = field(
        default="none", metadata={"help": "wandb, tensorboard, trackio, ..., several with commas between them, or none"}
    )
    freeze_mm_mlp_adapter: bool = field(default=False, metadata={"help": "keep the projector as it is"})
    mpt_attn_impl: str | None = field(default="triton", metadata={"help": "no effect: see --attn_implementation"})
    model_max_length: int = field(default=512, metadata={"help": "tokens of one sample, image tokens included"})
    double_quant: bool = field(default=True, metadata={"help": "with --bits 4: round the scales of the weights too"})
    quant_type: Literal["nf4", "fp4"] = field(default="nf4", metadata={"help": "with --bits 4: the values that exist"})
    bits: Literal[4, 8, 16] = field(
        default=16,
        metadata={"help": "4 or 8: keep the frozen language model in so many bits per weight (needs bitsandbytes)"},
    )
    lora_enable: bool = field(default=False, metadata={"help": "train adapters in place of the language model"})
    lora_r: int = field(default=64, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=16, metadata={"help": "scale of the adapters, divided by the rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "share of the adapters' inputs that is dropped"})
    lora_weight_path: str = field(default="", metadata={"help": "no effect, as in LLaVA"})
    lora_bias: Literal["none", "all", "lora_only"] = field(
        default="none", metadata={"help": "biases that are trained too: none, all, or those of adapted layers"}
    )
    mm_projector_lr: float | None = field(default=None, metadata={"help": "learning rate of the projector"})
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "batches of like lengths, with images or without, as LLaVA's fine-tuning"}
    )
    stage: Literal["pretrain", "finetune", "lora"] | None = field(
        default=None,
        metadata={"help": "start from LLaVA-1.5's values for this stage; every flag still overrides its own"},
    )
    on_nan_loss: Literal["stop", "skip"] = field(
        default="stop",
        metadata={"help": "a loss that is NaN or infinite stops all ranks before the step, or the step is left out"},
    )
    resume: str = field(
        default="auto",
        metadata={"help": "auto: from the newest complete checkpoint in --output_dir; never; or a checkpoint's path"},
    )


def own_flags() -> tuple[str, ...]:
    """Every flag that is declared here, sorted: what a release must keep, or rename with care."""
    inherited = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    kinds = (ModelArguments, DataArguments, TrainingArguments)
    declared = {f.name for kind in kinds for f in dataclasses.fields(kind) if f.init}
    return tuple(sorted(declared - inherited | CHANGED_DEFAULTS))


@functools.cache
def added_flags() -> frozenset[str]:
    return frozenset(own_flags()) - LLAVA_FLAGS - CHANGED_DEFAULTS
