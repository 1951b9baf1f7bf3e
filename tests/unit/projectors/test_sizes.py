"""Parameter and token counts at CLIP ViT-L/14-336 (24x24 patches of 1024 channels) into 4096 channels."""

from __future__ import annotations

import pytest
import torch

from projectors import PatchGrid, select_projector

# Counted on the originals, or by hand from the formula in the docstring for SAEP.
SIZES = [
    ("linear", {}, 4_198_400, 576),
    ("mlp2x_gelu", {}, 20_979_712, 576),
    ("mlp", {"depth": 1}, 4_198_400, 576),
    ("qformer", {}, 104_773_120, 32),
    ("c_abstractor", {}, 37_398_016, 144),
    ("deco", {}, 20_979_712, 144),
    ("deco", {"depth": 1}, 4_198_400, 144),
    ("saep", {}, 25_189_376, 144),
    ("saep", {"vision_layers": "sci"}, 24_140_800, 144),
    ("saep", {"order": "dw_pw"}, 25_226_240, 144),
    ("saep", {"mid_channels": 4096, "readout_depth": 1}, 33_619_968, 144),
]


@pytest.mark.parametrize("spelling, options, num_parameters, num_tokens", SIZES)
def test_sizes_at_clip_large(spelling, options, num_parameters, num_tokens):
    selection = select_projector(spelling, options)
    config = selection.build_config(vision_hidden_size=1024, text_hidden_size=4096, num_vision_layers=24)
    with torch.device("meta"):
        projector = selection.build(config)
    assert sum(parameter.numel() for parameter in projector.parameters()) == num_parameters
    assert config.num_output_tokens(PatchGrid(24, 24)) == num_tokens


def test_class_token_is_one_more_token():
    config = select_projector("linear", {"keep_cls_token": True}).build_config(vision_hidden_size=8, text_hidden_size=8)
    assert config.num_output_tokens(PatchGrid(24, 24)) == 577
