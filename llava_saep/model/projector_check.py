"""Do projector weights belong to the projector of this run? Decided from configs, keys and shapes, without loading.

A wrong file is refused before the models are read and before ranks wait for each other, and named by its owner: by the
config.json that our training wrote beside it, or by its keys. LLaVA's config.json is no witness: its relatives leave
`mm_projector_type` as it is, and add a resampler or further layers under names of their own.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llava_saep.errors import UserError
from llava_saep.model.configuration_llava_saep import LlavaSaepConfig
from llava_saep.model.loading import find_embedding, find_projector_weights, is_projectors_own
from llava_saep.model.projector_selection import selection_from_config
from llava_saep.model.reading import UNREADABLE_CONFIG, first_line, read_json_object
from llava_saep.model.vocabulary import is_embedding, rows_of_tokens
from projectors import ProjectorError, describe_options, load_projector_state_dict, projector_spec, select_projector
from projectors._checkpoint import nearest_reading
from projectors._recognition import recognise_projector

logger = logging.getLogger(__name__)

_FLAG = "--pretrain_mm_mlp_adapter"

_NUM_KEYS_SHOWN = 3

_NOT_IN_THE_WEIGHTS = ("init", "dropout", "pad_grid")
"""Options under which weights may be trained on that began otherwise: their start, noise, and which grids are taken."""


@dataclass(frozen=True, kw_only=True)
class WeightsOrigin:
    """What the config.json beside a weights file says about its projector; `spelling` is what one asks for it by."""

    config_path: Path
    spelling: str
    name: str
    options: Mapping[str, Any]
    vision_hidden_size: int
    text_hidden_size: int
    num_vision_layers: int


def check_projector_weights(path: str | Path, config: LlavaSaepConfig) -> None:
    """Refuse weights that are not those of this model's projector.

    Args:
        path: file or folder with projector weights.
        config: the model that they shall go into.
    Raises:
        UserError: there are none, they cannot be read, or they belong to another projector, to other widths or other
            options (says to which, and what to do); or the embedding of added tokens is missing or misshapen.
    """
    file = find_projector_weights(path)
    found = read_weight_shapes(file)
    _check_embedding(file, found, config)
    shapes = {name: tensor for name, tensor in found.items() if is_projectors_own(name)}
    origin = read_origin(file)
    if origin is not None:
        _check_same_projector(file, origin, config)
    with torch.device("meta"):
        projector = selection_from_config(config.projector).build(config.projector_config)
    try:
        load_projector_state_dict(projector, shapes)
    except ProjectorError as error:
        has_other_keys = nearest_reading(projector, shapes).num_unmatched > 0
        raise UserError(f"{file}: {_owner(shapes, config, has_other_keys) or error}") from error


def _check_embedding(file: Path, shapes: Mapping[str, Tensor], config: LlavaSaepConfig) -> None:
    """Refuse a file without the rows of the tokens that this run adds; warn of an embedding that it has no use for."""
    if config.added_token_ids:
        rows_of_tokens(find_embedding(shapes, file), config.added_token_ids, config.text_config, str(file))
    elif any(is_embedding(name) for name in shapes):
        logger.warning(
            "%s: the token embedding in it is not used; if stage 1 was trained with --mm_use_im_start_end True, give "
            "that here too",
            file,
        )


def read_weight_shapes(path: Path) -> dict[str, Tensor]:
    """Read the names and shapes of the tensors in a .safetensors or .bin file, as tensors without memory.

    Raises:
        UserError: the file is empty, damaged, cut off, or holds something else than tensors by name.
    """
    size = path.stat().st_size
    if size == 0:
        raise UserError(
            f"{path} is empty (0 bytes), expected projector weights; it may have been cut off by a full disk"
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}
        weights = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # safetensors, zip and unpickling errors share no base class
        reason = f"{type(error).__name__}: {first_line(error).partition('. ')[0]}"
        raise UserError(
            f"{path} ({size} bytes) is no readable weights file; it is damaged, cut off or something else: {reason}"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{path} is no weights file: expected a dictionary of tensors by name")
    return weights


# Whose they are, by the config beside them


def read_origin(file: Path) -> WeightsOrigin | None:
    """Read this project's config.json beside a weights file; None where there is none."""
    path = file.parent / "config.json"
    try:
        if read_json_object(path).get("model_type") != LlavaSaepConfig.model_type:
            return None
        config = LlavaSaepConfig.from_pretrained(file.parent)
    except UNREADABLE_CONFIG:  # it is not what was asked for: the tensors decide
        return None
    if config.projector is None:
        return None
    is_own_code = ":" in config.projector.get("provider", "")
    return WeightsOrigin(
        config_path=path,
        spelling=config.projector["provider" if is_own_code else "name"],
        name=config.projector["name"],
        options=config.projector.get("options", {}),
        vision_hidden_size=config.vision_config.hidden_size,
        text_hidden_size=config.text_config.hidden_size,
        num_vision_layers=config.vision_config.num_hidden_layers,
    )


def _check_same_projector(file: Path, origin: WeightsOrigin, config: LlavaSaepConfig) -> None:
    """Compare name, widths and options with what the config beside the file says.

    Raises:
        UserError: they differ; names both values.
    """
    name = config.projector["name"]
    fresh = f"To train a fresh {name} projector, leave out {_FLAG}."
    if origin.name != name:
        raise UserError(
            f"{file} holds weights of a {origin.name} projector ({origin.config_path} says so), but this run's "
            f"projector is {name}. To start from them, pass {_flags_for(origin)}. {fresh}"
        )
    theirs = (origin.vision_hidden_size, origin.text_hidden_size)
    ours = (config.vision_config.hidden_size, config.text_config.hidden_size)
    if theirs != ours:
        raise UserError(
            f"{file} holds weights of a {name} projector between a tower of {theirs[0]} channels and a language model "
            f"of {theirs[1]} ({origin.config_path} says so), but this run's have {ours[0]} and {ours[1]}. To start "
            f"from them, use the models that they were trained between. {fresh}"
        )
    differences = _different_options(origin, config)
    if differences:
        values = "; ".join(f"{option} is {there} there and {here} here" for option, there, here in differences)
        raise UserError(
            f"{file} holds weights of a {name} projector with other options ({origin.config_path} says so): {values}. "
            f"To go on with theirs, pass {_flags_for(origin)}. {fresh}"
        )


def _different_options(origin: WeightsOrigin, config: LlavaSaepConfig) -> list[tuple[str, Any, Any]]:
    """Name and both values of each option that the weights were trained with otherwise."""
    here = config.projector_config.options()
    depth = config.vision_config.num_hidden_layers
    return [
        (option, value, here[option])
        for option, value in origin.options.items()
        if option in here
        and option not in _NOT_IN_THE_WEIGHTS
        and _comparable(option, value, origin.num_vision_layers) != _comparable(option, here[option], depth)
    ]


def _comparable(option: str, value: Any, num_vision_layers: int) -> Any:
    """-2 and 23 are the same layer of 24."""
    if option != "vision_layers":
        return value
    return [layer % (num_vision_layers + 1) for layer in value]


def _flags_for(origin: WeightsOrigin) -> str:
    """The flags that ask for the projector of the weights: its name, and the options that are not its defaults."""
    try:
        spec = projector_spec(origin.name)
        defaults = {info.name: info.default for info in describe_options(spec.config_class)}
        defaults["vision_layers"] = spec.config_class.default_vision_layers(origin.num_vision_layers, origin.options)
    except ProjectorError:  # code that this run has not imported
        defaults = {}
    comparable = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    options = {
        option: value
        for option, value in origin.options.items()
        if option not in comparable or value != comparable[option]
    }
    flags = f"--mm_projector_type {origin.spelling}"
    return f"{flags} --mm_projector_options '{json.dumps(options)}'" if options else flags


# Whose they are, by their keys


def _owner(shapes: Mapping[str, Tensor], config: LlavaSaepConfig, has_other_keys: bool) -> str:
    """A sentence on whose weights these are; none where they are this run's projector's in other sizes."""
    names, is_exact = recognise_projector(
        shapes,
        vision_hidden_size=config.vision_config.hidden_size,
        text_hidden_size=config.text_config.hidden_size,
        num_vision_layers=config.vision_config.num_hidden_layers,
    )
    name = config.projector["name"]
    is_own = name in {select_projector(candidate).name for candidate in names}
    if is_own and not (is_exact and has_other_keys):  # mlp3x_gelu is mlp, and yet says what mlp2x_gelu lacks
        return ""
    fresh = f"to train a fresh {name} projector, leave out {_FLAG}"
    if not names:
        first = ", ".join(list(shapes)[:_NUM_KEYS_SHOWN])
        return f"holds {len(shapes)} tensors ({first}, ...) that no registered projector has, {name} neither; {fresh}"
    listed = " or ".join(names)
    choice = names[0] if len(names) == 1 else "with the one that they were trained as"
    return (
        f"these {'are' if is_exact else 'look like'} weights of {listed}, but this run's projector is {name}. To start "
        f"from them, pass --mm_projector_type {choice}; {fresh}"
    )
