"""Build a model from pretrained parts, and load whatever this project saved.

What a folder is, is decided from its files and config, never from its name. A missing or misshapen weight is an error.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llava_saep.data.images import GridPinpoints
from llava_saep.errors import UserError
from llava_saep.model.combined_towers import split_tower_names
from llava_saep.model.configuration_llava_saep import LlavaSaepConfig
from llava_saep.model.formats import (
    build_foreign_processor,
    detect_format,
    inspect_foreign_folder,
    load_foreign_model,
    read_base_config,
    refuse_parts,
)
from llava_saep.model.hf_format import HfFolder
from llava_saep.model.hub import local_folder, read_config_fields
from llava_saep.model.llava_format import LlavaFolder
from llava_saep.model.modeling_llava_saep import LlavaSaepForConditionalGeneration, newline_std
from llava_saep.model.parts import build_tokenizer, language_model_weights, loading_whole, tower_weights
from llava_saep.model.processing_llava_saep import LlavaSaepProcessor
from llava_saep.model.projector_selection import remember_selection, selection_from_config, trusting_projector_code
from llava_saep.model.quantization import QuantizationConfig, quantize_language_model
from llava_saep.model.reading import (
    FULL_WEIGHTS_NAMES,
    UNREADABLE_CONFIG,
    find_full_weights,
    first_line,
    read_config,
    read_image_processor,
    read_vision_config,
    read_weights_file,
)
from llava_saep.model.vocabulary import EMBEDDING_NAME, add_rows, is_embedding, rows_of_tokens, with_room_for
from projectors import Projector, ProjectorSelection, load_projector_state_dict

logger = logging.getLogger(__name__)

PROJECTOR_PREFIX = "model.multi_modal_projector."
NEWLINE_NAME = "model.image_newline"
"""The token behind each row of an image that was cut into crops; it goes wherever the projector goes."""

PROJECTOR_WEIGHTS_NAME = "mm_projector.safetensors"
PROJECTOR_WEIGHTS_NAMES = (PROJECTOR_WEIGHTS_NAME, "mm_projector.bin")
NON_LORA_WEIGHTS_NAMES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")


# Building


def make_config(
    *,
    language_model: str,
    vision_tower: str,
    projector: ProjectorSelection,
    image_token_id: int,
    mm_patch_merge_type: str = "flat",
    image_grid_pinpoints: GridPinpoints = (),
    mm_use_im_start_end: bool = False,
    added_token_ids: Sequence[int] = (),
) -> LlavaSaepConfig:
    """Compose the model's config from its parts'; every option of the projector is written down, given or default.

    Args:
        mm_patch_merge_type, image_grid_pinpoints: as in `LlavaSaepConfig`; () where images are not cut.
        mm_use_im_start_end, added_token_ids: as in `LlavaSaepConfig`; the vocabulary grows by what it lacks.
    Raises:
        UserError, ProjectorError: a part cannot be read, or the projector cannot work between them.
    """
    vision_config = read_vision_config(vision_tower)
    text_config = read_config(language_model, "--model_name_or_path")
    text_config = with_room_for(text_config.get_text_config(), added_token_ids)
    projector_config = projector.build_config(
        vision_hidden_size=vision_config.hidden_size,
        text_hidden_size=text_config.hidden_size,
        num_vision_layers=vision_config.num_hidden_layers,
    )
    projector = projector.completed(projector_config)
    remember_selection(projector)  # the user named it
    config = LlavaSaepConfig(
        vision_config=vision_config,
        text_config=text_config,
        projector=projector.to_dict(),
        image_token_index=image_token_id,
        mm_patch_merge_type=mm_patch_merge_type,
        image_grid_pinpoints=[list(pair) for pair in image_grid_pinpoints] or None,
        mm_use_im_start_end=mm_use_im_start_end,
        added_token_ids=list(added_token_ids) or None,
        vision_tower_name_or_path=vision_tower,
        language_model_name_or_path=language_model,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    config.image_seq_length = _num_image_tokens(config)  # refuses a grid that the projector cannot take
    return config


def _num_image_tokens(config: LlavaSaepConfig) -> int:
    """Count the tokens of an image of the tower's own size."""
    side = config.vision_config.image_size
    return config.num_image_tokens(config.patch_grid(side, side))


def build_model(
    *,
    language_model: str,
    vision_tower: str,
    projector: ProjectorSelection,
    image_token_id: int,
    projector_weights: str | Path | None = None,
    mm_patch_merge_type: str | None = None,
    image_grid_pinpoints: GridPinpoints | None = None,
    mm_use_im_start_end: bool | None = None,
    added_token_ids: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> LlavaSaepForConditionalGeneration:
    """Join a pretrained tower and language model with a projector, fresh or from a file.

    Works in a ZeRO-3 run, where the weights go to their partitions from rank 0. A `language_model` that is itself a
    saved llava_saep model brings its own tower; its projector is kept if it is the one asked for.

    Args:
        language_model, vision_tower: local folders or hub names.
        image_token_id: the placeholder's id in the tokenizer of `build_tokenizer`.
        projector_weights: file or folder with projector weights (stage 1's output).
        mm_patch_merge_type, image_grid_pinpoints: as in `LlavaSaepConfig`; None: the saved model's, else images are
            not cut.
        mm_use_im_start_end: as in `LlavaSaepConfig`; None: the saved model's, else False.
        added_token_ids: tokens of which the language model has no embedding; it grows, and takes their rows from
            projector_weights where these are given.
        attn_implementation: "eager", "sdpa", "flash_attention_2", ... None: transformers chooses.
    Raises:
        UserError, ProjectorError: a part is missing, unreadable, or does not fit the others.
    """
    base_config = read_base_config(language_model, "--model_name_or_path", fallback_tower=vision_tower)
    if isinstance(base_config, LlavaSaepConfig):
        if mm_patch_merge_type is not None:
            base_config.mm_patch_merge_type = mm_patch_merge_type
        if image_grid_pinpoints is not None:
            base_config.image_grid_pinpoints = [list(pair) for pair in image_grid_pinpoints] or None
        if mm_use_im_start_end is not None:
            base_config.mm_use_im_start_end = mm_use_im_start_end
        base_config.added_token_ids = list(added_token_ids) or None
        config, weights = _composed_parts(language_model, base_config, projector, dtype, fallback_tower=vision_tower)
    else:
        config = make_config(
            language_model=language_model,
            vision_tower=vision_tower,
            projector=projector,
            image_token_id=image_token_id,
            mm_patch_merge_type=mm_patch_merge_type or "flat",
            image_grid_pinpoints=image_grid_pinpoints or (),
            mm_use_im_start_end=bool(mm_use_im_start_end),
            added_token_ids=added_token_ids,
        )
        with loading_whole():
            weights = tower_weights(vision_tower, config.vision_config, dtype)
            weights |= language_model_weights(language_model, config.text_config, dtype)
    if projector_weights is not None or not any(name.startswith(PROJECTOR_PREFIX) for name in weights):
        weights |= _projector_weights(config, projector_weights, dtype)
    weights |= _newline_weights(config, projector_weights, weights.pop(NEWLINE_NAME, None), dtype)
    if added_token_ids:
        _add_tokens(config, weights, projector_weights)
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    return _load_composed(config, weights, dtype, source=language_model, **kwargs)


def _composed_parts(
    folder: str,
    config: LlavaSaepConfig,
    projector: ProjectorSelection,
    dtype: torch.dtype,
    fallback_tower: str | None,
) -> tuple[LlavaSaepConfig, dict[str, Tensor]]:
    """Return config and weights of a saved llava_saep model whose projector is replaced if another is asked for."""
    with loading_whole():
        model = load_model(folder, dtype=dtype, fallback_tower=fallback_tower)
    weights = dict(model.state_dict())
    config.text_config = with_room_for(config.text_config, config.added_token_ids or ())
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    wanted = projector.build_config(
        vision_hidden_size=config.vision_config.hidden_size,
        text_hidden_size=config.text_config.hidden_size,
        num_vision_layers=config.vision_config.num_hidden_layers,
    )
    if (projector.name, wanted) != (config.projector["name"], config.projector_config):
        logger.warning(
            "%s holds a %s projector; a fresh %s takes its place", folder, config.projector["name"], projector.name
        )
        projector = projector.completed(wanted)
        remember_selection(projector)
        config.projector = projector.to_dict()
        config.image_seq_length = _num_image_tokens(config)
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(PROJECTOR_PREFIX)}
    return config, weights


def _projector_weights(config: LlavaSaepConfig, path: str | Path | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the projector's weights under the model's names: drawn anew, or read from `path`."""
    projector = selection_from_config(config.projector).build(config.projector_config)
    if path is not None:
        _read_projector_weights(projector, path)
    return {f"{PROJECTOR_PREFIX}{name}": tensor.to(dtype) for name, tensor in projector.state_dict().items()}


def _newline_weights(
    config: LlavaSaepConfig, path: str | Path | None, saved: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the newline token that the config asks for: from `path`, else the saved model's, else drawn anew."""
    if not config.image_tokens.has_newline:
        return {}
    read = None if path is None else _read_newline(path)
    if path is not None and read is None and saved is None:
        logger.warning("%s holds no image_newline (LLaVA's stage 1 writes none); it starts anew", path)
    size = config.text_config.hidden_size
    newline = next((n for n in (read, saved) if n is not None), torch.randn(size) * newline_std(size))
    if tuple(newline.shape) != (size,):
        raise UserError(f"{path}: image_newline has shape {tuple(newline.shape)}, expected ({size},)")
    return {NEWLINE_NAME: newline.to(dtype)}


def _add_tokens(config: LlavaSaepConfig, weights: dict[str, Tensor], path: str | Path | None) -> None:
    """Make rows for the added tokens, changing `weights`; they start as they ended in stage 1 where `path` is given.

    Raises:
        UserError: the language model's embedding lies elsewhere, or that in `path` is missing or misshapen.
    """
    if EMBEDDING_NAME not in weights:
        raise UserError(
            f"a {config.text_config.model_type} language model has no weight {EMBEDDING_NAME}, so tokens cannot be "
            "added; leave --mm_use_im_start_end out"
        )
    token_ids = config.added_token_ids
    add_rows(weights, config.text_config.vocab_size, token_ids)
    if path is not None:
        file = find_projector_weights(path)
        rows = rows_of_tokens(find_embedding(read_weights_file(file), file), token_ids, config.text_config, str(file))
        weights[EMBEDDING_NAME][token_ids] = rows.to(weights[EMBEDDING_NAME].dtype)


def find_embedding(weights: Mapping[str, Tensor], file: Path) -> Tensor:
    """Return the token embedding that lies beside projector weights.

    Raises:
        UserError: there is none.
    """
    found = next((tensor for name, tensor in weights.items() if is_embedding(name)), None)
    if found is None:
        raise UserError(
            f"{file} holds no token embedding (embed_tokens.weight), which stage 1 writes beside the projector with "
            "--mm_use_im_start_end True; train stage 1 with it, or leave it out here"
        )
    return found


def _load_composed(
    config: LlavaSaepConfig, weights: dict[str, Tensor], dtype: torch.dtype, source: str, **kwargs
) -> LlavaSaepForConditionalGeneration:
    model, info = LlavaSaepForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, **kwargs
    )
    missing = [name for name in info["missing_keys"] if not (config.tie_word_embeddings and name == "lm_head.weight")]
    if missing:
        raise UserError(f"{source!r} lacks {len(missing)} weights of the model, such as {sorted(missing)[0]!r}")
    return model


def build_processor(
    *,
    language_model: str,
    vision_tower: str,
    model_config: LlavaSaepConfig,
    tokenizer=None,
    image_aspect_ratio: str = "square",
    conversation_template: str = "v1",
) -> LlavaSaepProcessor:
    """Make the processor from the tower's image processor and the language model's tokenizer.

    Raises:
        UserError: the tower's folder has no image processor, or the tokenizer cannot be loaded.
    """
    return LlavaSaepProcessor.from_model_config(
        model_config,
        image_processor=read_image_processor(vision_tower),
        tokenizer=tokenizer if tokenizer is not None else build_tokenizer(language_model),
        image_aspect_ratio=image_aspect_ratio,
        conversation_template=conversation_template,
    )


# Projector weights alone


def goes_with_projector(name: str) -> bool:
    """Whether a weight of the model is saved with the projector: its own, the newline token, the token embedding."""
    return name.startswith(PROJECTOR_PREFIX) or name in (NEWLINE_NAME, EMBEDDING_NAME)


def is_projectors_own(name: str) -> bool:
    """Whether a weight in a file of projector weights is the projector's, and none that may lie beside it."""
    return not (is_newline(name) or is_embedding(name))


def save_projector_weights(folder: str | Path, state_dict: Mapping[str, Tensor], config: LlavaSaepConfig) -> Path:
    """Write projector weights (under the model's names) and the config that says what they belong to.

    Args:
        state_dict: weights of the model or of the projector alone; only the projector's are written.
    Returns:
        path of the weights file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = {
        name if goes_with_projector(name) else PROJECTOR_PREFIX + name: tensor.detach().cpu().contiguous()
        for name, tensor in state_dict.items()
        if goes_with_projector(name) or not name.startswith(("model.", "lm_head."))
    }
    save_file(own, folder / PROJECTOR_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(folder)
    return folder / PROJECTOR_WEIGHTS_NAME


def find_projector_weights(path: str | Path) -> Path:
    """Find the file with projector weights: a file itself, or mm_projector.{safetensors,bin} in a folder.

    LLaVA's scripts name `mm_projector.bin`; where only our `mm_projector.safetensors` lies beside it, that is taken.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    candidates = [path / name for name in PROJECTOR_WEIGHTS_NAMES] if path.is_dir() else [path]
    if not path.is_dir() and path.suffix == ".bin":
        candidates.append(path.with_suffix(".safetensors"))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    _refuse_whole_model(path)
    expected = " or ".join(str(candidate) for candidate in candidates)
    raise UserError(f"no projector weights at {path}: expected {expected}; stage 1 writes them into its --output_dir")


def _refuse_whole_model(path: Path) -> None:
    """Say what to do with a folder that holds a whole model where projector weights are expected."""
    whole = find_full_weights(path) if path.is_dir() else []
    if not whole:
        return
    alone = f", or name its weights file {whole[0]} to take its projector alone" if len(whole) == 1 else ""
    raise UserError(
        f"{path} holds a whole model and no {' or '.join(PROJECTOR_WEIGHTS_NAMES)}; to go on from that model, pass it "
        f"as --model_name_or_path{alone}"
    )


def _read_projector_weights(projector: Projector, path: str | Path) -> None:
    file = find_projector_weights(path)
    weights = {name: tensor for name, tensor in read_weights_file(file).items() if is_projectors_own(name)}
    try:
        load_projector_state_dict(projector, weights)
    except ValueError as error:
        raise UserError(f"{file} does not fit the projector {type(projector).__name__}: {error}") from error


def is_newline(name: str) -> bool:
    """Whether a weight is LLaVA's newline token, under any prefix."""
    return name.rpartition(".")[2] == "image_newline"


def _read_newline(path: str | Path) -> Tensor | None:
    """Return the newline token that lies beside projector weights, if there is one."""
    weights = read_weights_file(find_projector_weights(path))
    return next((tensor for name, tensor in weights.items() if is_newline(name)), None)


def load_projector_weights(model: LlavaSaepForConditionalGeneration, path: str | Path) -> None:
    """Load projector weights, and what lies beside them, into a model.

    Not into one partitioned by ZeRO-3: give `build_model` the path instead, which leaves the embedding of other tokens
    than the added ones as it is.
    """
    _read_projector_weights(model.model.multi_modal_projector, path)
    newline = _read_newline(path)
    with torch.no_grad():
        if newline is not None and model.model.image_newline is not None:
            model.model.image_newline.copy_(newline)
        _load_embedding(model, find_projector_weights(path))


def _load_embedding(model: LlavaSaepForConditionalGeneration, file: Path) -> None:
    """Load the embedding that lies beside projector weights, if any: the whole matrix, or the added tokens' rows."""
    stored = next((tensor for name, tensor in read_weights_file(file).items() if is_embedding(name)), None)
    if stored is None:
        return
    embedding = model.get_input_embeddings().weight
    if stored.shape == embedding.shape:
        embedding.copy_(stored)
    else:
        token_ids = model.config.added_token_ids or ()
        embedding[list(token_ids)] = rows_of_tokens(stored, token_ids, model.config.text_config, str(file))


# Loading what was saved


@dataclass(frozen=True)
class SavedFolder:
    """What a folder holds: kind "full", "projector" (projector weights and config) or "lora"."""

    path: Path
    kind: str
    config: LlavaSaepConfig


def inspect_folder(
    folder: str | Path,
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
    projector: ProjectorSelection | None = None,
) -> SavedFolder | LlavaFolder | HfFolder:
    """Decide from files and config what a saved folder is.

    Args:
        model_base, vision_tower: what a projector or adapter belongs to. One of ours says so itself, and is told only
            where that has moved.
        projector: as in `inspect_llava_folder`.
    Raises:
        UserError: no folder, no config of a model that loads here, no weights, or a part that the folder says itself.
    """
    path = Path(folder)
    if detect_format(path) != "own":
        return inspect_foreign_folder(path, model_base=model_base, vision_tower=vision_tower, projector=projector)
    try:
        config = LlavaSaepConfig.from_pretrained(path)
    except UNREADABLE_CONFIG as error:
        raise UserError(f"{path}/config.json is not a consistent config: {error}") from error
    kind = _own_kind(path)
    if kind == "full":
        refuse_parts(path, model_base, vision_tower, projector)
        return SavedFolder(path, kind, config)
    refuse_parts(path, None, None, projector)
    config.language_model_name_or_path = _moved_part(path, config.language_model_name_or_path, model_base)
    config.vision_tower_name_or_path = _moved_part(path, config.vision_tower_name_or_path, vision_tower)
    return SavedFolder(path, kind, config)


def _own_kind(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return "lora"
    if any((path / name).is_file() for name in FULL_WEIGHTS_NAMES):
        return "full"
    if any((path / name).is_file() for name in PROJECTOR_WEIGHTS_NAMES):
        return "projector"
    expected = ", ".join((FULL_WEIGHTS_NAMES[0], PROJECTOR_WEIGHTS_NAME, "adapter_config.json"))
    raise UserError(f"{path} has a config.json but no weights: expected one of {expected}")


def _moved_part(folder: Path, recorded: str | None, given: str | None) -> str | None:
    """Return the place of a pretrained part: the one that was recorded, or the one given where that is gone.

    Raises:
        UserError: the recorded one is there, and another one.
    """
    if given is None or (recorded is not None and Path(recorded).resolve() == Path(given).resolve()):
        return recorded
    if recorded is not None and _can_be_read(recorded):
        raise UserError(f"{folder} belongs to {recorded!r}, as its config.json says, and not to {given!r}")
    logger.warning("%s: %r that its config.json names cannot be read here; %s takes its place", folder, recorded, given)
    return given


def _can_be_read(names: str) -> bool:
    """Whether a pretrained part, or each of several towers, has a config here or on the hub."""
    return all(read_config_fields(name) is not None for name in split_tower_names(names))


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_projector_code: bool | None = None,
    attn_implementation: str | None = None,
    model_base: str | None = None,
    vision_tower: str | None = None,
    projector: ProjectorSelection | None = None,
    quantization: QuantizationConfig | None = None,
    fallback_tower: str | None = None,
) -> LlavaSaepForConditionalGeneration:
    """Load any folder that training wrote, the original LLaVA's or llava-hf's too, in evaluation mode.

    A stage-1 folder is completed from the tower and language model that its config names; a LoRA folder likewise, its
    adapter merged into the language model.

    Args:
        folder: or the name of a model on the hub.
        model_base, vision_tower, projector: for a folder of the original LLaVA, in place of what its config says, see
            `inspect_llava_folder`; of ours, see `inspect_folder`.
        trust_projector_code: permit the config to import a projector from outside this package. None: as
            `trusting_projector_code` around the call says, and else not.
        fallback_tower: for a folder of the original LLaVA, see `inspect_llava_folder`.
        quantization: round the language model, its adapter merged, to fewer bits; `dtype` is what the rest has.
    Raises:
        UserError, ProjectorError: the folder is no saved model, or its weights are missing, damaged or misshapen.
    """
    folder = local_folder(folder)
    parts = {"model_base": model_base, "vision_tower": vision_tower, "projector": projector}
    with trusting_projector_code(trust_projector_code):
        kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        if detect_format(folder) != "own":
            foreign = inspect_foreign_folder(folder, **parts, fallback_tower=fallback_tower)
            model = load_foreign_model(foreign, dtype, **kwargs)
        else:
            saved = inspect_folder(folder, **parts)
            model = (_load_full if saved.kind == "full" else _load_on_bases)(saved, dtype, **kwargs)
    if quantization is not None:
        quantize_language_model(model, quantization, compute_dtype=dtype, device=device)
    return model.to(device).eval()


def _load_full(saved: SavedFolder, dtype: torch.dtype, **kwargs) -> LlavaSaepForConditionalGeneration:
    try:
        model, info = LlavaSaepForConditionalGeneration.from_pretrained(
            saved.path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except Exception as error:  # safetensors, OS and transformers errors share no base class
        if isinstance(error, ValueError):
            raise
        raise UserError(f"the weights in {saved.path} cannot be read: {error}") from error
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise UserError(
            f"{saved.path}: {len(info['mismatched_keys'])} weights have another shape than config.json says, such as "
            f"{name!r}: found {tuple(found)}, expected {tuple(expected)}"
        )
    missing = [
        name for name in info["missing_keys"] if not (saved.config.tie_word_embeddings and name == "lm_head.weight")
    ]
    if missing:
        projector_part = [name for name in missing if name.startswith(PROJECTOR_PREFIX)]
        what = "no (or not all) projector weights" if projector_part else "not all weights"
        raise UserError(f"{saved.path} holds {what}: {len(missing)} are missing, such as {sorted(missing)[0]!r}")
    return model


def _load_on_bases(saved: SavedFolder, dtype: torch.dtype, **kwargs) -> LlavaSaepForConditionalGeneration:
    config = saved.config
    for path, field, flag in (
        (config.language_model_name_or_path, "language_model_name_or_path", "--model_base"),
        (config.vision_tower_name_or_path, "vision_tower_name_or_path", "--vision_tower"),
    ):
        if path is None or not _can_be_read(path):
            raise UserError(
                f"{saved.path}/config.json says {field}: {path!r}, which is no folder here, nor to be had from the "
                f"hub; name the folder or hub name that has it with {flag}"
            )
    model = build_model(
        language_model=config.language_model_name_or_path,
        vision_tower=config.vision_tower_name_or_path,
        projector=selection_from_config(config.projector),
        image_token_id=config.image_token_id,
        projector_weights=saved.path if saved.kind == "projector" else None,
        mm_patch_merge_type=config.mm_patch_merge_type,
        image_grid_pinpoints=config.image_grid_pinpoints,
        mm_use_im_start_end=config.mm_use_im_start_end,
        added_token_ids=config.added_token_ids or (),
        dtype=dtype,
        **kwargs,
    )
    if saved.kind == "lora":
        return _apply_lora(model, saved)
    with torch.no_grad():
        _load_embedding(model, find_projector_weights(saved.path))  # the others' rows, where these were trained too
    return model


def _apply_lora(model: LlavaSaepForConditionalGeneration, saved: SavedFolder) -> LlavaSaepForConditionalGeneration:
    from peft import PeftModel

    _load_non_lora_weights(model, saved.path)
    return PeftModel.from_pretrained(model, str(saved.path)).merge_and_unload()


def _load_non_lora_weights(model: nn.Module, folder: Path) -> None:
    """Load what was trained beside the adapter: the projector, and the tower where it was trained."""
    for name in NON_LORA_WEIGHTS_NAMES:
        if (folder / name).is_file():
            weights = read_weights_file(folder / name)
            unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
            if unexpected:
                raise UserError(f"{folder / name} has weights that the model lacks, such as {unexpected[0]!r}")
            break
    load_projector_weights(model, folder)


def load_processor(
    folder: str | Path,
    *,
    trust_projector_code: bool | None = None,
    model_base: str | None = None,
    fallback_tower: str | None = None,
) -> LlavaSaepProcessor:
    """Load the processor that training wrote beside a model, or make the one of a LLaVA or llava-hf folder.

    Args:
        model_base: as in `inspect_folder`.
        trust_projector_code, fallback_tower: as in `load_model`.
    Raises:
        UserError: there is no such folder, or it has no readable processor.
    """
    folder = local_folder(folder)
    if not folder.is_dir():  # transformers would ask the hub for a model of that name
        raise UserError(f"{folder} is not a folder; expected one that training wrote (its --output_dir)")
    with trusting_projector_code(trust_projector_code):
        if (folder / "config.json").is_file() and detect_format(folder) != "own":
            foreign = inspect_foreign_folder(folder, model_base=model_base, fallback_tower=fallback_tower)
            return build_foreign_processor(foreign)
        try:
            return LlavaSaepProcessor.from_pretrained(folder, backend="pil")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder} has no readable processor: {first_line(error)}") from error
