"""Which weights a run changes: one set of parts, applied by parameter name and shown as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from llava_saep.model.quantization import num_weights
from llava_saep.model.vocabulary import EMBEDDING_NAME
from llava_saep.train.config import TRAINABLE_PARTS, TrainablePart

_PART_PREFIXES = {
    "vision_tower": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.", "model.image_newline"),
    "token_embedding": (EMBEDDING_NAME,),
}
_PEFT_PREFIX = "base_model.model."


def part_of(parameter_name: str) -> TrainablePart:
    """Say which part of the model a parameter belongs to; LoRA's adapters are a part of their own.

    Everything else is the language model: its layers and its head, unless that is the embedding (tied).
    """
    name = parameter_name.removeprefix(_PEFT_PREFIX)
    if "lora_" in name:
        return "lora"
    for part, prefixes in _PART_PREFIXES.items():
        if name.startswith(prefixes):
            return part
    return "language_model"


def named_parameters_of(model: nn.Module, part: TrainablePart) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of one part, with their full names."""
    return ((name, p) for name, p in model.named_parameters() if part_of(name) == part)


def set_trainable(model: nn.Module, parts: Iterable[TrainablePart]) -> None:
    """Let exactly these parts learn.

    LoRA's own settings are left alone: which biases learn beside the adapters (`--lora_bias`) is decided there.
    """
    parts = set(parts)
    if "language_model" in parts:
        parts.add("token_embedding")
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if "lora" in parts and part in ("lora", "language_model", "token_embedding"):
            continue
        parameter.requires_grad_(part in parts)


def num_elements(parameter: Tensor) -> int:
    """Count a parameter's numbers, also where ZeRO-3 keeps only a slice of it here, or a byte holds two of them."""
    return getattr(parameter, "ds_numel", None) or num_weights(parameter)


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part."""

    part: TrainablePart
    num_parameters: int
    num_trainable: int


def count_parameters(model: nn.Module) -> list[PartCount]:
    """Count each part's parameters, in the order an image takes through the model."""
    totals = dict.fromkeys(TRAINABLE_PARTS, 0)
    trainable = dict.fromkeys(TRAINABLE_PARTS, 0)
    for name, parameter in model.named_parameters():
        totals[part_of(name)] += num_elements(parameter)
        if parameter.requires_grad:
            trainable[part_of(name)] += num_elements(parameter)
    return [PartCount(part, totals[part], trainable[part]) for part in TRAINABLE_PARTS if totals[part]]


def trainable_table(model: nn.Module) -> str:
    """Draw the counts as a table for the log."""
    counts = count_parameters(model)
    rows = [(c.part, f"{c.num_parameters:,}", f"{c.num_trainable:,}") for c in counts]
    total, trainable = sum(c.num_parameters for c in counts), sum(c.num_trainable for c in counts)
    rows = [("part", "parameters", "trainable"), *rows, ("all", f"{total:,}", f"{trainable:,}")]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"  {p:<{widths[0]}}  {n:>{widths[1]}}  {t:>{widths[2]}}" for p, n, t in rows)
