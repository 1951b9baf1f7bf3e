"""Write a checkpoint in llava-hf's format, which transformers' own Llava and LlavaNext load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
)

from llava_saep.convert.checkpoint import Checkpoint, untied_state_dict
from llava_saep.errors import UserError
from llava_saep.model.combined_towers import CombinedVisionConfig
from llava_saep.model.configuration_llava_saep import LlavaSaepConfig
from llava_saep.model.hf_format import MODEL_CLASSES, PLACEHOLDER_ROWS, PROJECTOR_LAYERS, START_END, exchange_sides
from llava_saep.model.parts import copy_sentencepiece
from llava_saep.model.vision_tower import num_prefix_tokens
from projectors.mlp import MLPConfig

_EMBEDDING, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


def refuse_unrepresentable(config: LlavaSaepConfig) -> None:
    """Raise a UserError, naming the reason, where transformers' Llava has no place for something that a model does."""
    projector = config.projector_config
    name = config.projector["name"]
    if not (isinstance(projector, MLPConfig) and projector.depth == 2 and projector.num_residual_blocks == 0):
        raise UserError(
            f"llava-hf's format knows one projector, the MLP of two layers (mlp2x_gelu), and this model has {name} "
            f"with {projector.options()}; write it with --to own or --to llava"
        )
    if getattr(config.text_config, "final_logit_softcapping", None) is not None:
        raise UserError(
            f"transformers' Llava leaves out the soft cap on the logits of {config.text_config.model_type}, so its "
            "answers would differ; write it with --to own"
        )
    if isinstance(config.vision_config, CombinedVisionConfig):
        raise UserError("llava-hf's format has one vision tower, and this model has several; write it with --to own")
    if num_prefix_tokens(config.vision_config) > 1:
        raise UserError(
            f"llava-hf's format drops one token before the patches, but a {config.vision_config.model_type} tower has "
            f"{num_prefix_tokens(config.vision_config)}; write it with --to own or --to llava"
        )
    if (config.mm_patch_merge_type == "spatial_unpad") != bool(config.image_grid_pinpoints):
        raise UserError(
            f"llava-hf's format cuts images with spatial_unpad or not at all; this model has mm_patch_merge_type "
            f"{config.mm_patch_merge_type!r} and image_grid_pinpoints {config.image_grid_pinpoints}"
        )


def write_hf(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder that LlavaForConditionalGeneration (LlavaNext... for images in crops) and LlavaProcessor load.

    Raises:
        UserError: see `refuse_unrepresentable`.
    """
    refuse_unrepresentable(checkpoint.model.config)
    config, weights = hf_config(checkpoint.model.config), hf_weights(checkpoint)
    added = _make_room_for_placeholder(config, weights)
    if checkpoint.model.config.mm_use_im_start_end:
        setattr(config, START_END, True)
    model = MODEL_CLASSES[config.model_type].from_pretrained(
        None, config=config, state_dict=weights, dtype=checkpoint.model.dtype
    )
    model.generation_config = copy.deepcopy(checkpoint.model.generation_config)
    if added:
        model.generation_config.suppress_tokens = added
    model.save_pretrained(folder)
    build_hf_processor(checkpoint).save_pretrained(folder)
    copy_sentencepiece(checkpoint.processor.tokenizer, folder)


def hf_config(config: LlavaSaepConfig) -> PreTrainedConfig:
    """The same model in transformers' words."""
    projector = config.projector_config
    layers = projector.vision_layers
    common = {
        "vision_config": copy.deepcopy(config.vision_config),
        "text_config": copy.deepcopy(config.text_config),
        "image_token_index": config.image_token_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
        "vision_feature_select_strategy": _select_strategy(config),
        "image_seq_length": config.image_seq_length,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if config.mm_patch_merge_type == "spatial_unpad":
        return LlavaNextConfig(**common, image_grid_pinpoints=exchange_sides(config.image_grid_pinpoints))
    return LlavaConfig(**common)


def _select_strategy(config: LlavaSaepConfig) -> str:
    """ "default" drops one token before the patches, "full" none."""
    drops_one = num_prefix_tokens(config.vision_config) == 1 and not config.projector_config.keep_cls_token
    return "default" if drops_one else "full"


def hf_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every weight under transformers' names: only the projector's differ from ours."""
    theirs = {f"multi_modal_projector.{ours}.": f"multi_modal_projector.{name}." for name, ours in _layers()}
    weights = {}
    for name, tensor in untied_state_dict(checkpoint.model).items():
        for old, new in theirs.items():
            name = name.replace(old, new)
        weights[name] = tensor
    return weights


def _layers() -> list[tuple[str, str]]:
    return list(PROJECTOR_LAYERS.items())


def _make_room_for_placeholder(config: PreTrainedConfig, weights: dict[str, Tensor]) -> list[int]:
    """Give embedding and head a row for the placeholder, which transformers looks up; return the ids of new rows.

    They repeat the first row (`<unk>`, or a token as rare), and generation must suppress them: the model has not
    learnt to leave them out. The config notes them, so that they go when the folder is read here.
    """
    rows = weights[_EMBEDDING].shape[0]
    lacking = config.image_token_id + 1 - rows
    if lacking <= 0:
        return []
    for name in (_EMBEDDING, _HEAD):
        if name in weights:
            weights[name] = torch.cat([weights[name], weights[name][:1].expand(lacking, -1)])
    config.text_config.vocab_size = rows + lacking
    setattr(config, PLACEHOLDER_ROWS, lacking)
    return list(range(rows, rows + lacking))


def build_hf_processor(checkpoint: Checkpoint) -> Any:
    """transformers' processor with this model's tokenizer, image processor and chat template."""
    config, ours = checkpoint.model.config, checkpoint.processor
    tokenizer = copy.deepcopy(ours.tokenizer)
    tokenizer.padding_side = "left"
    is_cut = config.mm_patch_merge_type == "spatial_unpad"
    processor_class = LlavaNextProcessor if is_cut else LlavaProcessor
    return processor_class(
        image_processor=_image_processor(checkpoint),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=_select_strategy(config),
        chat_template=ours.chat_template,
        num_additional_image_tokens=num_prefix_tokens(config.vision_config),
    )


def _image_processor(checkpoint: Checkpoint) -> Any:
    """The tower's image processor, or transformers' Llava ones where the image is padded or cut before."""
    ours = checkpoint.processor
    names = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")
    names += ("do_normalize", "image_mean", "image_std", "do_convert_rgb")
    settings = {name: getattr(ours.image_processor, name) for name in names if hasattr(ours.image_processor, name)}
    if ours.image_aspect_ratio == "anyres":
        pinpoints = exchange_sides(checkpoint.model.config.image_grid_pinpoints)
        return LlavaNextImageProcessorPil(**settings, image_grid_pinpoints=pinpoints)
    if ours.image_aspect_ratio == "pad":
        return LlavaImageProcessorPil(**settings, do_pad=True)
    return ours.image_processor
