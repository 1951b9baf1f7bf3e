"""`--cache_vision_features`: what stored vision features depend on, how large they get, and what came of them."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch

from llava_saep.data.dataset import ConversationDataset
from llava_saep.data.feature_cache import FeatureStore, num_bytes
from llava_saep.data.images import GridPinpoints, ImageSize
from llava_saep.model import LlavaSaepConfig
from llava_saep.model.cached_features import CachedVisionFeatures, fingerprint, whole_tower
from llava_saep.model.vision_tower import is_frozen, resolve_layers
from llava_saep.train import distributed
from llava_saep.train.config import DataConfig
from llava_saep.train.trainer import LlavaTrainer

logger = logging.getLogger(__name__)


def open_feature_cache(trainer: LlavaTrainer, dataset: ConversationDataset, config: DataConfig) -> None:
    """Have the run read what its frozen tower sees from `config.cache_vision_features`, and store what is missing.

    Every rank must call it.

    Raises:
        UserError: nothing can be written there.
    """
    model = trainer.base_model.model
    assert is_frozen(model.vision_tower)
    tower = whole_tower(model.vision_tower)
    reads = model.multi_modal_projector.config
    checksum = distributed.broadcast_object(fingerprint(tower) if distributed.is_rank_zero() else None)
    mixed = trainer.accelerator.mixed_precision if trainer.accelerator.native_amp else "no"
    description = {
        "tower": model.config.vision_tower_name_or_path,
        "tower_checksum": checksum,
        "layers": resolve_layers(tower.config, reads.vision_layers),
        "keep_cls_token": reads.keep_cls_token,
        "dtype": str(tower.dtype),
        "mixed_precision": mixed,
        "preprocessing": _preprocessing(dataset, config),
    }
    store = FeatureStore(config.cache_vision_features, description)
    store.open()
    pinpoints = dataset.image_grid_pinpoints if config.image_aspect_ratio == "anyres" else ()
    bytes_per_image = _bytes_per_image(model.config, dataset.image_size, pinpoints, tower.dtype)
    datasets = [each for each in (dataset, trainer.eval_dataset) if each is not None]
    _announce(store, sum(each.num_images for each in datasets), bytes_per_image)
    for each in datasets:
        each.use_feature_store(store)
    trainer.cached_features = CachedVisionFeatures(
        store,
        tower,
        layers=reads.vision_layers,
        keep_cls_token=reads.keep_cls_token,
        view=dataset.image_size,
        cuts_images=config.image_aspect_ratio == "anyres",
    )


def _preprocessing(dataset: ConversationDataset, config: DataConfig) -> dict[str, Any]:
    """Everything between an image's file and the tower's input."""
    cuts_images = config.image_aspect_ratio == "anyres"
    return {
        "image_processor": dataset.image_processor.to_dict(),
        "image_aspect_ratio": config.image_aspect_ratio,
        "image_grid_pinpoints": dataset.image_grid_pinpoints if cuts_images else (),
        "apply_exif_orientation": config.apply_exif_orientation,
        "jpeg_draft": config.jpeg_draft,
    }


def _bytes_per_image(
    config: LlavaSaepConfig, view: ImageSize, grid_pinpoints: GridPinpoints, dtype: torch.dtype
) -> int:
    """How long the file of an image is at most."""
    reads = config.projector_config
    num_patches = config.patch_grid(*view).num_patches + reads.keep_cls_token
    crops = [width * height // (view.width * view.height) + 1 for width, height in grid_pinpoints]
    shape = (max(crops, default=1), num_patches, reads.vision_hidden_size)
    return num_bytes([shape] * len(reads.vision_layers), dtype)


def _announce(store: FeatureStore, num_images: int, bytes_per_image: int) -> None:
    needed, free = num_images * bytes_per_image, store.free_bytes()
    log = logger.warning if needed > free else logger.info
    log(
        "--cache_vision_features: up to %.2f MB for each of %d images, %.1f GB in all with what is stored already; "
        "%.1f GB are free in %s%s",
        bytes_per_image / 1e6,
        num_images,
        needed / 1e9,
        free / 1e9,
        store.folder,
        ". If they do not suffice, the run goes on without storing the rest" if needed > free else "",
    )


def report_feature_cache(trainer: LlavaTrainer) -> None:
    """Log how many images' features were read, computed, damaged and not stored, on all ranks together."""
    if trainer.cached_features is None:
        return
    counts = sum(distributed.gather_on_rank_zero(trainer.cached_features.counts), Counter())
    log = logger.warning if counts.get("not stored") else logger.info
    log("vision features: %s", ", ".join(f"{count} {what}" for what, count in sorted(counts.items()) if count))
