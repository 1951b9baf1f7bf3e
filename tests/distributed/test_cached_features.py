"""`--cache_vision_features`: a run that reads what its tower saw trains as one whose tower looks every time."""

import functools
import re

import pytest

from tests.fixtures.ranks import train_on_ranks
from tests.fixtures.tiny import write_image, write_vision_tower
from tests.fixtures.training import deepspeed_json, logged, training_flags

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

TOLERANCE = 1e-5
"""Two ranks against one process: sums in float32 in another order, about 1e-6 for losses near 6."""

KINDS = {
    "projector": {"tune_mm_mlp_adapter": True},
    "crops": {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "model_max_length": 1024},
    "two_towers": {"tune_mm_mlp_adapter": True},
    "packed": {"packing": True, "tune_mm_mlp_adapter": True, "dataloader_num_workers": 2},
    "bf16": {"bf16": True},
    "bf16_zero2": {"bf16": True, "deepspeed": deepspeed_json(2)},
}


@pytest.fixture(scope="module")
def bases_of(bases, tmp_path_factory):
    """The usual bases, or for "two_towers" a second tower beside the first."""
    second = write_vision_tower(tmp_path_factory.mktemp("second"), num_layers=3, seed=1)
    pair = bases._replace(vision_tower=f"{bases.vision_tower},{second}")
    return lambda kind: pair if kind == "two_towers" else bases


@pytest.fixture(scope="module")
def alone(bases_of, conversations, tmp_path_factory):
    """Losses and gradient norms of one process that has no cache, by what it trains."""

    @functools.cache
    def run(kind, batch_size):
        out = tmp_path_factory.mktemp(f"alone_{kind}")
        flags = training_flags(
            bases_of(kind), conversations, out, per_device_train_batch_size=batch_size, **KINDS[kind]
        )
        train_on_ranks(flags, world_size=1, output_dir=out)
        return logged(out, "loss"), logged(out, "grad_norm")

    return run


def train_cached(bases, data, out, cache, *, kind="projector", world_size=1, batch_size=4, **more):
    """Train as `alone` does, with a cache -> what rank 0 said."""
    flags = training_flags(
        bases, data, out, per_device_train_batch_size=batch_size, cache_vision_features=cache, **KINDS[kind], **more
    )
    train_on_ranks(flags, world_size=world_size, output_dir=out)
    return (out / "ranks" / "rank_0.txt").read_text()


def stored(cache):
    return sorted(cache.rglob("*.features"))


@pytest.mark.parametrize(
    "kind",
    [
        *("projector", "crops"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("two_towers", "packed", "bf16", "bf16_zero2")),
    ],
)
def test_losses_are_those_of_a_run_without_cache_to_the_last_bit(kind, alone, bases_of, conversations, tmp_path):
    """The first run computes everything in its first epoch, the second nothing; batches are the same ones."""
    for name, said in (("first", r"4 computed, \d+ read"), ("second", r"\d+ read")):
        output = train_cached(bases_of(kind), conversations, tmp_path / name, tmp_path / "cache", kind=kind)
        assert re.search(f"vision features: {said}\n", output)
        assert logged(tmp_path / name, "loss") == alone(kind, 4)[0]
        assert logged(tmp_path / name, "grad_norm") == alone(kind, 4)[1]
    assert len(stored(tmp_path / "cache")) == 4
    assert len(set(alone(kind, 4)[0])) > 1, "nothing is learnt, so equal losses would mean nothing"


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_ranks_need_not_find_the_same_images_stored(stage, alone, bases_of, conversations, tmp_path):
    """Rank 0 has an image in every step and finds some of them, rank 1 has none: under ZeRO-3 nobody waits for ever."""
    cache = tmp_path / "cache"
    train_cached(bases_of("projector"), conversations, tmp_path / "first", cache)
    missing, damaged, shortened, _ = stored(cache)
    missing.unlink()
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    shortened.write_bytes(shortened.read_bytes()[:-100])
    output = train_cached(
        bases_of("projector"),
        conversations,
        tmp_path / "second",
        cache,
        world_size=2,
        batch_size=1,
        deepspeed=deepspeed_json(stage),
    )
    assert "vision features: 3 computed, 2 damaged," in output
    losses, norms = alone("projector", 2)
    assert logged(tmp_path / "second", "loss") == pytest.approx(losses, abs=TOLERANCE, rel=0)
    assert logged(tmp_path / "second", "grad_norm") == pytest.approx(norms, rel=TOLERANCE)
    assert len(stored(cache)) == 4


@pytest.mark.slow
def test_another_tower_image_or_preparation_is_not_taken_for_the_same(alone, bases_of, conversations, tmp_path):
    """What is stored for one is of no use to the other, and stays."""
    cache = tmp_path / "cache"
    train_cached(bases_of("projector"), conversations, tmp_path / "first", cache)
    other = bases_of("projector")._replace(vision_tower=write_vision_tower(tmp_path / "other", seed=7))
    for name, bases, more in (
        ("tower", other, {}),
        ("aspect", bases_of("projector"), {"image_aspect_ratio": "pad"}),
        ("layers", bases_of("projector"), {"mm_vision_select_layer": -1, "mm_projector_type": "linear"}),
    ):
        output = train_cached(bases, conversations, tmp_path / name, cache, **more)
        assert "vision features: 4 computed, 4 read" in output, name
    assert len(stored(cache)) == 16
    image = min(conversations.image_folder.iterdir())
    before = image.read_bytes(), image.stat()
    try:
        write_image(image, seed=99)
        output = train_cached(bases_of("projector"), conversations, tmp_path / "image", cache)
        assert "vision features: 1 computed, 7 read" in output
    finally:
        image.write_bytes(before[0])
