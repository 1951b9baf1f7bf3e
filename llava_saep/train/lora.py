"""LoRA on the linear layers of the language model, through peft."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from llava_saep.errors import UserError
from llava_saep.train.config import LoraConfig

if TYPE_CHECKING:
    from peft import PeftModel

_LANGUAGE_MODEL = "model.language_model."


def lora_target_pattern(model: nn.Module) -> str:
    """Return a pattern that matches every linear layer of the language model, and nothing of tower, projector or head.

    LLaVA adapts the same layers (find_all_linear_names); a pattern keeps the adapter's config readable.

    Raises:
        UserError: the language model has no linear layer.
    """
    leaves = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(_LANGUAGE_MODEL)
    }
    if not leaves:
        raise UserError("--lora_enable True: the language model has no torch.nn.Linear layer to adapt")
    return rf"{re.escape(_LANGUAGE_MODEL)}.*\.({'|'.join(sorted(leaves))})"


def add_lora(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Wrap a model with adapters; all its other weights stop learning.

    The adapters take the dtype of the model's weights: ZeRO-3 keeps one dtype per group, and fails on float32 adapters
    in a bf16 model; under autocast, where weights are float32, adapters in bf16 would lose their small updates.
    """
    import peft

    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        bias=config.bias,
        target_modules=lora_target_pattern(model),
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    dtype = model.lm_head.weight.dtype  # the head is never rounded
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and parameter.dtype != dtype:
            # peft gives those beside 4-bit weights the dtype that the layer multiplies in.
            parameter.data = parameter.data.to(dtype)
    return adapted
