"""Which GPU a rank takes."""

import pytest
import torch

from llava_saep.evaluation.ranks import device_of_rank


@pytest.mark.parametrize(
    ("device", "num_ranks", "expected"),
    [
        (None, 1, None),
        (None, 4, "cuda:1"),
        ("cuda", 4, "cuda:1"),  # the first GPU would have to hold all of them
        ("cuda:0", 4, "cuda:0"),
        ("cpu", 4, "cpu"),
    ],
)
def test_ranks_of_one_machine_take_a_gpu_each(monkeypatch, device, num_ranks, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of_rank(device) == expected


def test_without_a_gpu_the_choice_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert device_of_rank(None) is None
