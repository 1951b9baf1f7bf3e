"""Folders in llava-hf's format (transformers' Llava and LlavaNext), read as parts of our model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from llava_saep.errors import UserError
from llava_saep.model.configuration_llava_saep import LlavaSaepConfig
from llava_saep.model.parts import build_tokenizer, loading_whole
from llava_saep.model.reading import UNREADABLE_CONFIG, UNREADABLE_WEIGHTS, first_line, read_image_processor
from llava_saep.model.vision_tower import num_prefix_tokens
from projectors import select_projector

MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
}
"""By the model_type of config.json."""

PROJECTOR_LAYERS = {"linear_1": "mlp.0", "linear_2": "mlp.2"}
"""transformers' names of the two layers -> ours."""

PLACEHOLDER_ROWS = "num_placeholder_rows"
"""A field of configs that were written here: rows of embedding and head that only make room for the placeholder."""

START_END = "mm_use_im_start_end"
"""Another, under LLaVA's name: the model was trained with <im_start> and <im_end> around images."""

_EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")
_PROJECTOR_PREFIX = "model.multi_modal_projector."


@dataclass(frozen=True)
class HfFolder:
    """What was found in a folder, before any weights are read."""

    path: Path
    config: LlavaSaepConfig
    hf_config: PreTrainedConfig
    tokenizer: Any
    image_processor: Any
    kind: Literal["full"] = "full"


def is_hf_config(fields: Mapping[str, Any]) -> bool:
    """Say whether a config.json is that of transformers' Llava or LlavaNext; LLaVA's own "llava" is flat."""
    return fields.get("model_type") in MODEL_CLASSES and ("text_config" in fields or "vision_config" in fields)


def inspect_hf_folder(path: str | Path) -> HfFolder:
    """Read config, tokenizer and image processor of a folder.

    Raises:
        UserError: a part is missing, or the model does something that ours cannot.
    """
    path = Path(path)
    try:
        hf_config = AutoConfig.from_pretrained(path)
    except UNREADABLE_CONFIG as error:
        raise UserError(f"{path}/config.json is not a consistent config: {first_line(error)}") from error
    image_processor = read_image_processor(str(path))
    aspect_ratio = "pad" if getattr(image_processor, "do_pad", False) else "square"
    if hf_config.model_type == "llava_next":
        aspect_ratio = "anyres"
    config = _make_config(path, hf_config, aspect_ratio)
    return HfFolder(path, config, hf_config, build_tokenizer(str(path)), _for_one_crop(image_processor))


def read_hf_weights(folder: HfFolder, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read every weight, under our model's names.

    Raises:
        UserError: a weight is missing, misshapen, unknown, or its file damaged.
    """
    model_class = MODEL_CLASSES[folder.hf_config.model_type]
    try:
        with loading_whole():
            model, info = model_class.from_pretrained(
                folder.path, config=folder.hf_config, dtype=dtype, output_loading_info=True
            )
    except UNREADABLE_WEIGHTS as error:
        raise UserError(f"{folder.path} cannot be loaded: {first_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys"):
        if info[what]:
            raise UserError(
                f"{folder.path} has {what.replace('_keys', '')} weights: {len(info[what])}, such as "
                f"{sorted(info[what])[0]!r}"
            )
    weights = {own_name(name): tensor for name, tensor in model.state_dict().items()}
    if folder.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    for name in weights.keys() & set(_EMBEDDINGS):
        weights[name] = weights[name][: folder.config.text_config.vocab_size]
    return weights


def own_name(name: str) -> str:
    """transformers' name of a weight -> ours: only the projector's differ."""
    for theirs, ours in PROJECTOR_LAYERS.items():
        if name.startswith(f"{_PROJECTOR_PREFIX}{theirs}."):
            return name.replace(f".{theirs}.", f".{ours}.", 1)
    return name


def _make_config(path: Path, hf: PreTrainedConfig, image_aspect_ratio: str) -> LlavaSaepConfig:
    _refuse_unsupported(path, hf)
    layers = hf.vision_feature_layer
    keeps_cls_token = hf.vision_feature_select_strategy == "full" and num_prefix_tokens(hf.vision_config) == 1
    selection = select_projector(
        "mlp",
        {
            "depth": 2,
            "vision_layers": [layers] if isinstance(layers, int) else list(layers),
            "keep_cls_token": keeps_cls_token,
        },
    )
    is_next = hf.model_type == "llava_next"
    projector_config = selection.build_config(
        vision_hidden_size=hf.vision_config.hidden_size,
        text_hidden_size=hf.text_config.hidden_size,
        num_vision_layers=hf.vision_config.num_hidden_layers,
    )
    text_config = copy.deepcopy(hf.text_config)
    text_config.vocab_size -= getattr(hf, PLACEHOLDER_ROWS, 0)
    config = LlavaSaepConfig(
        vision_config=hf.vision_config,
        text_config=text_config,
        projector=selection.completed(projector_config).to_dict(),
        image_token_index=hf.image_token_id,
        image_aspect_ratio=image_aspect_ratio,
        mm_use_im_start_end=getattr(hf, START_END, False),
        mm_patch_merge_type="spatial_unpad" if is_next else "flat",
        image_grid_pinpoints=exchange_sides(hf.image_grid_pinpoints) if is_next else None,
        tie_word_embeddings=hf.tie_word_embeddings,
        dtype=hf.dtype,
    )
    side = hf.vision_config.image_size
    config.image_seq_length = config.num_image_tokens(config.patch_grid(side, side))
    return config


def exchange_sides(pairs: list[list[int]]) -> list[list[int]]:
    """(height, width), as transformers has them <-> (width, height), as LLaVA has them; the order decides ties."""
    return [[second, first] for first, second in pairs]


def _refuse_unsupported(path: Path, hf: PreTrainedConfig) -> None:
    """Raise where transformers' model computes something that ours would not."""
    if hf.projector_hidden_act != "gelu" or not hf.multimodal_projector_bias:
        raise UserError(
            f"{path}/config.json: the projector has activation {hf.projector_hidden_act!r} and "
            f"{'a' if hf.multimodal_projector_bias else 'no'} bias; supported is 'gelu' with bias"
        )
    prefix = num_prefix_tokens(hf.vision_config)
    strategy = hf.vision_feature_select_strategy
    if (strategy, prefix) not in (("default", 1), ("full", 0), ("full", 1)):
        raise UserError(
            f"{path}/config.json: vision_feature_select_strategy {strategy!r} with a {hf.vision_config.model_type} "
            f"tower of {prefix} prefix tokens does not keep exactly the patches (or patches and class token)"
        )


def _for_one_crop(image_processor: Any) -> Any:
    """The processor of single crops: padding and cutting are done before, as LLaVA does them."""
    if not type(image_processor).__name__.startswith("Llava"):
        return image_processor
    names = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")
    names += ("do_normalize", "image_mean", "image_std", "do_convert_rgb")
    return CLIPImageProcessorPil(**{name: getattr(image_processor, name) for name in names})
