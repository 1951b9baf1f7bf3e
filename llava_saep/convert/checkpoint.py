"""A saved model of any format with its processor, in the precision in which it is stored."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_saep.errors import UserError
from llava_saep.model.formats import Format, build_foreign_processor, detect_format, inspect_foreign_folder
from llava_saep.model.hub import local_folder
from llava_saep.model.llava_format import LlavaFolder
from llava_saep.model.loading import inspect_folder, load_model, load_processor
from llava_saep.model.modeling_llava_saep import LlavaSaepForConditionalGeneration
from llava_saep.model.processing_llava_saep import LlavaSaepProcessor
from llava_saep.model.projector_selection import trusting_projector_code
from llava_saep.model.reading import find_full_weights, first_line, read_weights_file
from projectors import ProjectorSelection

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The floating-point ones of those that model weights come in, by safetensors' names."""


@dataclass(frozen=True)
class Checkpoint:
    """What a converter starts from."""

    model: LlavaSaepForConditionalGeneration
    processor: LlavaSaepProcessor


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder, and what it does not say itself.

    Attributes:
        format: whose format it must have; None: whichever it has.
        model_base, vision_tower, projector: in place of what the config of an original LLaVA folder says.
        conversation_template: the template that the model was trained with, which foreign formats do not store.
        dtype: of the weights; None: as they are stored.
    """

    folder: Path
    format: Format | None = None
    model_base: str | None = None
    vision_tower: str | None = None
    projector: ProjectorSelection | None = None
    conversation_template: str | None = None
    dtype: torch.dtype | None = None
    trust_projector_code: bool = False

    @property
    def parts(self) -> dict:
        """The arguments that `load_model` and `inspect_foreign_folder` share."""
        return {"model_base": self.model_base, "vision_tower": self.vision_tower, "projector": self.projector}


def check_format(source: Source) -> Format:
    """Return whose format the folder has.

    Raises:
        UserError: none, or another than the one that was asked for.
    """
    found = detect_format(source.folder)
    if source.format is not None and source.format != found:
        raise UserError(f"{source.folder} is in the format {found!r}, not {source.format!r} as --from says")
    return found


def load_checkpoint(source: Source) -> Checkpoint:
    """Load a model with its processor; adapters are merged in float32 and rounded once.

    Raises:
        UserError, ProjectorError: as `load_model` and `load_processor`.
    """
    found = check_format(source)
    with trusting_projector_code(source.trust_projector_code):
        if found == "own":
            saved = inspect_folder(source.folder, **source.parts)
            processor = load_processor(source.folder)
            base = source.folder if saved.kind == "full" else saved.config.language_model_name_or_path
            dtype = source.dtype or stored_dtype(base)
        else:
            saved = inspect_foreign_folder(source.folder, **source.parts)
            processor = build_foreign_processor(saved, conversation_template=source.conversation_template)
            base = saved.base if isinstance(saved, LlavaFolder) and saved.base else source.folder
            dtype = source.dtype or stored_dtype(base) or saved.config.dtype
        dtype = dtype or torch.float32
        merges = saved.kind == "lora"
        model = load_model(source.folder, dtype=torch.float32 if merges else dtype, **source.parts)
    if found == "own" and source.conversation_template not in (None, processor.conversation_template):
        raise UserError(
            f"{source.folder} says itself that its conversation template is {processor.conversation_template!r}"
        )
    model = model.to(dtype)
    model.config.dtype = dtype
    model.config.image_aspect_ratio = processor.image_aspect_ratio
    return Checkpoint(model, processor)


def stored_dtype(name_or_path: str | Path | None) -> torch.dtype | None:
    """Return the dtype of most of a model's values; None where there is no whole model.

    Several dtypes in one model become one, with a warning that names them.
    """
    counts: dict[torch.dtype, int] = {}
    folder = None if name_or_path is None else local_folder(name_or_path)
    for file in find_full_weights(folder) if folder is not None and folder.is_dir() else []:
        for dtype, num_values in _dtypes(file):
            if dtype.is_floating_point:
                counts[dtype] = counts.get(dtype, 0) + num_values
    if not counts:
        return None
    most = max(counts, key=counts.__getitem__)
    if len(counts) > 1:
        name, *others = (str(dtype).removeprefix("torch.") for dtype in sorted(counts, key=counts.get, reverse=True))
        logger.warning("%s: weights in %s become %s like most; choose with --dtype", folder, ", ".join(others), name)
    return most


def _dtypes(file: Path) -> Iterator[tuple[torch.dtype, int]]:
    """Dtype and number of values of each tensor in a weights file, without reading the values."""
    if file.suffix != ".safetensors":
        for tensor in read_weights_file(file, map_location="meta").values():
            yield tensor.dtype, tensor.numel()
        return
    try:
        with safe_open(file, framework="pt") as opened:
            parts = [opened.get_slice(name) for name in opened.keys()]
            yield from [(SAFETENSORS_DTYPES.get(p.get_dtype(), torch.int8), math.prod(p.get_shape())) for p in parts]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not a readable weights file: {first_line(error)}") from error


def untied_state_dict(model: LlavaSaepForConditionalGeneration) -> dict[str, Tensor]:
    """Every weight once: without the head where it is the embedding."""
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights
