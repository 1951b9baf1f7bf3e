"""Features of a frozen vision tower from a store in place of the tower, for `--cache_vision_features`.

In a cached run the model never runs its tower: features go in, and what the store lacks is computed beside the model by
a tower that is whole on this rank. So no rank waits for another over what happens to be stored where, under ZeRO-3 too.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from llava_saep.data.feature_cache import FeatureStore, ImageFeatures
from llava_saep.data.images import ImageSize
from llava_saep.model.parts import loading_whole
from llava_saep.model.vision_tower import VisionFeatures, read_patch_features

logger = logging.getLogger(__name__)

_NOT_OF_THE_TOWER = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Entries of a config that do not change what the tower computes, or that its weights tell."""


def whole_tower(tower: PreTrainedModel) -> PreTrainedModel:
    """Return the tower itself, or, where ZeRO-3 keeps it in pieces on the ranks, a copy in one piece.

    Every rank must call it. The copy has the tower's dtype and is on the CPU.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in tower.parameters()):
        return tower
    import deepspeed

    attention = tower.config._attn_implementation
    with loading_whole(), torch.random.fork_rng(devices=[]):  # the run's random numbers stay as they are without it
        copy = AutoModel.from_config(tower.config, dtype=tower.dtype, attn_implementation=attention)
    for target, source in zip(copy.parameters(), tower.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([source]):
            target.data.copy_(source.data)
    for target, source in zip(copy.buffers(), tower.buffers(), strict=True):
        target.copy_(source)
    return copy.requires_grad_(False).eval()


def fingerprint(tower: nn.Module) -> str:
    """Return a checksum of the tower's config and weights, in their dtype."""
    config = {name: value for name, value in tower.config.to_dict().items() if name not in _NOT_OF_THE_TOWER}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class CachedVisionFeatures:
    """Turns batches with features for some images and pixels for the others into batches with features for all.

    Args:
        store: where features are kept.
        tower: whole on this rank, and frozen.
        layers, keep_cls_token: what the projector reads, as in `read_patch_features`.
        view: size in pixels of what the tower sees.
        cuts_images: each image is a stack of crops.
    """

    def __init__(
        self,
        store: FeatureStore,
        tower: PreTrainedModel,
        *,
        layers: Sequence[int],
        keep_cls_token: bool,
        view: ImageSize,
        cuts_images: bool,
    ) -> None:
        self.store = store
        self.counts: Counter[str] = Counter()
        self._tower = tower
        self._layers = tuple(layers)
        self._keep_cls_token = keep_cls_token
        self._view = view
        self._cuts_images = cuts_images
        self._stand_in: tuple[Tensor, ...] | None = None

    def complete(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Compute what is missing, store it, and return the batch as the model takes it.

        Args:
            batch: with `image_lookups`, one (key, is_damaged) per image, `vision_features`, one tuple of layers per
                image, empty where nothing is stored, and `pixel_values`, one (crops, 3, height, width) tensor per
                image, empty where something is; `image_sizes` (images, 2) before preprocessing. A key "" is the zero
                image of a batch without images.
        Returns:
            the batch with a single `VisionFeatures`, and without pixels and keys.
        """
        rest = dict(batch)
        lookups, pixels = rest.pop("image_lookups"), rest.pop("pixel_values")
        layers = [tuple(known) for known in rest.pop("vision_features")]
        missing = [index for index, known in enumerate(layers) if not known]
        computed = self._compute([pixels[index] for index in missing], [lookups[index][0] for index in missing])
        sizes = rest["image_sizes"].tolist() if missing else []  # which waits for the device
        for index, features in zip(missing, computed, strict=True):
            layers[index] = features
            self._store(*lookups[index], ImageFeatures(ImageSize(*sizes[index]), features))
        self.counts["read"] += len(layers) - len(missing)
        joined = tuple(torch.cat(parts) for parts in zip(*layers, strict=True))
        counts = tuple(len(features[0]) for features in layers) if self._cuts_images else None
        return {**rest, "vision_features": VisionFeatures(joined, counts, self._view)}

    def _compute(self, pixels: Sequence[Tensor], keys: Sequence[str]) -> list[tuple[Tensor, ...]]:
        """Run the tower once over all crops -> per image, one (crops, patches, channels) tensor per layer."""
        if not pixels:
            return []
        if keys == [""] and self._stand_in is not None:
            return [self._stand_in]
        tower = self._tower.to(pixels[0].device)
        was_training = tower.training
        tower.eval()
        try:
            with torch.no_grad():
                features = read_patch_features(tower, torch.cat(tuple(pixels)), self._layers, self._keep_cls_token)
        finally:
            tower.train(was_training)
        parts = [layer.split([len(stack) for stack in pixels]) for layer in features]
        computed = list(zip(*parts, strict=True))
        if keys == [""]:
            self._stand_in = computed[0]
        return computed

    def _store(self, key: str, is_damaged: bool, features: ImageFeatures) -> None:
        if not key:
            return
        self.counts["computed"] += 1
        self.counts["damaged"] += is_damaged
        if not self.store.write(key, features):
            self.counts["not stored"] += 1
