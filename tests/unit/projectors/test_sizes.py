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
    ("mlp2x_res2x_gelu", {}, 88_121_344, 576),
    ("conv_pool", {}, 33_562_624, 144),
    ("qformer", {}, 104_773_120, 32),
    ("qformer", {"num_queries": 128}, 104_846_848, 128),
    ("perceiver", {}, 67_217_408, 64),
    ("perceiver_tinyllava", {}, 432_623_616, 128),
    ("resampler", {}, 106_224_640, 144),
    ("d_abstractor", {}, 55_944_032, 144),
    ("d_abstractor", {"pooled_queries": "none"}, 56_091_488, 144),
    ("ldp", {}, 71_428_096, 144),
    ("ldpv2", {}, 21_020_672, 144),
    ("token_packer", {}, 36_722_688, 144),
    ("token_packer", {"factor": 3}, 36_722_688, 64),
    ("token_packer", {"factor": 4}, 36_722_688, 36),
    ("pixel_shuffle", {}, 33_570_816, 144),
    ("pixel_shuffle_idefics3", {}, 16_777_216, 144),
    ("patch_merger_qwen2_vl", {}, 33_564_672, 144),
    ("patch_merger_qwen2_5_vl", {}, 33_563_648, 144),
    ("dense_connector_sti", {}, 20_979_712, 720),
    ("dense_connector_sci", {}, 29_368_320, 576),
    ("dense_connector_dci", {}, 29_368_320, 576),
    ("llava_sp_pooling", {}, 786_440_192, 582),
    ("llava_sp_cropping", {}, 923_550_208, 582),
    ("token_fusion", {}, 171_992_064, 144),
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
