"""Presets: names that stand for a projector with some options fixed and others given other defaults."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from projectors import (
    PatchGrid,
    Projector,
    ProjectorConfig,
    ProjectorError,
    ProjectorPreset,
    ProjectorSelection,
    option,
    register_projector,
    registered_presets,
    registered_projectors,
    select_projector,
)


@dataclass(frozen=True, kw_only=True)
class ToyConfig(ProjectorConfig):
    width: int = option(1, "a width", minimum=1)
    depth: int = option(1, "a depth", minimum=1)

    def num_output_tokens(self, grid):
        return grid.num_patches


class Toy(Projector):
    """Never built here."""


def register_toy(**presets):
    register_projector("toy", config=ToyConfig, summary="A toy.", token_formula="H * W", presets=presets)(Toy)


def test_a_preset_selects_the_projector_with_its_options():
    selection = select_projector("saep_dw_pw", {"stride": 3})
    assert (selection.name, dict(selection.options)) == ("saep", {"order": "dw_pw", "stride": 3})


def test_a_checkpoint_stores_the_projector_and_not_the_presets_name():
    stored = select_projector("saep_single_layer").to_dict()
    assert stored == {"name": "saep", "provider": "built-in", "options": {"vision_layers": [-2]}}
    assert ProjectorSelection.from_dict(stored) == select_projector("saep", {"vision_layers": [-2]})


def test_another_value_for_what_the_name_means_is_refused():
    with pytest.raises(ProjectorError, match="saep_dw_pw.*order=dw_pw.*pw_dw"):
        select_projector("saep_dw_pw", {"order": "pw_dw"})
    assert select_projector("saep_dw_pw", {"order": "dw_pw"}).options == {"order": "dw_pw"}


def test_defaults_of_a_preset_give_way_to_the_user(scratch_registry):
    register_toy(toy_deep=ProjectorPreset({"depth": 3}, "Deep.", defaults={"width": 8}))
    assert select_projector("toy_deep").options == {"depth": 3, "width": 8}
    assert select_projector("toy_deep", {"width": 2}).options == {"depth": 3, "width": 2}


def test_presets_are_listed_beside_the_projectors():
    assert {"saep_single_layer", "saep_no_depthwise", "saep_dw_pw", "saep_no_shortcut"} <= set(registered_presets())
    assert not set(registered_presets()) & set(registered_projectors())


@pytest.mark.parametrize("taken", ["saep", "deco", "saep_dw_pw", "toy"])
def test_a_presets_name_must_be_free(scratch_registry, taken):
    if taken == "toy":
        register_toy()
        with pytest.raises(ProjectorError, match="'toy' is already registered"):
            register_toy()
        return
    with pytest.raises(ProjectorError, match=f"'{taken}' is already registered"):
        register_toy(**{taken: ProjectorPreset({}, "Taken.")})


def test_a_projector_cannot_take_a_presets_name(scratch_registry):
    with pytest.raises(ProjectorError, match="'saep_dw_pw' is already registered"):
        register_projector("saep_dw_pw", config=ToyConfig, summary="A toy.")(Toy)


@pytest.mark.parametrize("preset", [ProjectorPreset({"dept": 3}, "x"), ProjectorPreset({}, "x", {"depth": 0})])
def test_options_of_a_preset_must_be_the_projectors(scratch_registry, preset):
    with pytest.raises(ProjectorError, match="dept"):
        register_toy(toy_deep=preset)


def test_a_misspelt_preset_is_named():
    with pytest.raises(ProjectorError, match="Did you mean 'saep_no_depthwise'"):
        select_projector("saep_no_depthwis")


def test_saep_without_the_depthwise_convolution_is_average_pooling_of_the_fused_layers():
    selection = select_projector("saep_no_depthwise", {"norm": "none"})
    config = selection.build_config(vision_hidden_size=8, text_hidden_size=12, num_vision_layers=6)
    projector = selection.build(config).eval()
    features = [torch.randn(2, 24, 8) for _ in config.vision_layers]
    fuse = projector.block.fuse.conv
    fused = torch.nn.functional.gelu(torch.cat(features, dim=2) @ fuse.weight.T + fuse.bias)
    blocks = fused.view(2, 2, 2, 3, 2, 8)  # batch, row blocks, rows of one, column blocks, columns of one, channels
    expected = projector.readout(blocks.mean((2, 4)).flatten(1, 2))
    # The same sums of four in another order: float32 at unit scale.
    torch.testing.assert_close(projector(features, PatchGrid(4, 6)), expected, rtol=0, atol=1e-5)
    assert not any("spatial" in name for name, _ in projector.named_parameters())
