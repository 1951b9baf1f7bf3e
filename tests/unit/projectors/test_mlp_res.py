"""`mlp{N}x_res{M}x_gelu` against LLaVA-NeXT's formula, and the MLP inside other code bases' whole models."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from projectors import PatchGrid, ProjectorError, load_projector_state_dict, select_projector
from projectors.conformance import check_projector

VISION, TEXT = 6, 10


def build(spelling, options=None):
    """With every parameter random: a gain of one or a bias of zero would hide errors."""
    selection = select_projector(spelling, options)
    projector = selection.build(selection.build_config(vision_hidden_size=VISION, text_hidden_size=TEXT)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.normal_(0, 0.3)
    return projector


def llava_next(weights, tokens, depth, num_residual_blocks):
    """LLaVA-NeXT's Sequential under its own keys: Linear at the even places, then blocks one after another."""
    for index in range(0, 2 * depth, 2):
        tokens = functional.gelu(tokens) if index else tokens
        tokens = functional.linear(tokens, weights[f"{index}.weight"], weights[f"{index}.bias"])
    for index in range(2 * depth - 1, 2 * depth - 1 + num_residual_blocks):
        name = f"{index}.pre_norm"
        normed = functional.layer_norm(tokens, (TEXT,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)
        inner = functional.linear(normed, weights[f"{index}.proj.0.weight"], weights[f"{index}.proj.0.bias"])
        inner = functional.gelu(inner)
        inner = functional.linear(inner, weights[f"{index}.proj.2.weight"], weights[f"{index}.proj.2.bias"])
        tokens = normed + inner
    return tokens


@pytest.mark.parametrize("depth, num_residual_blocks", [(1, 1), (2, 2), (3, 1), (2, 0)])
def test_output_is_llava_nexts(depth, num_residual_blocks):
    projector, tokens = build(f"mlp{depth}x_res{num_residual_blocks}x_gelu"), torch.randn(2, 6, VISION)
    weights = projector.to_original_state_dict(projector.state_dict())
    expected = llava_next(weights, tokens, depth, num_residual_blocks)
    # The same operations in the same order.
    torch.testing.assert_close(projector([tokens], PatchGrid(2, 3)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "spelling, options",
    [
        ("mlp2x_res2x_gelu", {"depth": 2, "num_residual_blocks": 2}),
        ("mlp12x_res3x_gelu", {"depth": 12, "num_residual_blocks": 3}),
        ("mlp2x_res0x_gelu", {"depth": 2, "num_residual_blocks": 0}),
        ("mlp2x_gelu", {"depth": 2}),
    ],
)
def test_spelling_says_both_numbers(spelling, options):
    selection = select_projector(spelling)
    assert (selection.name, dict(selection.options)) == ("mlp", options)


@pytest.mark.parametrize("spelling", ["mlp0x_gelu", "mlp0x_res2x_gelu"])
def test_spelling_without_a_linear_layer_is_refused_in_its_own_words(spelling):
    with pytest.raises(ProjectorError, match=f"'{spelling}' means depth=0.*expected at least 1"):
        select_projector(spelling)


@pytest.mark.parametrize("spelling", ["mlp2x_resx_gelu", "mlp2x_res2_gelu", "mlpx_res2x_gelu", "mlp2x_res2x_relu"])
def test_other_spellings_are_unknown(spelling):
    with pytest.raises(ProjectorError, match="unknown projector"):
        select_projector(spelling)


def test_option_that_contradicts_the_spelling_is_refused():
    with pytest.raises(ProjectorError, match="mlp2x_res2x_gelu.*num_residual_blocks=2.*3"):
        select_projector("mlp2x_res2x_gelu", {"num_residual_blocks": 3})


def test_export_has_llava_nexts_keys():
    projector = build("mlp2x_res1x_gelu")
    modules = {key.rpartition(".")[0] for key in projector.to_original_state_dict(projector.state_dict())}
    assert modules == {"0", "2", "3.pre_norm", "3.proj.0", "3.proj.2"}


WHOLE_MODELS = {
    "LLaVA-NeXT": ("model.mm_projector.{}", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]),
    "TinyLLaVA": (
        "connector._connector.{}",
        ["language_model.model.embed_tokens.weight", "vision_tower._vision_tower.vision_model.post_layernorm.weight"],
    ),
    "prismatic": (
        "projector.projector.{}",
        ["vision_backbone.featurizer.norm.weight", "llm_backbone.llm.model.embed_tokens.weight"],
    ),
}


@pytest.mark.parametrize("spelling", ["mlp2x_gelu", "mlp2x_res1x_gelu"])
@pytest.mark.parametrize("origin", WHOLE_MODELS)
def test_weights_are_found_in_a_whole_model(origin, spelling):
    pattern, others = WHOLE_MODELS[origin]
    source, target = build(spelling), build(spelling)
    original = source.to_original_state_dict(source.state_dict())
    whole = {pattern.format(key): torch.randn_like(tensor) for key, tensor in original.items()}
    whole |= {key: torch.zeros(3) for key in others}
    load_projector_state_dict(target, whole)
    for key, tensor in target.to_original_state_dict(target.state_dict()).items():
        assert torch.equal(tensor, whole[pattern.format(key)]), key


@pytest.mark.parametrize("options", [{"num_residual_blocks": 1}, {"depth": 1, "num_residual_blocks": 2}])
def test_residual_blocks_keep_the_contract(options):
    check_projector("mlp", options).raise_if_failed()
