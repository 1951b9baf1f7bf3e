"""`--stage`: LLaVA-1.5's recipe values by one flag, and how they fit machines of another size than its eight GPUs.

Source: scripts/v1_5/{pretrain,finetune,finetune_lora}.sh of haotian-liu/LLaVA, v1.2.2. Two values are not LLaVA's:
checkpoints are written every 500 steps (there: 24,000 and 50,000), and micro-batches are accumulated to LLaVA's batch
of an optimizer step where there are fewer processes. `--mm_vision_select_layer -2` is left out: a projector of a single
layer reads that one by default, and one of several layers would not apply it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments

Stage = Literal["pretrain", "finetune", "lora"]

_DEEPSPEED_CONFIGS = Path(__file__).resolve().parents[2] / "deepspeed_configs"

_ALL_STAGES: Mapping[str, object] = {
    "vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "model_max_length": 2048,
    "num_train_epochs": 1,
    "weight_decay": 0.0,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "cosine",
    "gradient_checkpointing": True,
    "bf16": True,
    "tf32": True,
    "dataloader_num_workers": 4,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": 1,
}
_SECOND_STAGE: Mapping[str, object] = {
    **_ALL_STAGES,
    "version": "v1",
    "image_aspect_ratio": "pad",
    "group_by_modality_length": True,
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 16,
    "deepspeed": str(_DEEPSPEED_CONFIGS / "zero3.json"),
}


@dataclass(frozen=True)
class StagePreset:
    """What one stage sets.

    Args:
        source: LLaVA's script.
        flags: value by flag.
        batch_size: samples of an optimizer step over all processes.
    """

    source: str
    flags: Mapping[str, object]
    batch_size: int


PRESETS: Mapping[Stage, StagePreset] = {
    "pretrain": StagePreset(
        source="scripts/v1_5/pretrain.sh",
        flags={
            **_ALL_STAGES,
            "version": "plain",
            "tune_mm_mlp_adapter": True,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 32,
            "deepspeed": str(_DEEPSPEED_CONFIGS / "zero2.json"),
        },
        batch_size=256,
    ),
    "finetune": StagePreset(source="scripts/v1_5/finetune.sh", flags=_SECOND_STAGE, batch_size=128),
    "lora": StagePreset(
        source="scripts/v1_5/finetune_lora.sh",
        flags={
            **_SECOND_STAGE,
            "lora_enable": True,
            "lora_r": 128,
            "lora_alpha": 256,
            "mm_projector_lr": 2e-5,
            "learning_rate": 2e-4,
        },
        batch_size=128,
    ),
}

_GIVES_WAY: Mapping[str, tuple[str, ...]] = {
    "bf16": ("fp16",),
    "gradient_checkpointing": ("activation_checkpointing",),
    "group_by_modality_length": ("train_sampling_strategy", "packing"),
    "lora_enable": ("tune_mm_mlp_adapter",),
    "mm_projector_lr": ("freeze_mm_mlp_adapter", "tune_mm_mlp_adapter"),
    "num_train_epochs": ("max_steps",),
    "tune_mm_mlp_adapter": ("lora_enable", "freeze_mm_mlp_adapter", "unfreeze_mm_vision_tower"),
}
"""Flag of a preset -> flags that it would contradict; where one of those is given, the preset does not set it."""


@dataclass(frozen=True, kw_only=True)
class PresetUse:
    """What a preset decided in one run.

    Args:
        stage: its name.
        values: flags that it set, with their values.
        overridden: flags of it that the command line decides instead.
        accumulates: whether micro-batches are accumulated to the recipe's batch; the command line does not say how.
    """

    stage: Stage
    values: Mapping[str, object]
    overridden: tuple[str, ...] = ()
    accumulates: bool = True

    @property
    def preset(self) -> StagePreset:
        return PRESETS[self.stage]


def use_preset(stage: Stage, given: Collection[str]) -> PresetUse:
    """Decide what a preset sets beside the flags that are `given` on the command line, wherever they stand there."""
    preset = PRESETS[stage]
    overridden = tuple(
        name for name in preset.flags if name in given or any(flag in given for flag in _GIVES_WAY.get(name, ()))
    )
    return PresetUse(
        stage=stage,
        values={name: value for name, value in preset.flags.items() if name not in overridden},
        overridden=overridden,
        accumulates=not {"gradient_accumulation_steps", "auto_find_batch_size"} & set(given),
    )


def fit_preset(
    arguments: Mapping[str, Any],
    use: PresetUse,
    *,
    on_accelerator: bool,
    has_bf16: bool,
    world_size: int,
    cores_per_rank: int,
) -> tuple[dict[str, Any], list[str]]:
    """Take back what a preset set and this machine does not have, and accumulate micro-batches to the recipe's batch.

    Args:
        arguments: for transformers.TrainingArguments.
        has_bf16: the accelerator computes in bfloat16 (and with it in TF32).
        world_size: processes that train together.
        cores_per_rank: processor cores for each of them.
    Returns:
        the arguments that fit, and a sentence on each difference to the recipe.
    """
    fitted, notes = dict(arguments), []
    where = "on a processor" if not on_accelerator else "this accelerator has neither"
    for name in ("bf16", "tf32"):
        if name in use.values and not (on_accelerator and has_bf16) and fitted.pop(name, None):
            notes.append(f"without {name} ({where})")
    if "deepspeed" in use.values and not on_accelerator and world_size == 1 and fitted.pop("deepspeed", None):
        notes.append("without DeepSpeed (one process without an accelerator has nothing to split)")
    if "dataloader_num_workers" in use.values and fitted["dataloader_num_workers"] > cores_per_rank:
        fitted["dataloader_num_workers"] = cores_per_rank
        notes.append(f"{cores_per_rank} data loader worker(s) per process, one per core")
    if use.accumulates:
        per_pass = fitted.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size) * world_size
        steps = max(1, round(use.preset.batch_size / per_pass))
        fitted["gradient_accumulation_steps"] = steps
        if steps > 1:
            notes.append(f"{steps} micro-batches per step (--gradient_accumulation_steps), {steps * per_pass} samples")
        if steps * per_pass != use.preset.batch_size:
            notes.append(f"a batch of {steps * per_pass} in place of {use.preset.batch_size}")
    return fitted, notes


def describe_use(use: PresetUse, notes: Collection[str]) -> str:
    """Say in a few lines what a preset set, what the command line decided, and what this machine changed."""
    values = ", ".join(f"{name} {value}" for name, value in use.values.items())
    lines = [f"--stage {use.stage} (LLaVA-1.5's {use.preset.source}) sets {values}"]
    if use.overridden:
        lines.append(f"  left to your flags: {', '.join(use.overridden)}")
    if notes:
        lines.append(f"  here: {'; '.join(notes)}")
    return "\n".join(lines)
