"""Tiny workloads: widths of 16 and 24 on a 4 x 6 grid, so that mixing two sizes up shows."""

from dataclasses import replace

import pytest
import torch

from llava_saep.bench.placement import Sizes
from llava_saep.bench.workload import TowerOutput, Workload, build_step
from projectors import PatchGrid, select_projector

SIZES = Sizes(vision_hidden_size=16, text_hidden_size=24, grid=PatchGrid(4, 6), num_vision_layers=6)


@pytest.fixture
def workload():
    """A batch of 2 in float32 on the processor, with a frozen tower."""
    return Workload(sizes=SIZES, batch_size=2, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def make_step(workload):
    """Builds one projector, ready to run."""

    def make(name, options=None, **changes):
        changed = replace(workload, **changes)
        selection = select_projector(name, options)
        config = selection.build_config(
            vision_hidden_size=SIZES.vision_hidden_size,
            text_hidden_size=SIZES.text_hidden_size,
            num_vision_layers=SIZES.num_vision_layers,
        )
        return build_step(selection, config, TowerOutput(changed))

    return make
