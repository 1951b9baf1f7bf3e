"""Language models in 4 or 8 bits per weight, through bitsandbytes.

Only the linear layers of the language model's blocks are rounded. Vision tower, projector, newline token, embedding and
head keep their precision: they are small, and what a projector learns must not depend on how its input was rounded. The
model is built, and adapters are merged, before anything is rounded, so every folder that loads at all loads quantised.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from llava_saep.errors import UserError
from llava_saep.program import quieten_adapters

if TYPE_CHECKING:
    from llava_saep.model.modeling_llava_saep import LlavaSaepForConditionalGeneration

OUTLIER_THRESHOLD = 6.0
"""Inputs of an 8-bit layer above it are multiplied in 16 bits (Dettmers et al., 2022, LLM.int8()); LLaVA's value."""


BLOCK_SIZE = 64
"""Weights that share a scale in 4 bits; bitsandbytes' default."""


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the language model's linear layers are rounded.

    Args:
        bits: per weight: 4 (QLoRA; Dettmers et al., 2023) or 8 (LLM.int8()).
        quant_type: the sixteen values that 4 bits can stand for.
        double_quant: the scales of 4-bit blocks are rounded to 8 bits too.
    """

    bits: Literal[4, 8]
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True

    def __post_init__(self) -> None:
        assert self.bits in (4, 8)
        assert self.quant_type in ("nf4", "fp4")

    def __str__(self) -> str:
        """What distinguishes one way of rounding from another, in words."""
        if self.bits == 8:
            return "8 bits"
        return f"4 bits ({self.quant_type}{', double_quant' if self.double_quant else ''})"

    @classmethod
    def for_loading(cls, *, load_4bit: bool, load_8bit: bool) -> QuantizationConfig | None:
        """Turn LLaVA's two switches into a config; None where neither is set.

        Raises:
            UserError: both are set, or bitsandbytes is not installed.
        """
        if load_4bit and load_8bit:
            raise UserError("load_4bit and load_8bit (--load-4bit, --load-8bit) are both set; choose one")
        if not (load_4bit or load_8bit):
            return None
        require_bitsandbytes("load_4bit" if load_4bit else "load_8bit")
        return cls(bits=4 if load_4bit else 8)


def require_bitsandbytes(asked: str) -> None:
    """Stop where the package that rounds is missing.

    Args:
        asked: what needs it, in the user's words.
    Raises:
        UserError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{asked}: bitsandbytes is not installed; pip install bitsandbytes, or use 16 bits")


def quantize_language_model(
    model: LlavaSaepForConditionalGeneration,
    config: QuantizationConfig,
    *,
    compute_dtype: torch.dtype,
    device: str | torch.device,
) -> None:
    """Round the language model's linear layers in place, one after another, each on `device`.

    Afterwards the model's state dict lacks the rounded weights and `save_pretrained` refuses: what is saved of a
    quantised run are its adapters and its projector.

    Args:
        model: on the CPU, with all its weights; not one that ZeRO-3 has partitioned.
        compute_dtype: dtype in which 4-bit layers multiply.
        device: where the model will run; the rest of it stays where it is.
    Raises:
        UserError: the language model has no torch.nn.Linear layer, or one of a size that comes out wrong.
    """
    language_model = model.model.language_model
    names = [name for name, module in language_model.named_modules() if type(module) is nn.Linear]
    if not names:
        raise UserError(f"{type(language_model).__name__} has no torch.nn.Linear layer that could be quantised")
    if config.bits == 4 and torch.device(device).type == "cpu":
        _refuse_misread_sizes({name: language_model.get_submodule(name).in_features for name in names})
    _quieten_bitsandbytes()
    for name in names:
        layer = _quantized_layer(language_model.get_submodule(name), config, compute_dtype).to(device)
        layer.register_state_dict_post_hook(_leave_weights_out)
        language_model.set_submodule(name, layer)
    model.quantization = config
    # By these names peft chooses its adapters, and transformers counts parameters.
    model.is_loaded_in_4bit = config.bits == 4
    model.is_loaded_in_8bit = config.bits == 8


def _refuse_misread_sizes(num_inputs: Mapping[str, int]) -> None:
    """Stop at layers whose 4-bit weights bitsandbytes reads wrongly on the CPU (seen in 0.50.2, without any message).

    There it takes each row of weights to begin a block of its own.
    """
    for name, size in num_inputs.items():
        if size % BLOCK_SIZE != 0:
            raise UserError(
                f"4 bits on the CPU: the language model's {name} has {size} inputs, and bitsandbytes reads weights "
                f"rightly there only for multiples of {BLOCK_SIZE}; use 8 bits, or a GPU"
            )


def _quantized_layer(linear: nn.Linear, config: QuantizationConfig, compute_dtype: torch.dtype) -> nn.Linear:
    """Return bitsandbytes' layer with the weights of `linear`, which it rounds when it is moved to its device."""
    import bitsandbytes

    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    layer: Any
    if config.bits == 8:
        layer = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta")
        layer.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        options = {"quant_type": config.quant_type, "compress_statistics": config.double_quant}
        layer = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=compute_dtype, device="meta", **options)
        layer.weight = bitsandbytes.nn.Params4bit(linear.weight.data, blocksize=BLOCK_SIZE, module=layer, **options)
        # Processors with bf16 instructions would repack the weights when they generate: for sizes in multiples of 32
        # alone, and in bf16 whatever dtype was asked for.
        layer.support_avx512bf16_for_cpu = False
    layer.bias = linear.bias
    return layer


def num_weights(parameter: Tensor) -> int:
    """Count the weights that a parameter stands for; 4-bit ones are stored two in a byte."""
    quant_state = getattr(parameter, "quant_state", None)  # bitsandbytes' parameters alone have it
    return parameter.numel() if quant_state is None else quant_state.shape.numel()


def _leave_weights_out(layer: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: object) -> None:
    """Keep a frozen layer's rounded weights and their scales out of checkpoints: they come from the language model."""
    for name in [name for name in state_dict if name.startswith(prefix) and name != f"{prefix}bias"]:
        del state_dict[name]


def _quieten_bitsandbytes() -> None:
    """Leave out what it says on every import and in every step to no use here; call it before it is imported."""
    quieten_adapters()
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_says_more_than_a_cast)


def _says_more_than_a_cast(record: logging.LogRecord) -> bool:
    """Whether a message is not the one on casting inputs to float16, which comes from each layer in each step."""
    return "inputs will be cast" not in str(record.msg)
