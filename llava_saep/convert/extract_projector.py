"""Take the projector out of a saved model: stage 1's output, for other runs to start from.

With it goes what stage 1 writes beside it: the newline token, and the token embedding of a model with <im_start> and
<im_end> around images.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llava_saep.convert.checkpoint import Source, check_format
from llava_saep.convert.output import written_at_once
from llava_saep.convert.to_llava import original_keys
from llava_saep.errors import UserError
from llava_saep.model.configuration_llava_saep import LlavaSaepConfig
from llava_saep.model.formats import inspect_foreign_folder
from llava_saep.model.hf_format import own_name
from llava_saep.model.llava_format import EMBEDDINGS, NEWLINE, LlavaFolder, read_llava_projector
from llava_saep.model.loading import (
    PROJECTOR_PREFIX,
    find_projector_weights,
    goes_with_projector,
    inspect_folder,
    save_projector_weights,
)
from llava_saep.model.projector_selection import selection_from_config, trusting_projector_code
from llava_saep.model.reading import find_full_weights, read_full_weights, read_weights_file
from llava_saep.model.vocabulary import EMBEDDING_NAME
from projectors import load_projector_state_dict


def extract_projector(source: Source, output: str | Path) -> None:
    """Write the projector of a saved model, with the newline token where the model has one.

    Args:
        output: a name that ends in .bin or .safetensors gives one file with LLaVA's keys (`model.mm_projector...`), as
            `--pretrain_mm_mlp_adapter` and LLaVA take it; any other gives a folder with weights and config.
    Raises:
        UserError, ProjectorError: no projector is there, or it does not fit its config; the output exists.
    """
    output = Path(output)
    with trusting_projector_code(source.trust_projector_code):
        config, weights = read_projector(source)
        with written_at_once(output, is_folder=output.suffix not in (".bin", ".safetensors")) as partial:
            if output.suffix in (".bin", ".safetensors"):
                _write_file(partial, config, weights, as_safetensors=output.suffix == ".safetensors")
            else:
                save_projector_weights(partial, weights, config)


def read_projector(source: Source) -> tuple[LlavaSaepConfig, dict[str, Tensor]]:
    """Return a model's config and its projector's weights, with what goes beside them, under our names."""
    if check_format(source) == "own":
        config = inspect_folder(source.folder).config
        stored = _own_weights(source.folder)
    else:
        folder = inspect_foreign_folder(source.folder, **source.parts)
        config = folder.config
        if isinstance(folder, LlavaFolder):
            return config, read_llava_projector(folder)
        stored = {own_name(_current_name(name)): t for name, t in read_full_weights(source.folder).items()}
    weights = {name: tensor for name, tensor in stored.items() if goes_with_projector(name)}
    if not config.mm_use_im_start_end:
        weights.pop(EMBEDDING_NAME, None)
    return config, _checked(source.folder, config, weights)


def _own_weights(folder: Path) -> dict[str, Tensor]:
    is_whole = bool(find_full_weights(folder)) and not (folder / "adapter_config.json").is_file()
    return read_full_weights(folder) if is_whole else read_weights_file(find_projector_weights(folder))


def _current_name(name: str) -> str:
    """The names that llava-hf's files had before transformers 4.52 lack the first level."""
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _checked(folder: Path, config: LlavaSaepConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that are exactly those of the config's projector."""
    with torch.device("meta"):
        projector = selection_from_config(config.projector).build(config.projector_config)
    try:
        load_projector_state_dict(projector, _projectors_own(weights))
    except ValueError as error:
        raise UserError(f"{folder} does not hold the projector that its config.json describes: {error}") from error
    return weights


def _projectors_own(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The projector's weights alone, under its own names."""
    own = ((name, tensor) for name, tensor in weights.items() if name.startswith(PROJECTOR_PREFIX))
    return {name.removeprefix(PROJECTOR_PREFIX): tensor for name, tensor in own}


def _write_file(path: Path, config: LlavaSaepConfig, weights: dict[str, Tensor], *, as_safetensors: bool) -> None:
    own = original_keys(config, _projectors_own(weights))
    stored = {f"model.mm_projector.{name}": tensor.contiguous() for name, tensor in own.items()}
    beside = {NEWLINE: NEWLINE, EMBEDDING_NAME: EMBEDDINGS[0]}
    stored |= {theirs: weights[ours].contiguous() for ours, theirs in beside.items() if ours in weights}
    if as_safetensors:
        save_file(stored, path, metadata={"format": "pt", "projector": json.dumps(config.projector)})
    else:
        torch.save(stored, path)
