"""Features from a store in place of the tower: what is missing is computed and stored, or counted."""

import errno
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_saep.data.feature_cache import FeatureStore
from llava_saep.data.images import ImageSize
from llava_saep.model.cached_features import CachedVisionFeatures, fingerprint
from llava_saep.model.vision_tower import read_patch_features

VIEW = ImageSize(24, 24)
LAYERS = (1, -2)


def make_tower(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**(sizes | options), image_size=24, patch_size=6)).requires_grad_(False)


@pytest.fixture
def tower():
    return make_tower()


@pytest.fixture
def store(tmp_path):
    store = FeatureStore(tmp_path, {})
    store.open()
    return store


@pytest.fixture
def cached(store, tower):
    return CachedVisionFeatures(store, tower, layers=LAYERS, keep_cls_token=False, view=VIEW, cuts_images=True)


def make_batch(*stacks, keys=None, known=None):
    """A batch as the collator makes it; `known` has what is stored of some images."""
    known = known or {}
    keys = keys or [f"{index:032x}" for index in range(len(stacks))]
    return {
        "input_ids": torch.tensor([[1]]),
        "pixel_values": [torch.empty(0) if index in known else stack for index, stack in enumerate(stacks)],
        "vision_features": [known.get(index, ()) for index in range(len(stacks))],
        "image_lookups": [(key, False) for key in keys],
        "image_sizes": torch.tensor([[30, 40]] * len(stacks)),
    }


def test_stored_and_computed_features_join_in_the_order_of_the_images(cached, store, tower):
    stacks = [torch.randn(crops, 3, 24, 24) for crops in (1, 3, 2)]
    expected = read_patch_features(tower, torch.cat(stacks), LAYERS, False)
    first = cached.complete(make_batch(*stacks))
    assert first.keys() == {"input_ids", "image_sizes", "vision_features"}
    assert first["vision_features"].crop_counts == (1, 3, 2)
    assert first["vision_features"].view == VIEW
    stored = [store.path(f"{index:032x}") for index in range(3)]
    assert all(path.is_file() for path in stored)
    middle = tuple(layer[1:4] for layer in expected)
    second = cached.complete(make_batch(*stacks, known={1: middle}))
    for output in (first, second):
        for layer, reference in zip(output["vision_features"].layers, expected, strict=True):
            # One call over other crops: the sums of a row may be done in another order.
            torch.testing.assert_close(layer, reference, rtol=0, atol=1e-5)
    assert dict(+cached.counts) == {"computed": 5, "read": 1}


def test_zero_image_of_a_text_only_batch_is_computed_once_and_never_stored(cached, store, tower):
    zeros = torch.zeros(1, 3, 24, 24)
    (expected, _) = read_patch_features(tower, zeros, LAYERS, False)
    for _ in range(2):
        output = cached.complete(make_batch(zeros, keys=[""]))
        assert torch.equal(output["vision_features"].layers[0], expected)
        tower.requires_grad_(False)
        for parameter in tower.parameters():  # a second run of the tower would show
            parameter.zero_()
    assert not list(store.folder.rglob("*.features"))
    assert cached.counts["computed"] == 0


def test_full_disk_changes_no_features_and_is_counted(cached, store, tower, monkeypatch):
    def refuse(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    stack = torch.randn(2, 3, 24, 24)
    output = cached.complete(make_batch(stack))
    expected = read_patch_features(tower, stack, LAYERS, False)
    for layer, reference in zip(output["vision_features"].layers, expected, strict=True):
        assert torch.equal(layer, reference)
    cached.complete(make_batch(stack))
    assert dict(+cached.counts) == {"computed": 2, "not stored": 2}


def test_tower_is_left_in_the_mode_it_was_in(cached, tower):
    """Dropout of a tower in training mode would be stored for ever; the model's own mode is not ours to change."""
    tower.train()
    tower.config.attention_dropout = 0.5
    for layer in tower.modules():
        if hasattr(layer, "dropout") and isinstance(layer.dropout, float):
            layer.dropout = 0.5
    stack = torch.randn(1, 3, 24, 24)
    one, other = (cached.complete(make_batch(stack))["vision_features"].layers[0] for _ in range(2))
    assert torch.equal(one, other)
    assert tower.training


def test_fingerprint_tells_towers_apart():
    reference = fingerprint(make_tower())
    assert fingerprint(make_tower()) == reference
    changed = make_tower()
    changed.get_parameter("embeddings.patch_embedding.weight").data[0, 0, 0, 0] += 1e-3
    others = [make_tower(seed=1), make_tower(layer_norm_eps=1e-6), make_tower().to(torch.bfloat16), changed]
    assert len({reference, *map(fingerprint, others)}) == 5
