"""Whose format a saved folder has (ours, the original LLaVA's or llava-hf's), and models from the other two."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from llava_saep.errors import UserError
from llava_saep.model.configuration_llava_saep import LlavaSaepConfig
from llava_saep.model.hf_format import HfFolder, inspect_hf_folder, is_hf_config, read_hf_weights
from llava_saep.model.hub import local_folder, read_config_fields
from llava_saep.model.llava_format import (
    LlavaFolder,
    default_template,
    inspect_llava_folder,
    is_llava_config,
    merge_llava_adapter,
    read_llava_weights,
)
from llava_saep.model.modeling_llava_saep import LlavaSaepForConditionalGeneration
from llava_saep.model.processing_llava_saep import LlavaSaepProcessor
from llava_saep.model.reading import read_config, read_image_processor, read_json_object
from projectors import ProjectorSelection

Format = Literal["own", "llava", "hf"]
FORMATS: tuple[Format, ...] = get_args(Format)

_MAX_NAMED = 3


def detect_format(folder: str | Path) -> Format:
    """Decide from config.json whose format a folder has.

    Raises:
        UserError: no folder, no config.json, or another model's.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; expected one that training wrote, or a LLaVA or llava-hf model")
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} has no config.json; expected a folder that training wrote, or a LLaVA or llava-hf model"
        )
    fields = read_json_object(path / "config.json")
    if fields.get("model_type") == LlavaSaepConfig.model_type:
        return "own"
    if is_hf_config(fields):
        return "hf"
    if is_llava_config(fields):
        return "llava"
    raise UserError(
        f"{path}/config.json describes a {fields.get('model_type')!r} model, expected {LlavaSaepConfig.model_type!r}, "
        "an original LLaVA's (with mm_vision_tower) or llava-hf's ('llava' or 'llava_next' with vision_config)"
    )


def inspect_foreign_folder(
    folder: str | Path,
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
    projector: ProjectorSelection | None = None,
    fallback_tower: str | None = None,
) -> LlavaFolder | HfFolder:
    """Find out what a folder in LLaVA's or llava-hf's format holds; the arguments are `inspect_llava_folder`'s.

    Raises:
        UserError, ProjectorError: as there; or a whole llava-hf model is given a base or another part.
    """
    if detect_format(folder) == "llava":
        parts = {"model_base": model_base, "vision_tower": vision_tower, "projector": projector}
        return inspect_llava_folder(folder, **parts, fallback_tower=fallback_tower)
    refuse_parts(folder, model_base, vision_tower, projector)
    return inspect_hf_folder(folder)


def read_base_config(name_or_path: str, flag: str, fallback_tower: str | None = None) -> PreTrainedConfig:
    """Read the config of what a run starts from: ours for a saved model of any format, else a language model's.

    Args:
        flag: as in `read_config`.
        fallback_tower: as in `inspect_llava_folder`.
    Raises:
        UserError, ProjectorError: as `read_config` and `inspect_foreign_folder`.
    """
    fields = read_config_fields(name_or_path)
    if fields is not None and (is_hf_config(fields) or is_llava_config(fields)):
        return inspect_foreign_folder(local_folder(name_or_path), fallback_tower=fallback_tower).config
    return read_config(name_or_path, flag)


def refuse_parts(
    folder: str | Path, model_base: str | None, vision_tower: str | None, projector: ProjectorSelection | None
) -> None:
    """Raise a UserError when parts are named for a folder that names or holds all of its own."""
    given = {"model_base": model_base, "vision_tower": vision_tower, "projector": projector}
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise UserError(f"{folder} says itself what it is made of; leave {', '.join(names)} out")


def load_foreign_model(
    folder: LlavaFolder | HfFolder, dtype: torch.dtype, **kwargs: Any
) -> LlavaSaepForConditionalGeneration:
    """Build our model with the weights of a folder, its adapter merged.

    Args:
        kwargs: for `from_pretrained`, such as attn_implementation.
    Raises:
        UserError, ProjectorError: a weight is missing, misshapen or unknown.
    """
    if isinstance(folder, LlavaFolder):
        weights = read_llava_weights(folder, dtype)
    else:
        weights = read_hf_weights(folder, dtype)
    check_weights(folder.config, weights, source=str(folder.path))
    model = LlavaSaepForConditionalGeneration.from_pretrained(
        None, config=folder.config, state_dict=weights, dtype=dtype, **kwargs
    )
    model.generation_config = _generation_config(folder) or model.generation_config
    if isinstance(folder, LlavaFolder) and folder.kind == "lora":
        return merge_llava_adapter(model, folder.path)
    return model


def _generation_config(folder: LlavaFolder | HfFolder) -> GenerationConfig | None:
    """How a folder's model, or the base of its projector or adapter, is to generate; not all say."""
    found = _read_generation_config(str(folder.path))
    if found is None and isinstance(folder, LlavaFolder) and folder.base is not None:
        found = _read_generation_config(folder.base)
    if found is None:
        return None
    # What was written here for llava-hf suppresses rows that are taken out again.
    rows = folder.config.text_config.vocab_size
    found.suppress_tokens = [token for token in found.suppress_tokens or () if token < rows] or None
    found.max_length = GenerationConfig().max_length  # the context's, of which every call would complain
    if not found.do_sample:
        # Vicuna's file sets them all the same, and such a file cannot be written today.
        found.temperature = found.top_p = found.top_k = None
    return found


def _read_generation_config(name_or_path: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(name_or_path)
    except OSError:  # there is no such file, here or on the hub
        return None


def check_weights(config: LlavaSaepConfig, weights: dict[str, Tensor], source: str) -> None:
    """Compare names and shapes with those of the model that a config describes.

    Raises:
        UserError: a weight is missing, unknown or of another shape; nothing has been loaded.
    """
    with torch.device("meta"):
        expected = LlavaSaepForConditionalGeneration(config).state_dict()
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise UserError(
            f"{source} does not hold the weights that its config.json describes: {len(missing)} are missing"
            f"{_named(missing)}, {len(unknown)} belong nowhere{_named(unknown)}"
        )
    misshapen = [name for name in sorted(expected) if weights[name].shape != expected[name].shape]
    if misshapen:
        name = misshapen[0]
        raise UserError(
            f"{source}: {len(misshapen)} weights have another shape than config.json says, such as {name!r}: found "
            f"{tuple(weights[name].shape)}, expected {tuple(expected[name].shape)}"
        )


def _named(names: list[str]) -> str:
    return f" ({', '.join(names[:_MAX_NAMED])}{', ...' if len(names) > _MAX_NAMED else ''})" if names else ""


def build_foreign_processor(
    folder: LlavaFolder | HfFolder, *, conversation_template: str | None = None
) -> LlavaSaepProcessor:
    """Make the processor that belongs to the model of a folder.

    Args:
        conversation_template: the template that the model was trained with. None: the one that belongs to its language
            model, since neither format stores a name.
    """
    is_llava = isinstance(folder, LlavaFolder)
    is_stage_1 = is_llava and folder.kind == "projector"
    usual = "plain" if is_stage_1 else default_template(folder.config, folder.tokenizer)
    return LlavaSaepProcessor.from_model_config(
        folder.config,
        image_processor=read_image_processor(folder.vision_tower) if is_llava else folder.image_processor,
        tokenizer=folder.tokenizer,
        image_aspect_ratio=folder.config.image_aspect_ratio,
        conversation_template=conversation_template or usual,
    )
