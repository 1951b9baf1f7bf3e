"""`load_pretrained_model`, as LLaVA's `model/builder.py` has it."""

from __future__ import annotations

import logging
from typing import Any

import torch

from llava_saep.errors import UserError
from llava_saep.model.formats import build_foreign_processor, detect_format, inspect_foreign_folder
from llava_saep.model.hub import local_folder
from llava_saep.model.llava_format import LlavaFolder
from llava_saep.model.loading import load_model, load_processor
from llava_saep.model.modeling_llava_saep import LlavaSaepForConditionalGeneration
from llava_saep.model.quantization import QuantizationConfig

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT_LENGTH = 2048
"""LLaVA's, where a folder says nothing else."""


def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    **kwargs: Any,
) -> tuple[Any, LlavaSaepForConditionalGeneration, Any, int]:
    """Load a saved model of any format, with LLaVA's arguments.

    Args:
        model_path: folder or hub name of a whole model, of stage 1's projector, or of a LoRA adapter, in LLaVA's
            format, llava-hf's or ours.
        model_base: language model of a projector or adapter, where its config does not name it or it has moved.
        model_name: not used: what a folder holds is decided from its files.
        load_8bit, load_4bit: round the language model's linear layers, and nothing else; needs bitsandbytes.
        device_map: {"": device}, or "auto": the whole model is on one device.
        device: "cuda" where there is no GPU means the CPU.
        kwargs: torch_dtype (or dtype): float16 on a GPU and float32 on the CPU unless given; attn_implementation,
            vision_tower, trust_projector_code as in `load_model`.
    Returns:
        tokenizer, model in evaluation mode, image processor of the tower, and the length of the context in tokens.
    Raises:
        UserError, ProjectorError: see `load_model`.
    """
    quantization = QuantizationConfig.for_loading(load_4bit=load_4bit, load_8bit=load_8bit)
    device = _device(device, device_map)
    default = torch.float16 if device.type == "cuda" else torch.float32
    dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None) or default
    if use_flash_attn:
        kwargs["attn_implementation"] = "flash_attention_2"
    unknown = kwargs.keys() - {"attn_implementation", "vision_tower", "projector", "trust_projector_code"}
    if unknown:
        raise UserError(f"load_pretrained_model does not know {', '.join(sorted(unknown))}")
    model_path = str(local_folder(model_path))
    base = model_base or None
    model = load_model(model_path, dtype=dtype, device=device, model_base=base, quantization=quantization, **kwargs)
    processor, stored_length = _processor(model_path, base, kwargs)
    model.config.image_aspect_ratio = processor.image_aspect_ratio
    tokenizer = processor.tokenizer
    limits = (stored_length, tokenizer.model_max_length)
    context_length = next((n for n in limits if n and n < 10**9), DEFAULT_CONTEXT_LENGTH)
    return tokenizer, model, processor.image_processor, context_length


def _device(device: str, device_map: Any) -> torch.device:
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device = device_map[""]
    elif device_map not in ("auto", None, device):
        raise UserError(f"device_map {device_map!r}: expected 'auto' or {{'': device}}; a model is on one device here")
    wanted = torch.device(device)
    if wanted.type == "cuda" and not torch.cuda.is_available():
        logger.warning("no GPU can be used here; the model is loaded on the CPU")
        return torch.device("cpu")
    return wanted


def _processor(model_path: str, model_base: str | None, kwargs: dict[str, Any]) -> tuple[Any, int | None]:
    """The processor, and the context length that LLaVA's config.json says."""
    if detect_format(model_path) == "own":
        return load_processor(model_path, trust_projector_code=kwargs.get("trust_projector_code")), None
    parts = {name: kwargs[name] for name in ("vision_tower", "projector") if name in kwargs}
    folder = inspect_foreign_folder(model_path, model_base=model_base, **parts)
    fields = folder.fields if isinstance(folder, LlavaFolder) else {}
    stored = fields.get("max_sequence_length") or fields.get("tokenizer_model_max_length")
    return build_foreign_processor(folder), stored
