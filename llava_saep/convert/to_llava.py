"""Write a checkpoint in the original LLaVA's format: a flat config.json, its names of the weights, its tokenizer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedConfig

from llava_saep.constants import DEFAULT_IMAGE_PATCH_TOKEN
from llava_saep.convert.checkpoint import Checkpoint, untied_state_dict
from llava_saep.convert.tokenizer_files import save_without_placeholder, stand_in_for_placeholder
from llava_saep.errors import UserError
from llava_saep.model.combined_towers import CombinedVisionConfig, split_tower_names
from llava_saep.model.configuration_llava_saep import LlavaSaepConfig
from llava_saep.model.llava_format import NEWLINE, TOWER_PREFIX, selection_from_fields
from llava_saep.model.parts import tower_weights
from llava_saep.model.projector_selection import selection_from_config
from llava_saep.model.reading import read_vision_config
from projectors import load_projector_state_dict
from projectors.identity import IdentityConfig
from projectors.linear import LinearConfig
from projectors.mlp import MLPConfig

logger = logging.getLogger(__name__)

TOWER_FOLDER = "vision_tower"
"""Where the tower goes when it cannot be found anywhere else."""

ORIGINAL_TOWERS = ("clip_vision_model",)
"""Towers that the original LLaVA builds."""

LLAVA_NAMES = {"qwen2": "qwen"}
"""LLaVA's names of language models, where they are not transformers'."""

_TOWER, _PROJECTOR, _LANGUAGE_MODEL = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
_ADDED_BY_TRANSFORMERS_5 = ("rope_parameters", "dtype", "_name_or_path", "architectures", "model_type")


def write_llava(checkpoint: Checkpoint, folder: Path, *, final_folder: Path, vision_tower: str | None = None) -> None:
    """Write a whole model as LLaVA writes one.

    The tower's weights go in only where they are not those of the tower that config.json names; LLaVA reads them where
    the config says unfreeze_mm_vision_tower.

    Args:
        folder: what is written to.
        final_folder: where it will lie in the end, for the path of a tower that has no other place.
        vision_tower: folder or hub name to write as mm_vision_tower. None: where the model's tower came from.
    """
    config = checkpoint.model.config
    _warn_about_what_llava_lacks(config)
    weights = untied_state_dict(checkpoint.model)
    tower = {name: weights.pop(name) for name in list(weights) if name.startswith(_TOWER)}
    named, is_its_own = _name_tower(checkpoint, vision_tower, tower)
    if named is None:
        _write_tower(checkpoint, folder / TOWER_FOLDER)
        named, is_its_own = str((final_folder / TOWER_FOLDER).resolve()), True
    stored = llava_weights(config, weights if is_its_own else weights | tower)
    save_torch_state_dict(stored, folder, max_shard_size="5GB", metadata={"format": "pt"})
    fields = llava_fields(config, checkpoint, vision_tower=named, has_own_tower_weights=not is_its_own)
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    checkpoint.model.generation_config.save_pretrained(folder)
    save_without_placeholder(checkpoint.processor.tokenizer, folder)


def _warn_about_what_llava_lacks(config: LlavaSaepConfig) -> None:
    if not isinstance(config.projector_config, LinearConfig | MLPConfig | IdentityConfig):
        logger.warning("the original LLaVA has no %s projector: this folder loads here only", config.projector["name"])
    if config.vision_config.model_type not in ORIGINAL_TOWERS:
        logger.warning(
            "the original LLaVA has no %s tower: this folder loads here only", config.vision_config.model_type
        )


# The tower


def _name_tower(checkpoint: Checkpoint, vision_tower: str | None, tower: dict[str, Tensor]) -> tuple[str | None, bool]:
    """Return what to write as mm_vision_tower, and whether its weights are those of the model.

    None where the tower's place is unknown or gone. A hub name that cannot be read here is kept, and its weights count
    as different.

    Raises:
        UserError: a tower was named that is another one.
    """
    named = vision_tower or checkpoint.model.config.vision_tower_name_or_path
    if named is None or (vision_tower is None and _is_gone(named)):
        return None, False
    try:
        vision_config = read_vision_config(named)
    except UserError:
        if vision_tower is not None:
            raise
        return named, False
    own = checkpoint.model.config.vision_config
    if _architecture(vision_config) != _architecture(own):
        if vision_tower is not None:
            raise UserError(f"--vision_tower {vision_tower} is another tower than the model's")
        return None, False
    there = tower_weights(named, vision_config, checkpoint.model.dtype)
    is_same = there.keys() == tower.keys() and all(torch.equal(there[name], tower[name]) for name in tower)
    return ",".join(str(Path(n).resolve()) if Path(n).is_dir() else n for n in split_tower_names(named)), is_same


def _is_gone(named: str) -> bool:
    """Whether a tower, or one of several, was in a folder that is no longer there."""
    return any(Path(name).is_absolute() and not Path(name).is_dir() for name in split_tower_names(named))


def _architecture(config: PreTrainedConfig) -> tuple:
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    return tuple(getattr(config, name, None) for name in names)


def _write_tower(checkpoint: Checkpoint, folder: Path) -> None:
    if isinstance(checkpoint.model.config.vision_config, CombinedVisionConfig):
        raise UserError(
            "the folders that the model's vision towers came from are gone, and LLaVA's format has to name them; say "
            "where they are with --vision_tower"
        )
    checkpoint.model.model.vision_tower.save_pretrained(folder)
    checkpoint.processor.image_processor.save_pretrained(folder)


# The weights


def llava_weights(config: LlavaSaepConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> LLaVA's, the projector's in the spelling of its original."""
    renamed = {}
    projector = {}
    for name, tensor in weights.items():
        if name.startswith(_PROJECTOR):
            projector[name.removeprefix(_PROJECTOR)] = tensor
        else:
            renamed[_llava_name(name, config)] = tensor
    return renamed | {f"model.mm_projector.{name}": tensor for name, tensor in original_keys(config, projector).items()}


def original_keys(config: LlavaSaepConfig, projector: dict[str, Tensor]) -> dict[str, Tensor]:
    """A projector's weights under the names of its original implementation."""
    with torch.device("meta"):
        module = selection_from_config(config.projector).build(config.projector_config)
    load_projector_state_dict(module, projector)
    return module.to_original_state_dict(dict(module.state_dict()))


def _llava_name(name: str, config: LlavaSaepConfig) -> str:
    if name.startswith(_TOWER):
        # What transformers 4 wrote; 5 leaves this level out.
        level = (
            "vision_model." if config.vision_config.model_type in ("clip_vision_model", "siglip_vision_model") else ""
        )
        return TOWER_PREFIX + level + name.removeprefix(_TOWER).removeprefix("vision_model.")
    return name if name == NEWLINE else name.replace(_LANGUAGE_MODEL, "model.", 1)


# The config


def llava_fields(
    config: LlavaSaepConfig, checkpoint: Checkpoint, *, vision_tower: str, has_own_tower_weights: bool
) -> dict[str, Any]:
    """The flat config.json."""
    tokenizer = checkpoint.processor.tokenizer
    has_patch_token = DEFAULT_IMAGE_PATCH_TOKEN in (*tokenizer.get_vocab(), stand_in_for_placeholder(tokenizer))
    projector = config.projector_config
    layers = list(projector.vision_layers)
    fields = {
        **_language_model_fields(config.text_config),
        "torch_dtype": str(checkpoint.model.dtype).removeprefix("torch."),
        "tie_word_embeddings": config.tie_word_embeddings,
        "mm_vision_tower": vision_tower,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": _spelling(config),
        "mm_vision_select_layer": layers[0] if len(layers) == 1 else layers,
        "mm_vision_select_feature": "cls_patch" if projector.keep_cls_token else "patch",
        "mm_patch_merge_type": config.mm_patch_merge_type,
        "mm_use_im_start_end": config.mm_use_im_start_end,
        "mm_use_im_patch_token": has_patch_token,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": checkpoint.processor.image_aspect_ratio,
        "tokenizer_padding_side": tokenizer.padding_side,
        "tokenizer_model_max_length": tokenizer.model_max_length,
    }
    if config.image_grid_pinpoints:
        fields["image_grid_pinpoints"] = config.image_grid_pinpoints
    if has_own_tower_weights:
        fields["unfreeze_mm_vision_tower"] = True
    return fields | _projector_fields(config, fields)


def _language_model_fields(text_config: PreTrainedConfig) -> dict[str, Any]:
    """The language model's own fields, as transformers 4 named them."""
    kind = text_config.model_type
    llava_kind = LLAVA_NAMES.get(kind, kind)
    stored = text_config.to_dict()
    usual = {name: value for name, value in PreTrainedConfig().to_dict().items() if not name.endswith("_token_id")}
    fields = {
        name: value
        for name, value in stored.items()
        if name not in _ADDED_BY_TRANSFORMERS_5 and not (name in usual and usual[name] == value)
    }
    rope = stored.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        is_plain = scaling.get("rope_type", "default") == "default"
        fields |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if is_plain else scaling}
    elif rope is not None:
        fields["rope_parameters"] = rope  # one entry per kind of layer, which transformers 4 had no name for
    name = "Llava" + "".join(part.capitalize() for part in llava_kind.split("_")) + "ForCausalLM"
    return fields | {"model_type": f"llava_{llava_kind}", "architectures": [name]}


def _spelling(config: LlavaSaepConfig) -> str:
    """LLaVA's name of the projector, where it has one."""
    projector = config.projector_config
    if not isinstance(projector, MLPConfig):
        return config.projector["name"]
    blocks = projector.num_residual_blocks
    return f"mlp{projector.depth}x_res{blocks}x_gelu" if blocks else f"mlp{projector.depth}x_gelu"


def _projector_fields(config: LlavaSaepConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Our own entry on the projector, where LLaVA's fields do not say all of it."""
    try:
        said = selection_from_fields(fields, config.vision_config)
        said_config = said.build_config(
            vision_hidden_size=config.vision_config.hidden_size,
            text_hidden_size=config.text_config.hidden_size,
            num_vision_layers=config.vision_config.num_hidden_layers,
        )
    except ValueError:
        return {"projector": dict(config.projector)}
    return {} if said_config == config.projector_config else {"projector": dict(config.projector)}
