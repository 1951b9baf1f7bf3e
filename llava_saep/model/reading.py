"""Reading configs, JSON and tensors from files, with errors in the user's words."""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig

from llava_saep.data.images import processed_image_size
from llava_saep.errors import UserError
from llava_saep.model.combined_towers import combine_vision_configs, split_tower_names
from llava_saep.model.vision_tower import num_prefix_tokens

UNREADABLE_CONFIG = (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError)
"""What transformers raises on a config.json that is absent, no JSON object, or has values of the wrong kind."""

UNREADABLE_WEIGHTS = (OSError, ValueError, RuntimeError, EOFError, SafetensorError, UnpicklingError)
"""What reading a weights file raises that is absent, damaged or cut off."""


def first_line(error: Exception) -> str:
    """What an error says, without the advice that libraries append."""
    return (str(error) or type(error).__name__).splitlines()[0]


class UnreadableModel(UserError):
    """A model's config cannot be read on this machine."""


def read_config(path: str, flag: str) -> PreTrainedConfig:
    """Read a pretrained part's config from a folder or hub name.

    Args:
        path: local folder or hub name.
        flag: what the user calls it, for the message.
    Raises:
        UnreadableModel: nothing readable is there.
    """
    try:
        return AutoConfig.from_pretrained(path)
    except UNREADABLE_CONFIG as error:
        what = "folder has no readable config.json" if Path(path).is_dir() else "is no folder here, nor a hub model"
        raise UnreadableModel(f"{flag} {path!r} {what}: {first_line(error)}") from error


def read_vision_config(path: str) -> PreTrainedConfig:
    """Read the config of a vision tower; of a two-tower model (CLIP, SigLIP), its vision half.

    Args:
        path: folder or hub name, or several with commas between them: towers that stand side by side.
    Raises:
        UserError: nothing readable is there, no supported tower, or towers that do not fit each other.
    """
    names = split_tower_names(path)
    configs = []
    for name in names:
        config = read_config(name, "--vision_tower")
        configs.append(getattr(config, "vision_config", config))
        num_prefix_tokens(configs[-1])  # refuses a type that is no supported tower
    if len(names) == 1:
        return configs[0]
    processors = [read_image_processor(name) for name in names]
    return combine_vision_configs(names, configs, processors, processed_image_size(processors[0]).height)


def read_image_processor(vision_tower: str):
    """Load a tower's image processor, with the PIL back end; of several towers side by side, the first one's.

    Raises:
        UserError: the tower's folder has none.
    """
    try:
        return AutoImageProcessor.from_pretrained(split_tower_names(vision_tower)[0], backend="pil")
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"the image processor of {vision_tower!r} cannot be loaded: {first_line(error)}") from error


def read_weights_file(path: Path, map_location: str = "cpu") -> dict[str, Tensor]:
    """Read a .safetensors or .bin file of tensors (never code).

    Args:
        map_location: of a .bin file, "meta" to read no values.
    Raises:
        UserError: the file is damaged or holds something else than tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # safetensors, zip and unpickling errors share no base class
        raise UserError(f"{path} is not a readable weights file: {first_line(error)}") from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{path} is not a readable weights file: expected a dictionary of tensors by name")
    return weights


FULL_WEIGHTS_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The file that a folder with a whole model has, the first of these that is there; an index names its parts."""


def find_full_weights(folder: Path) -> list[Path]:
    """List the files that hold a whole model's weights; none where the folder holds no whole model.

    Raises:
        UserError: a file that the index names is missing.
    """
    found = next((folder / name for name in FULL_WEIGHTS_NAMES if (folder / name).is_file()), None)
    if found is None:
        return []
    if found.suffix != ".json":
        return [found]
    shards = read_json_object(found).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{found} has no weight_map, which names the files with the weights")
    files = [folder / name for name in sorted(set(shards.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(files)} weights files, such as {missing[0]}")
    return files


def read_full_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a whole model from one file or several.

    Raises:
        UserError: there are none, a part is missing or damaged, or two parts hold the same tensor.
    """
    files = find_full_weights(folder)
    if not files:
        raise UserError(f"{folder} has no weights: expected one of {', '.join(FULL_WEIGHTS_NAMES)}")
    weights: dict[str, Tensor] = {}
    for file in files:
        part = read_weights_file(file)
        twice = weights.keys() & part.keys()
        if twice:
            raise UserError(f"{file} holds {sorted(twice)[0]!r}, which another file of the model holds too")
        weights |= part
    return weights


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # of the latter kind are damaged JSON and damaged UTF-8
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content
