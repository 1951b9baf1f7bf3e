"""Copies that the profiler finds, against projectors whose copies are known by their text."""

import pytest
import torch
from torch.nn import functional

from llava_saep.bench.profiling import profile_step
from llava_saep.bench.workload import Step, TowerOutput
from projectors import Projector, ProjectorConfig

BATCH, PATCHES, CHANNELS = 2, 24, 16


class Copying(Projector):
    """Turns the map over in memory, makes it another number format and back, and multiplies it."""

    def __init__(self):
        super().__init__(_Config(vision_hidden_size=CHANNELS, text_hidden_size=CHANNELS))
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, features, grid):
        (tokens,) = features
        turned = tokens.transpose(1, 2).contiguous().transpose(1, 2)
        return turned.to(torch.bfloat16).to(torch.float32) * self.scale


class _Config(ProjectorConfig):
    def num_output_tokens(self, grid):
        return grid.num_patches


@pytest.fixture
def copies(workload):
    step = Step(Copying(), TowerOutput(workload))
    return profile_step(step).copies


def test_every_copy_is_found_with_its_bytes_and_reason(copies):
    forward = {(each.site.operator, each.site.kind): each.num_bytes for each in copies if each.site.phase == "forward"}
    numbers = BATCH * PATCHES * CHANNELS
    assert forward["aten::copy_", "other layout"] == 4 * numbers
    assert forward["aten::copy_", "float32 to bfloat16"] == 2 * numbers
    assert forward["aten::copy_", "bfloat16 to float32"] == 4 * numbers
    assert forward["aten::contiguous", ""] == forward["aten::clone", ""] == 4 * numbers


def test_operators_that_call_a_copy_are_listed_and_not_counted_again(workload):
    step = Step(Copying(), TowerOutput(workload))
    profile = profile_step(step)
    wrappers = {each.site.operator for each in profile.copies if each.is_wrapper}
    assert wrappers == {"aten::contiguous", "aten::clone", "aten::_to_copy"}
    counted = sum(each.num_bytes for each in profile.copies if each.site.operator == "aten::copy_")
    assert profile.num_copied_bytes == counted > 0


def test_concatenation_is_a_copy_of_all_its_parts(make_step):
    (cat,) = [each for each in profile_step(make_step("saep")).copies if each.site.operator == "aten::cat"]
    assert cat.site.phase == "forward" and cat.num_calls == 1
    assert cat.num_bytes == 4 * 3 * BATCH * PATCHES * CHANNELS  # three layers of a tower of six blocks


class Padding(Copying):
    """Repeats the last column of the map twice, then leaves the repeats away."""

    def forward(self, features, grid):
        feature_map = features[0].transpose(1, 2).unflatten(2, grid).contiguous()
        padded = functional.pad(feature_map, (0, 2, 0, 0), mode="replicate")
        return (padded[..., : grid.width] * self.scale).flatten(2).transpose(1, 2)


def test_operator_that_allocates_what_it_moves_is_measured_by_that(workload):
    copies = profile_step(Step(Padding(), TowerOutput(workload))).copies
    (pad,) = [each for each in copies if each.site.operator == "aten::replication_pad2d"]
    assert pad.num_bytes == 4 * BATCH * CHANNELS * 4 * 8  # a 4 x 6 grid becomes 4 x 8


class PaddingOfATurnedMap(Padding):
    """The kernel that pads writes its input in its own order first."""

    def forward(self, features, grid):
        padded = functional.pad(features[0].transpose(1, 2), (0, 8), mode="replicate")
        return padded[..., : grid.num_patches].transpose(1, 2) * self.scale


def test_copy_inside_an_operator_that_moves_data_is_that_operators(workload):
    copies = profile_step(Step(PaddingOfATurnedMap(), TowerOutput(workload))).copies
    inside = [each for each in copies if each.site.phase == "forward" and each.site.inside == "aten::pad"]
    assert [each.site.operator for each in inside] == ["aten::replication_pad1d"]
    assert inside[0].num_bytes == 4 * BATCH * CHANNELS * (24 + 32)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="other convolutions may rearrange their input")
def test_saep_moves_no_activation_but_to_bring_its_layers_together(make_step):
    """The bias of a Linear is written into its output before the product; the filters' gradient gets its layout."""
    moved = [
        each.site
        for each in profile_step(make_step("saep", train_tower=True)).copies
        if each.site.kind != "broadcast" and not each.is_wrapper
    ]
    activations = [site for site in moved if site.shape[:1] == (BATCH,)]
    assert [(site.phase, site.operator) for site in activations] == [("forward", "aten::cat")]


def test_shares_of_all_operators_make_one(make_step):
    operators = profile_step(make_step("mlp2x_gelu")).operators
    assert sum(each.share for each in operators) == pytest.approx(1)
    assert [each.self_seconds for each in operators] == sorted((each.self_seconds for each in operators), reverse=True)
    names = [each.operator for each in operators]
    assert len(names) == len(set(names))
    calls = {each.operator: each.num_calls for each in operators}
    # Two products forward, three backward: two weights' gradients and one input's.
    assert (calls["aten::addmm"], calls["aten::mm"]) == (2, 3)


def test_profile_leaves_no_gradients(make_step):
    step = make_step("linear")
    profile_step(step)
    assert step.projector.linear.weight.grad is None
