"""Folders in the original LLaVA's format, read as parts of our model.

There are three kinds: a whole model; stage 1's projector weights beside a config; and a LoRA adapter with
`non_lora_trainables.bin`. Which one a folder is follows from its files, and what is in it from its config.json: the
fields of the language model, flat, with LLaVA's `mm_*` among them. The folder's name means nothing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llava_saep.constants import DEFAULT_IMAGE_PATCH_TOKEN, DEFAULT_IMAGE_TOKEN
from llava_saep.data.images import parse_grid_pinpoints
from llava_saep.errors import UserError
from llava_saep.model.combined_towers import split_tower_names
from llava_saep.model.configuration_llava_saep import LlavaSaepConfig
from llava_saep.model.hub import local_folder, read_config_fields
from llava_saep.model.parts import build_tokenizer, language_model_weights, loading_whole, tower_weights
from llava_saep.model.projector_selection import remember_selection, selection_from_config
from llava_saep.model.reading import (
    UNREADABLE_CONFIG,
    find_full_weights,
    first_line,
    read_full_weights,
    read_json_object,
    read_vision_config,
    read_weights_file,
)
from llava_saep.model.vocabulary import START_END_TOKENS, add_rows
from projectors import ProjectorSelection, load_projector_state_dict, select_projector
from projectors._checkpoint import CHECKPOINT_MARKERS

logger = logging.getLogger(__name__)

Kind = Literal["full", "projector", "lora"]

PROJECTOR_FILES = ("mm_projector.bin", "mm_projector.safetensors")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILES = ("non_lora_trainables.bin", "non_lora_trainables.safetensors")

LANGUAGE_MODEL_TYPES = {"qwen": "qwen2", "mobilellama": "llama"}
"""What stands in `llava_<type>` or `Llava<Type>ForCausalLM` where it is not transformers' name for it."""

OTHER_LAYOUTS = ("mpt",)
"""Language models whose weights are not named `model.layers...`."""

TOWER_PREFIX = "model.vision_tower.vision_tower."
PROJECTOR_MARK = "mm_projector"
NEWLINE = "model.image_newline"
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
_LANGUAGE_MODEL_PREFIXES = ("lm_head.", "model.embed_tokens.", "model.layers.", "model.norm.")
_BUFFERS = (".rotary_emb.inv_freq", ".position_ids")
"""Ends of keys that old versions saved and that follow from the config."""

_MULTIMODAL_FIELDS = ("mm_", "tune_mm_", "freeze_mm_", "unfreeze_mm_", "image_", "tokenizer_", "use_mm_proj", "s2")
_FILE_FIELDS = ("model_type", "architectures", "_name_or_path", "transformers_version", "projector", "auto_map")


@dataclass(frozen=True)
class LlavaFolder:
    """What was found in a folder, before any weights are read.

    Attributes:
        fields: config.json as it is.
        base: folder or hub name of the language model (or LLaVA model) that a projector or adapter belongs to; None
            for a whole model.
        vision_tower: folder or hub name.
        extra_weights: files whose tensors replace the base's: projector weights, or what was trained beside an adapter.
    """

    path: Path
    kind: Kind
    fields: Mapping[str, Any]
    base: str | None
    vision_tower: str
    extra_weights: tuple[Path, ...]
    config: LlavaSaepConfig
    tokenizer: Any


def is_llava_config(fields: Mapping[str, Any]) -> bool:
    """Say whether a config.json is the original LLaVA's: flat, and with a vision tower or a projector."""
    return "text_config" not in fields and any(name in fields for name in ("mm_vision_tower", "mm_projector_type"))


def inspect_llava_folder(
    path: str | Path,
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
    projector: ProjectorSelection | None = None,
    fallback_tower: str | None = None,
) -> LlavaFolder:
    """Decide from files and config what a folder is and what belongs to it.

    Args:
        model_base: the language model of a projector or adapter, where the config does not name it.
        vision_tower: in place of the config's mm_vision_tower.
        projector: in place of the config's mm_projector_type.
        fallback_tower: in place of the config's mm_vision_tower where that cannot be read here.
    Raises:
        UserError, ProjectorError: no LLaVA folder, a part that cannot be found, or something that is not supported.
    """
    path = Path(path)
    fields = read_json_object(path / "config.json")
    if not is_llava_config(fields):
        raise UserError(f"{path}/config.json has no mm_vision_tower, so this is no folder of the original LLaVA")
    _refuse_unsupported(path, fields)
    kind, extra_weights = _find_weights(path, model_base)
    base = None if kind == "full" else _find_base(path, fields, kind, model_base)
    tower = _find_tower(path, fields, vision_tower, fallback_tower)
    text_config = _text_config(path, fields)
    tokenizer = build_tokenizer(base or str(path), _extra_tokens(fields), text_config)
    image_token_id = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    config = _make_config(fields, tower, base, text_config, image_token_id, projector)
    return LlavaFolder(path, kind, fields, base, tower, extra_weights, config, tokenizer)


def read_llava_weights(folder: LlavaFolder, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read every weight of the model that a folder describes, under our model's names.

    An adapter is not part of it: `merge_llava_adapter` adds it to the model that was built with these.

    Raises:
        UserError, ProjectorError: a weight is missing, misshapen or unknown.
    """
    tensors = _stored_tensors(folder, dtype)
    weights = {_own_name(name): tensor for name, tensor in tensors.items() if _is_language_model(name)}
    if folder.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    weights |= _tower_weights(folder, tensors, dtype)
    weights |= _projector_weights(folder, tensors)
    if folder.config.image_tokens.has_newline:
        weights[NEWLINE] = _newline(folder, tensors)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def read_llava_projector(folder: LlavaFolder) -> dict[str, Tensor]:
    """Read the projector's weights and what stage 1 writes beside them, under our model's names.

    That is the newline token where there is one, and the token embedding of a model with <im_start> and <im_end>.

    Raises:
        UserError, ProjectorError: they are missing, misshapen or unknown.
    """
    if folder.kind == "full":
        tensors = read_full_weights(folder.path)
    else:
        tensors = _extra_tensors(folder)
    weights = _projector_weights(folder, tensors)
    beside = (NEWLINE, EMBEDDINGS[0]) if folder.config.mm_use_im_start_end else (NEWLINE,)
    return weights | {_own_name(name) if name != NEWLINE else name: tensors[name] for name in beside if name in tensors}


def default_template(config: LlavaSaepConfig, tokenizer: Any) -> str:
    """The conversation template that belongs to a language model; LLaVA's and llava-hf's configs do not name it."""
    if config.text_config.model_type == "mistral":
        return "mistral_instruct"
    return "chatml_direct" if "<|im_start|>" in tokenizer.get_vocab() else "v1"


# What a folder is


def _refuse_unsupported(path: Path, fields: Mapping[str, Any]) -> None:
    if fields.get("s2"):
        raise UserError(f"{path}/config.json has s2=true: images at several scales (S2) are not supported")
    kind = _language_model_type(fields)
    if kind not in CONFIG_MAPPING or kind in OTHER_LAYOUTS:
        raise UserError(
            f"{path}/config.json describes a {fields.get('model_type')!r} model ({fields.get('architectures')}), whose "
            "language model is not supported"
        )


def _language_model_type(fields: Mapping[str, Any]) -> str:
    """transformers' name of the language model: llava_mistral -> mistral; of a plain "llava", its class decides."""
    model_type = str(fields.get("model_type", "llava"))
    if model_type == "mobilevlm":
        return "llama"
    if model_type != "llava":
        name = model_type.removeprefix("llava_")
        return LANGUAGE_MODEL_TYPES.get(name, name)
    architecture = (fields.get("architectures") or ["LlavaLlamaForCausalLM"])[0]
    name = architecture.removeprefix("Llava").removesuffix("ForCausalLM").lower()
    return LANGUAGE_MODEL_TYPES.get(name, name)


def _find_weights(path: Path, model_base: str | None) -> tuple[Kind, tuple[Path, ...]]:
    """Say which kind of folder this is, and which files hold tensors that replace those of its base."""
    if (path / "adapter_config.json").is_file():
        beside = _first_file(path, NON_LORA_FILES) or _first_file(path, PROJECTOR_FILES)
        if beside is None:
            raise UserError(f"{path} holds a LoRA adapter without {NON_LORA_FILES[0]}, which has its projector")
        return "lora", (beside,)
    # What LLaVA's stage 1 writes while it runs: the weights in <parent>/mm_projector/checkpoint-N.bin.
    aside = path.parent / "mm_projector" / f"{path.name}.bin"
    projector = _first_file(path, PROJECTOR_FILES) or (aside if aside.is_file() else None)
    is_whole = bool(find_full_weights(path))
    if is_whole and (model_base is None or projector is None):
        if model_base is not None:
            raise UserError(f"{path} holds a whole model, which needs no base; leave {model_base!r} out")
        return "full", ()
    if projector is None:
        raise UserError(f"{path} has a config.json but no weights: neither a whole model's, nor {PROJECTOR_FILES[0]}")
    return "projector", (projector,)


def _first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _find_base(path: Path, fields: Mapping[str, Any], kind: Kind, model_base: str | None) -> str:
    adapter = read_json_object(path / "adapter_config.json") if kind == "lora" else {}
    named = str(model_base or adapter.get("base_model_name_or_path") or fields.get("_name_or_path") or "")
    if not named:
        what = "a LoRA adapter" if kind == "lora" else "projector weights"
        raise UserError(
            f"{path} holds {what} and does not say of which language model; name it with --model_base, "
            "which `llava-saep chat`, `convert` and load_pretrained_model take"
        )
    base = _beside(path, named) or named
    if read_config_fields(base) is None:
        whose = "is named as the base" if model_base else f"that the files of {path} name as its base"
        advice = "expected a folder with a config.json" if model_base else "name the one that has it with --model_base"
        raise UserError(f"the language model {named!r} {whose} is no folder here, nor to be had from the hub; {advice}")
    return base


def _find_tower(path: Path, fields: Mapping[str, Any], vision_tower: str | None, fallback: str | None = None) -> str:
    named = vision_tower or fields.get("mm_vision_tower") or fallback
    if not named:
        raise UserError(f"{path}/config.json names no mm_vision_tower; name the tower with --vision_tower")
    found = ",".join(_beside(path, name) or name for name in split_tower_names(str(named)))
    try:
        read_vision_config(found)
    except UserError as error:
        if vision_tower:
            raise
        if fallback and named != fallback:
            _warn_of_fallback(path, str(named), fallback)
            return _find_tower(path, fields, fallback)
        raise UserError(
            f"the vision tower {named!r} that {path}/config.json names (mm_vision_tower) cannot be read: {error}. Name "
            "the folder or hub name that has it with --vision_tower"
        ) from error
    return found


@functools.cache  # a run reads the folder's config several times
def _warn_of_fallback(path: Path, named: str, fallback: str) -> None:
    logger.warning(
        "%s: the vision tower %r that its config names cannot be read here; %s takes its place", path, named, fallback
    )


def _beside(path: Path, name: str) -> str | None:
    """A folder of this name: from here, as LLaVA reads it; else in the model's folder or in those around it."""
    around = (Path(), path, *path.resolve().parents[:2])
    return next((str((folder / name).resolve()) for folder in around if (folder / name).is_dir()), None)


def _extra_tokens(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """What LLaVA adds to the tokenizer of a language model, in its order, which decides the ids."""
    patch = (DEFAULT_IMAGE_PATCH_TOKEN,) if fields.get("mm_use_im_patch_token") else ()
    return patch + (START_END_TOKENS if fields.get("mm_use_im_start_end") else ())


# The config


def _make_config(
    fields: Mapping[str, Any],
    vision_tower: str,
    base: str | None,
    text_config: PreTrainedConfig,
    image_token_id: int,
    projector: ProjectorSelection | None,
) -> LlavaSaepConfig:
    vision_config = read_vision_config(vision_tower)
    selection = projector or selection_from_fields(fields, vision_config)
    selection = selection.completed(
        selection.build_config(
            vision_hidden_size=vision_config.hidden_size,
            text_hidden_size=text_config.hidden_size,
            num_vision_layers=vision_config.num_hidden_layers,
        )
    )
    remember_selection(selection)
    config = LlavaSaepConfig(
        vision_config=vision_config,
        text_config=text_config,
        projector=selection.to_dict(),
        image_token_index=image_token_id,
        vision_tower_name_or_path=vision_tower,
        language_model_name_or_path=base,
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        mm_patch_merge_type=fields.get("mm_patch_merge_type") or "flat",
        image_aspect_ratio=fields.get("image_aspect_ratio") or "square",
        image_grid_pinpoints=_grid_pinpoints(fields),
        mm_use_im_start_end=bool(fields.get("mm_use_im_start_end", False)),
        dtype=fields.get("torch_dtype") or fields.get("dtype"),
    )
    side = vision_config.image_size
    config.image_seq_length = config.num_image_tokens(config.patch_grid(side, side))
    return config


def _text_config(path: Path, fields: Mapping[str, Any]) -> PreTrainedConfig:
    own = {
        name: value
        for name, value in fields.items()
        if name not in _FILE_FIELDS and not name.startswith(_MULTIMODAL_FIELDS)
    }
    if own.get("rope_scaling") is None:
        own.pop("rope_scaling", None)  # said by leaving it out today; other fields mean something by null
    try:
        return AutoConfig.for_model(_language_model_type(fields), **own)
    except UNREADABLE_CONFIG as error:
        raise UserError(f"{path}/config.json is not a consistent config: {first_line(error)}") from error


def selection_from_fields(fields: Mapping[str, Any], vision_config: PreTrainedConfig) -> ProjectorSelection:
    """The projector that a config.json names, reading the layer that it names where the projector reads one."""
    if "projector" in fields:
        return selection_from_config(fields["projector"])  # ours: LLaVA has no place for options
    spelling = fields.get("mm_projector_type") or "linear"
    plain = select_projector(spelling)
    num_layers = vision_config.num_hidden_layers
    options: dict[str, Any] = {}
    if len(plain.spec.config_class.default_vision_layers(num_layers, plain.options)) == 1:
        layer = fields.get("mm_vision_select_layer", -1)
        options["vision_layers"] = [layer] if isinstance(layer, int) else list(layer)
    if fields.get("mm_vision_select_feature", "patch") == "cls_patch":
        options["keep_cls_token"] = True
    return select_projector(spelling, {**plain.options, **options})


def _grid_pinpoints(fields: Mapping[str, Any]) -> list[list[int]] | None:
    """The sizes that images are cut from, as a list; LLaVA also writes the list as a string."""
    return [list(pair) for pair in parse_grid_pinpoints(fields.get("image_grid_pinpoints"))] or None


# The weights, in LLaVA's names until the last step


def _stored_tensors(folder: LlavaFolder, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor that the folder and its base hold, those of the folder in place of the base's."""
    if folder.kind == "full":
        tensors = read_full_weights(folder.path)
    else:
        extra = _extra_tensors(folder)
        base = _base_tensors(folder, dtype)
        if any(PROJECTOR_MARK in name for name in extra):
            base = {name: tensor for name, tensor in base.items() if PROJECTOR_MARK not in name}
        _extend_vocabulary(base, extra, folder.config.text_config.vocab_size)
        tensors = base | extra
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BUFFERS)}
    unknown = [name for name in tensors if not _is_known(name)]
    if unknown:
        raise UserError(
            f"{folder.path} holds {len(unknown)} weights that belong to no part of a LLaVA model, such as "
            f"{sorted(unknown)[0]!r}"
        )
    return tensors


def _extra_tensors(folder: LlavaFolder) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.extra_weights:
        tensors |= {_strip_peft(name): tensor for name, tensor in read_weights_file(file).items()}
    return tensors


def _strip_peft(name: str) -> str:
    """base_model.model.model.mm_projector.0.weight -> model.mm_projector.0.weight."""
    return name.removeprefix("base_model.model.") if name.startswith("base_model.model.") else name


def _base_tensors(folder: LlavaFolder, dtype: torch.dtype) -> dict[str, Tensor]:
    if is_llava_config(read_config_fields(folder.base) or {}):  # what finetune_task_lora.sh starts from
        return read_full_weights(local_folder(folder.base))
    with loading_whole():
        weights = language_model_weights(folder.base, folder.config.text_config, dtype)
    return {name.replace("model.language_model.", "model.", 1): tensor for name, tensor in weights.items()}


def _extend_vocabulary(base: dict[str, Tensor], extra: Mapping[str, Tensor], vocab_size: int) -> None:
    """Give the base's embedding and head the rows of tokens that LLaVA added: the mean of the others, as there."""
    for name in EMBEDDINGS:
        if name in base and name not in extra and base[name].shape[0] < vocab_size:
            rows = vocab_size - base[name].shape[0]
            logger.warning("%s: %d rows more than the base has; they start as the mean of the others", name, rows)
            add_rows(base, vocab_size, names=(name,))


def _is_language_model(name: str) -> bool:
    return name.startswith(_LANGUAGE_MODEL_PREFIXES)


def _is_known(name: str) -> bool:
    if _is_language_model(name) or name.startswith(TOWER_PREFIX) or name == NEWLINE:
        return True
    return any(part in CHECKPOINT_MARKERS for part in name.split("."))


def _own_name(name: str) -> str:
    """LLaVA's name of a weight of tower or language model -> ours."""
    if name.startswith(TOWER_PREFIX):
        return "model.vision_tower." + name.removeprefix(TOWER_PREFIX).removeprefix("vision_model.")
    return name if name.startswith("lm_head.") else name.replace("model.", "model.language_model.", 1)


def _tower_weights(folder: LlavaFolder, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tower's weights: those inside the checkpoint only where it says that its tower was trained, as in LLaVA."""
    inside = {_own_name(name): tensor for name, tensor in tensors.items() if name.startswith(TOWER_PREFIX)}
    if inside and folder.fields.get("unfreeze_mm_vision_tower"):
        return inside
    if inside:
        logger.info(
            "%s: the vision tower inside is not used but that of %s, since the config does not say "
            "unfreeze_mm_vision_tower, as in LLaVA",
            folder.path,
            folder.vision_tower,
        )
    with loading_whole():
        return tower_weights(folder.vision_tower, folder.config.vision_config, dtype)


def _projector_weights(folder: LlavaFolder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stored = {
        name: tensor
        for name, tensor in tensors.items()
        if not (_is_language_model(name) or name.startswith(TOWER_PREFIX) or name == NEWLINE)
    }
    with torch.device("meta"):
        projector = selection_from_config(folder.config.projector).build(folder.config.projector_config)
    try:
        load_projector_state_dict(projector, stored)
    except ValueError as error:
        name = folder.config.projector["name"]
        where = folder.extra_weights[0] if folder.extra_weights else folder.path
        raise UserError(f"{where} does not fit the projector {name!r} of {folder.path}/config.json: {error}") from error
    return {f"model.multi_modal_projector.{name}": tensor for name, tensor in projector.state_dict().items()}


def _newline(folder: LlavaFolder, tensors: Mapping[str, Tensor]) -> Tensor:
    if NEWLINE not in tensors:
        raise UserError(
            f"{folder.path}: mm_patch_merge_type {folder.config.mm_patch_merge_type!r} ends rows of patches with the "
            f"weight {NEWLINE}, which neither this folder nor its base has (LLaVA's stage 1 does not save it)"
        )
    return tensors[NEWLINE]


# Adapters


def merge_llava_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add the adapter of a LLaVA LoRA folder to the model's weights.

    Raises:
        UserError: the adapter's weights are missing, or belong to modules that the model lacks.
    """
    import peft

    file = _first_file(folder, ADAPTER_FILES)
    if file is None:
        raise UserError(f"{folder} has an adapter_config.json but no {ADAPTER_FILES[0]}")
    weights = {_adapter_name(name): tensor for name, tensor in read_weights_file(file).items()}
    config = peft.LoraConfig.from_pretrained(str(folder))
    # The modules by their full names: a bare "q_proj" would also find those of tower and projector.
    config.target_modules = sorted({name.split(".lora_")[0] for name in weights if ".lora_" in name})
    config.base_model_name_or_path = None
    config.layers_to_transform = config.layers_pattern = None
    config.rank_pattern = {_own_pattern(name): rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {_own_pattern(name): alpha for name, alpha in config.alpha_pattern.items()}
    modules = dict(model.named_modules())
    unknown = [name for name in config.target_modules if name not in modules]
    if unknown:
        raise UserError(f"{file} adapts {len(unknown)} modules that the model lacks, such as {unknown[0]!r}")
    adapted = peft.get_peft_model(model, config)
    result = peft.set_peft_model_state_dict(adapted, {f"base_model.model.{n}": t for n, t in weights.items()})
    missing = [name for name in adapted.state_dict() if ".lora_" in name and name in result.missing_keys]
    if missing or result.unexpected_keys:
        raise UserError(f"{file} does not fit its adapter_config.json: {[*missing, *result.unexpected_keys][0]!r}")
    return adapted.merge_and_unload()


def _adapter_name(name: str) -> str:
    return _own_name(name.removeprefix("base_model.model."))


def _own_pattern(name: str) -> str:
    return _own_name(name) if name.startswith("model.") else name
