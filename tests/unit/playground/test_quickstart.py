"""The quick start takes every projector with one flag: its options fit the small tower and stay small."""

from __future__ import annotations

import json

import pytest
import torch

from playground.quickstart import BACKBONES, small_options
from projectors import (
    PatchGrid,
    ProjectorError,
    parse_projector_options,
    registered_presets,
    registered_projectors,
    select_projector,
)

# They change no width, or need a factor that six patches do not have; the quick start says so and stops.
REFUSED = {"identity", "pixel_shuffle_nanovlm"}


def read_config(name):
    return json.loads((BACKBONES / name / "config.json").read_text())


def build_config(name):
    tower, language_model = read_config("vision_tower"), read_config("language_model")
    selection = select_projector(name, parse_projector_options(small_options(name)))
    config = selection.build_config(
        vision_hidden_size=tower["hidden_size"],
        text_hidden_size=language_model["hidden_size"],
        num_vision_layers=tower["num_hidden_layers"],
    )
    side = tower["image_size"] // tower["patch_size"]
    return selection, config, PatchGrid(side, side)


@pytest.mark.parametrize("name", sorted({*registered_projectors(), *registered_presets()} - REFUSED))
def test_every_projector_fits_the_small_tower(name):
    selection, config, grid = build_config(name)
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in selection.build(config).parameters())
    assert 0 < config.num_output_tokens(grid) <= grid.num_patches + 12
    assert num_parameters < 3e6  # as many as the language model: more would be another job


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_projectors_that_cannot_fit_are_refused(name):
    with pytest.raises(ProjectorError):
        _, config, grid = build_config(name)
        config.num_output_tokens(grid)


def test_a_preset_keeps_what_its_name_says():
    assert "num_queries" in small_options("perceiver")
    assert small_options("saep_dw_pw") == ""
