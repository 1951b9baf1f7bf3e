"""What a run is made of, from the configs of its parts alone: processor, tokenizer, projector, image tokens.

Nothing here builds a model or waits for other ranks, so that mistakes show in seconds, also where ranks are launched.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from llava_saep.data.images import ImageProcessor, default_grid_pinpoints, parse_grid_pinpoints, processed_image_size
from llava_saep.errors import UserError
from llava_saep.model import LlavaSaepConfig, LlavaSaepProcessor
from llava_saep.model.combined_towers import split_tower_names
from llava_saep.model.formats import read_base_config
from llava_saep.model.loading import build_processor, load_processor, make_config
from llava_saep.model.parts import complete_tokenizer, read_tokenizer
from llava_saep.model.projector_check import check_projector_weights
from llava_saep.model.projector_selection import remember_selection
from llava_saep.model.reading import read_image_processor
from llava_saep.model.vocabulary import START_END_TOKENS, add_special_tokens, check_special_tokens, with_room_for
from llava_saep.train.config import DataConfig, ModelConfig, RunConfig

logger = logging.getLogger(__name__)


def plan_model(config: RunConfig) -> tuple[LlavaSaepProcessor, LlavaSaepConfig]:
    """Make processor and config from the parts' configs, before any weights are read or ranks wait for each other.

    Raises:
        UserError, ProjectorError: a part cannot be read, the projector cannot work between them, the weights that it
            shall start from are not its own, or the tokenizer is not the language model's.
    """
    processor, model_config = _plan(config)
    check_special_tokens(processor.tokenizer, model_config.text_config.vocab_size)
    processor.apply_exif_orientation = config.data.apply_exif_orientation
    model_config.image_aspect_ratio = config.data.image_aspect_ratio
    _check_named_layers(config.model, model_config)
    _warn_about_absent_tokens(config.data, model_config)
    side = model_config.vision_config.image_size
    model_config.num_image_tokens(model_config.patch_grid(side, side))  # refuses layers and grids that cannot be
    if config.model.projector_weights is not None:
        check_projector_weights(config.model.projector_weights, model_config)
    return processor, model_config


def _warn_about_absent_tokens(data: DataConfig, model_config: LlavaSaepConfig) -> None:
    """Say that `plain` has no place for <im_start> and <im_end>: LLaVA drops them, and so they learn nothing there."""
    if model_config.mm_use_im_start_end and data.conversation_template in ("plain", "v0_plain"):
        logger.warning(
            "--version %s writes images without <im_start> and <im_end>, as in LLaVA: in this run their embedding "
            "learns nothing; --version v1 would write them",
            data.conversation_template,
        )


def _check_named_layers(model: ModelConfig, model_config: LlavaSaepConfig) -> None:
    """Refuse a layer that the tower lacks, also where the projector does not apply it."""
    depth = model_config.vision_config.num_hidden_layers
    for layer in model.named_layers:
        if not -(depth + 1) <= layer <= depth:
            raise UserError(
                f"--mm_vision_select_layer {layer}: the vision tower has {depth} blocks, so layers run from "
                f"{-(depth + 1)} to {depth}"
            )


def _plan(config: RunConfig) -> tuple[LlavaSaepProcessor, LlavaSaepConfig]:
    model = config.model
    base = read_base_config(model.language_model, "--model_name_or_path", fallback_tower=model.vision_tower)
    if isinstance(base, LlavaSaepConfig):
        return _plan_from_saved(config, base)
    tower = model.tower_for_language_model
    if tower is None:
        raise UserError(
            "--vision_tower is missing: expected a vision tower (folder or hub name), unless --model_name_or_path is "
            "a model that a run saved"
        )
    tokenizer = read_tokenizer(model.language_model)
    added = add_special_tokens(tokenizer, START_END_TOKENS if model.use_im_start_end else ())
    complete_tokenizer(tokenizer)
    model_config = make_config(
        language_model=model.language_model,
        vision_tower=tower,
        projector=model.projector,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        mm_use_im_start_end=bool(model.use_im_start_end),
        added_token_ids=added,
        **_crops(config, read_image_processor(tower)),
    )
    processor = build_processor(
        language_model=model.language_model,
        vision_tower=tower,
        model_config=model_config,
        tokenizer=tokenizer,
        image_aspect_ratio=config.data.image_aspect_ratio,
        conversation_template=config.data.conversation_template,
    )
    return processor, model_config


def _crops(config: RunConfig, image_processor: ImageProcessor, saved: LlavaSaepConfig | None = None) -> dict[str, Any]:
    """Say how images are cut and put together: as the flags do, else the saved model, else as LLaVA-1.6, flat."""
    merge_type = "flat" if saved is None else saved.mm_patch_merge_type
    pinpoints = () if saved is None else parse_grid_pinpoints(saved.image_grid_pinpoints)
    if config.data.image_aspect_ratio == "anyres":
        merge_type = config.model.mm_patch_merge_type or merge_type
        pinpoints = config.model.image_grid_pinpoints or pinpoints
        pinpoints = pinpoints or default_grid_pinpoints(processed_image_size(image_processor))
    return {"mm_patch_merge_type": merge_type, "image_grid_pinpoints": pinpoints}


def _plan_from_saved(config: RunConfig, base: LlavaSaepConfig) -> tuple[LlavaSaepProcessor, LlavaSaepConfig]:
    """Plan a run that goes on from a saved model: its tower, its tokenizer, and its projector unless one is named.

    Raises:
        UserError: a flag asks for another tower, or for other layers of it than the kept projector reads.
    """
    planned = copy.deepcopy(base)
    _check_saved_tower(config.model, base)
    if config.model.keeps_saved_projector:
        _check_saved_projector(config.model, base)
    else:
        remember_selection(config.model.projector)
        planned.projector = config.model.projector.to_dict()
    saved = load_processor(config.model.language_model, fallback_tower=config.model.vision_tower)
    crops = _crops(config, saved.image_processor, base)
    planned.mm_patch_merge_type = crops["mm_patch_merge_type"]
    planned.image_grid_pinpoints = [list(pair) for pair in crops["image_grid_pinpoints"]] or None
    if config.model.use_im_start_end is not None:
        planned.mm_use_im_start_end = config.model.use_im_start_end
    added = add_special_tokens(saved.tokenizer, START_END_TOKENS if planned.mm_use_im_start_end else ())
    planned.added_token_ids = list(added) or None
    planned.text_config = with_room_for(planned.text_config, added)
    processor = LlavaSaepProcessor.from_model_config(
        planned,
        image_processor=saved.image_processor,
        tokenizer=saved.tokenizer,
        image_aspect_ratio=config.data.image_aspect_ratio,
        conversation_template=config.data.conversation_template,
    )
    processor.tokenizer.padding_side = "right"
    return processor, planned


def _check_saved_tower(model: ModelConfig, base: LlavaSaepConfig) -> None:
    """Refuse a tower that is not the saved model's own, which would otherwise be silently used in its place."""
    own = base.vision_tower_name_or_path
    accepted = {as_lasting_path(path) for path in (own, model.language_model) if path is not None}
    if model.vision_tower is not None and as_lasting_path(model.vision_tower) not in accepted:
        raise UserError(
            f"--vision_tower {model.vision_tower}: the model in {model.language_model} brings its own tower (from "
            f"{own}); drop --vision_tower, or start from a language model"
        )


def _check_saved_projector(model: ModelConfig, base: LlavaSaepConfig) -> None:
    """Refuse options from flags on the tower's layers that the saved projector, which is kept, does not have.

    LLaVA's scripts always name a single layer; a projector that combines several ignores it, as a fresh one does.
    """
    num_states = base.vision_config.num_hidden_layers + 1  # the embeddings' state comes first
    asked, kept = model.projector.options, base.projector_config
    layers = [layer % num_states for layer in asked.get("vision_layers", kept.vision_layers)]
    kept_layers = [layer % num_states for layer in kept.vision_layers]
    name = base.projector["name"]
    advice = f"name it to start a fresh one (--mm_projector_type {name}), or drop the flag"
    if len(layers) == 1 < len(kept_layers):
        logger.warning("--mm_vision_select_layer is not applied: the saved %s combines several layers", name)
    elif layers != kept_layers:
        raise UserError(
            f"--mm_vision_select_layer: the saved {name} projector reads layer(s) {list(kept.vision_layers)} and not "
            f"{list(asked['vision_layers'])}; {advice}"
        )
    if asked.get("keep_cls_token", False) and not kept.keep_cls_token:
        raise UserError(f"--mm_vision_select_feature cls_patch: the saved {name} projector reads none; {advice}")


def as_lasting_path(name_or_path: str) -> str:
    """Make the paths of folders absolute; of towers side by side, each."""
    names = split_tower_names(name_or_path)
    return ",".join(str(Path(name).resolve()) if Path(name).is_dir() else name for name in names)
