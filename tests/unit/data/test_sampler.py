"""The order of samples is LLaVA's, decided by seed and epoch."""

import pytest
import torch

from llava_saep.data.sampler import LengthGroupedSampler, length_grouped_indices, modality_grouped_indices

from .conftest import read_golden

CASES = read_golden("sampler_and_stopping.json")["sampler"]


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", CASES)
def test_modality_grouping_equals_llavas(case):
    order = modality_grouped_indices(case["lengths"], case["batch_size"], case["world_size"], _seeded(7))
    assert order == case["modality_manual_seed7"]


@pytest.mark.parametrize("case", CASES)
def test_length_grouping_equals_llavas(case):
    lengths = [abs(length) for length in case["lengths"]]
    order = length_grouped_indices(lengths, case["batch_size"], case["world_size"], _seeded(5))
    assert order == case["length_generator_seed5"]


def _lengths(num_samples):
    lengths = torch.randint(1, 500, (num_samples,), generator=_seeded(0))
    signs = torch.randint(0, 2, (num_samples,), generator=_seeded(1)) * 2 - 1
    return (lengths * signs).tolist()


@pytest.mark.parametrize("num_samples", [1, 7, 64, 257])
@pytest.mark.parametrize("group_by_modality", [True, False])
def test_every_sample_comes_once(num_samples, group_by_modality):
    sampler = LengthGroupedSampler(
        _lengths(num_samples), batch_size=4, world_size=3, seed=0, group_by_modality=group_by_modality
    )
    assert sorted(sampler) == list(range(num_samples))
    assert len(sampler) == num_samples


def test_steps_hold_one_modality_and_batches_similar_lengths():
    lengths = _lengths(600)
    order = list(LengthGroupedSampler(lengths, batch_size=4, world_size=2, seed=0))
    steps = [[lengths[index] for index in order[start : start + 8]] for start in range(0, 600, 8)]
    mixed = [step for step in steps if len({length > 0 for length in step}) == 2]
    assert len(mixed) <= 2  # the left-over samples at the end


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = LengthGroupedSampler(_lengths(100), batch_size=4, world_size=2, seed=seed)
        sampler.set_epoch(epoch)
        torch.rand(1)  # the global random state plays no part
        return list(sampler)

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(3, 0)
    assert order(3, 1) != order(4, 1)


def test_text_only_data_is_grouped_by_length_too():
    lengths = [-10, -500] * 8
    order = modality_grouped_indices(lengths, 2, 2, _seeded(0))
    assert order == length_grouped_indices([abs(length) for length in lengths], 2, 2, _seeded(0))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="sample 1 has length 0"):
        LengthGroupedSampler([3, 0], batch_size=1, world_size=1, seed=0)
    with pytest.raises(ValueError, match="must be at least 1, not 0 and 1"):
        LengthGroupedSampler([3], batch_size=0, world_size=1, seed=0)
