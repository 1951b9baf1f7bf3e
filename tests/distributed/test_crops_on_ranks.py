"""Images cut into different numbers of crops: two ranks under ZeRO do what one process does with the same batch."""

import functools
import itertools

import pytest

from llava_saep.model.loading import load_model
from tests.fixtures.ranks import train_on_ranks
from tests.fixtures.tiny import write_data, write_image, write_vision_tower
from tests.fixtures.training import deepspeed_json, logged, training_flags

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

TOLERANCE = 1e-5
"""Sums in float32 in another order differ by a few units in the last place: about 1e-6 for losses near 6."""

CUTTING = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "model_max_length": 1024}
KINDS = {
    "full": {},
    "projector": {"tune_mm_mlp_adapter": True},
    "two_towers": {"unfreeze_mm_vision_tower": True, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of 3, 4 and 5 crops; with one sample per rank, rank 1 has a text-only micro-batch in every step."""
    data = write_data(tmp_path_factory.mktemp("crops"), num_records=8, text_only_every=2)
    sizes = itertools.cycle([(36, 36), (72, 20), (24, 40), (40, 36)])
    for path, (height, width) in zip(sorted(data.image_folder.iterdir()), sizes, strict=False):
        write_image(path, height=height, width=width)
    return data


@pytest.fixture(scope="module")
def bases_of(bases, tmp_path_factory):
    """The usual bases, or for "two_towers" a second tower beside the first."""
    second = write_vision_tower(tmp_path_factory.mktemp("second"), num_layers=3, seed=1)
    pair = bases._replace(vision_tower=f"{bases.vision_tower},{second}")
    return lambda kind: pair if kind == "two_towers" else bases


@pytest.fixture(scope="module")
def alone(bases_of, data, tmp_path_factory):
    """Losses and gradient norms of one process without DeepSpeed, by what it trains."""

    @functools.cache
    def run(kind):
        output_dir = tmp_path_factory.mktemp(f"alone_{kind}")
        flags = training_flags(
            bases_of(kind), data, output_dir, per_device_train_batch_size=2, **CUTTING, **KINDS[kind]
        )
        train_on_ranks(flags, world_size=1, output_dir=output_dir)
        return logged(output_dir, "loss"), logged(output_dir, "grad_norm")

    return run


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("full", 3),
        ("projector", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("full", 2), ("projector", 3), ("two_towers", 3))),
    ],
)
def test_training_on_crops_equals_one_process(kind, stage, alone, bases_of, data, tmp_path):
    flags = training_flags(
        bases_of(kind),
        data,
        tmp_path,
        deepspeed=deepspeed_json(stage),
        per_device_train_batch_size=1,
        **CUTTING,
        **KINDS[kind],
    )
    train_on_ranks(flags, world_size=2, output_dir=tmp_path)
    losses, norms = alone(kind)
    assert max(losses) - min(losses) > 100 * TOLERANCE, "nothing is learnt, so equal losses would mean nothing"
    assert logged(tmp_path, "loss") == pytest.approx(losses, abs=TOLERANCE, rel=0)
    assert logged(tmp_path, "grad_norm") == pytest.approx(norms, rel=TOLERANCE)
    assert load_model(tmp_path).model.image_newline is not None
