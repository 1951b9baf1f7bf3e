"""D-Abstractor against transformers' Deformable DETR decoder layers, put together as Honeybee does."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrDecoderLayer

from projectors import PatchGrid, ProjectorError, load_projector_state_dict, projector_spec, select_projector
from projectors.conformance import check_projector
from projectors.layers.deformable import ring_offsets

TINY = {
    "num_queries": 4,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 4,
    "num_points": 3,
    "intermediate_size": 20,
    "position_grid": [4, 6],
}
GRID = PatchGrid(4, 6)


def build(vision_hidden_size=8, text_hidden_size=12, seed=0, std=0.3, **options):
    """With every parameter random; reference points stay on the map."""
    selection = select_projector("d_abstractor", TINY | options)
    sizes = {"vision_hidden_size": vision_hidden_size, "text_hidden_size": text_hidden_size}
    torch.manual_seed(seed)
    projector = selection.build(selection.build_config(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in projector.named_parameters():
            parameter.uniform_() if name == "reference_points" else parameter.normal_(0, std)
    return projector


def detr_layer(projector, index):
    config = projector.config
    layer = DeformableDetrDecoderLayer(
        DeformableDetrConfig(
            d_model=config.hidden_size,
            decoder_attention_heads=config.num_heads,
            decoder_n_points=config.num_points,
            decoder_ffn_dim=config.intermediate_size,
            num_feature_levels=1,
            disable_custom_kernels=True,
        )
    ).eval()
    renamed = {
        key.replace("self_attn.out_proj", "self_attn.o_proj").replace("fc", "mlp.fc"): tensor
        for key, tensor in projector.layers[index].state_dict().items()
    }
    layer.load_state_dict(renamed)
    return layer


def honeybee(projector, tokens, grid):
    """Honeybee's forward pass on its own keys; the positions are those of this grid."""
    config, weights = projector.config, projector.state_dict()
    if "input_proj.0.weight" in weights:
        tokens = functional.linear(tokens, weights["input_proj.0.weight"], weights["input_proj.0.bias"])
    if "v_pos_emb" in weights:
        tokens = tokens + weights["v_pos_emb"]
    side = int(config.num_queries**0.5)
    feature_map = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
    pooled = functional.adaptive_avg_pool2d(feature_map, side).flatten(2).transpose(1, 2)
    learned = weights["query_position_embeddings.weight"].expand(len(tokens), -1, -1)
    positions, hidden_states = {
        "query": lambda: (pooled, learned),
        "tgt": lambda: (learned, pooled),
        "none": lambda: (learned[..., : config.hidden_size], learned[..., config.hidden_size :]),
    }[config.pooled_queries]()
    for index in range(config.depth):
        hidden_states = detr_layer(projector, index)(
            hidden_states,
            object_queries_position_embeddings=positions,
            reference_points=weights["reference_points"].expand(len(tokens), -1, -1)[:, :, None],
            encoder_hidden_states=tokens,
            spatial_shapes=torch.tensor([grid]),
            spatial_shapes_list=[tuple(grid)],
            level_start_index=torch.tensor([0]),
        )
    if "eos_tokens" in weights:
        hidden_states = torch.cat([hidden_states, weights["eos_tokens"].expand(len(tokens), -1, -1)], dim=1)
    if "output_proj.weight" in weights:
        hidden_states = functional.linear(hidden_states, weights["output_proj.weight"], weights["output_proj.bias"])
    return hidden_states


@pytest.mark.parametrize("pooled_queries", ["query", "tgt", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_eos_tokens": 2}, {"use_position_embedding": False}, {"depth": 1, "num_queries": 9, "num_heads": 2}],
    ids=str,
)
def test_output_is_honeybees(pooled_queries, options):
    projector = build(pooled_queries=pooled_queries, **options)
    tokens = torch.randn(2, GRID.num_patches, 8)
    # Outputs of unit scale behind LayerNorms; attention sums in another order.
    torch.testing.assert_close(projector([tokens], GRID), honeybee(projector, tokens, GRID), rtol=0, atol=1e-5)


@pytest.mark.parametrize("vision_hidden_size, text_hidden_size", [(16, 12), (8, 16), (16, 16)])
def test_there_is_no_projection_between_equal_widths(vision_hidden_size, text_hidden_size):
    projector = build(vision_hidden_size, text_hidden_size, num_eos_tokens=1)
    keys = set(projector.state_dict())
    assert ("input_proj.0.weight" in keys) == (vision_hidden_size != 16)
    assert ("output_proj.weight" in keys) == (text_hidden_size != 16)
    tokens = torch.randn(2, GRID.num_patches, vision_hidden_size)
    torch.testing.assert_close(projector([tokens], GRID), honeybee(projector, tokens, GRID), rtol=0, atol=1e-5)


def test_positions_are_interpolated_on_another_grid():
    projector, tokens, grid = build(), torch.randn(1, 40, 8), PatchGrid(5, 8)
    stored = projector.v_pos_emb.detach().view(1, 4, 6, 16).permute(0, 3, 1, 2)
    resized = functional.interpolate(stored, size=tuple(grid), mode="bicubic").flatten(2).transpose(1, 2)
    other = build(position_grid=list(grid))
    with torch.no_grad():
        other.load_state_dict(projector.state_dict() | {"v_pos_emb": resized})
        torch.testing.assert_close(projector([tokens], grid), other([tokens], grid), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooled_queries", ["query", "tgt", "none"])
def test_transposing_the_grid_changes_the_output(pooled_queries):
    projector, tokens = build(pooled_queries=pooled_queries, use_position_embedding=False), torch.randn(1, 24, 8)
    upright, lying = projector([tokens], PatchGrid(6, 4)), projector([tokens], PatchGrid(4, 6))
    assert (upright - lying).abs().amax() > 1e-2


def test_gradients_reach_reference_points_and_every_layers_offsets():
    projector = build()
    projector([torch.randn(2, GRID.num_patches, 8)], GRID).square().sum().backward()
    # Every point of every query: none is forgotten, and all lie on the map.
    assert bool(projector.reference_points.grad.ne(0).all())
    for layer in projector.layers:
        assert bool(layer.encoder_attn.sampling_offsets.weight.grad.ne(0).any())
        assert bool(layer.encoder_attn.sampling_offsets.bias.grad.ne(0).any())


def test_gradients_reach_reference_points_and_offsets_from_the_start():
    """Without randomising: at Honeybee's start the weights are small, not zero."""
    selection = select_projector("d_abstractor", TINY)
    torch.manual_seed(0)
    projector = selection.build(selection.build_config(vision_hidden_size=8, text_hidden_size=12))
    projector([torch.randn(2, GRID.num_patches, 8)], GRID).square().sum().backward()
    assert bool(projector.reference_points.grad.ne(0).any())
    assert all(bool(layer.encoder_attn.sampling_offsets.weight.grad.ne(0).any()) for layer in projector.layers)


def test_reference_points_start_on_the_outermost_patches():
    config = select_projector("d_abstractor").build_config(vision_hidden_size=8, text_hidden_size=12)
    assert config.num_queries == 144 and config.position_grid == (24, 24)
    selection = select_projector("d_abstractor", {**TINY, "num_queries": 144, "position_grid": [24, 24]})
    points = selection.build(selection.build_config(vision_hidden_size=8, text_hidden_size=12)).reference_points[0]
    # Twelve steps from 0.5 to 23.5, over 24.
    expected = [(0.5 + 23 * step / 11) / 24 for step in range(12)]
    assert points[:12, 0].tolist() == pytest.approx(expected) and points[::12, 1].tolist() == pytest.approx(expected)
    assert points[0].tolist() == pytest.approx([0.0208, 0.0208], abs=1e-4)
    assert points[1].tolist() == pytest.approx([expected[1], 0.0208], abs=1e-4)  # x first, row-major
    assert points[143].tolist() == pytest.approx([0.9792, 0.9792], abs=1e-4)


def test_reference_points_start_on_a_rectangular_grid():
    selection = select_projector("d_abstractor", TINY | {"position_grid": [2, 10]})
    points = selection.build(selection.build_config(vision_hidden_size=8, text_hidden_size=12)).reference_points[0]
    expected = [[0.05, 0.25], [0.95, 0.25], [0.05, 0.75], [0.95, 0.75]]
    torch.testing.assert_close(points.detach(), torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", ["normal", "ring"])
def test_start_is_honeybees_or_deformable_detrs(init):
    selection = select_projector("d_abstractor", TINY | {"hidden_size": 128, "init": init})
    torch.manual_seed(0)
    projector = selection.build(selection.build_config(vision_hidden_size=8, text_hidden_size=12))
    attention = projector.layers[1].encoder_attn
    drawn = [attention.value_proj.weight, projector.query_position_embeddings.weight, projector.input_proj[0].weight]
    if init == "normal":
        drawn += [attention.sampling_offsets.weight, attention.attention_weights.weight]
        assert not attention.sampling_offsets.bias.any()
    else:
        assert not attention.sampling_offsets.weight.any() and not attention.attention_weights.weight.any()
        assert torch.equal(attention.sampling_offsets.bias.view(4, 3, 2), ring_offsets(4, 3))
    # 500 draws at least: the standard error of 0.02 is below a thirtieth of it.
    assert all(weight.std().item() == pytest.approx(0.02, rel=0.2) for weight in drawn)
    assert not projector.layers[0].fc1.bias.any() and not projector.output_proj.bias.any()


def test_dropout_acts_in_training_only():
    projector, features = build(dropout=0.5), [torch.randn(1, GRID.num_patches, 8)]
    evaluated = projector(features, GRID)
    assert torch.equal(evaluated, projector(features, GRID))
    assert not torch.equal(projector.train()(features, GRID), evaluated)


def test_dropout_acts_on_all_three_branches():
    """With all of them dropped a layer is its three norms."""
    projector = build(dropout=1.0, depth=1).train()
    layer, learned = projector.layers[0], projector.query_position_embeddings.weight
    normed = layer.final_layer_norm(layer.encoder_attn_layer_norm(layer.self_attn_layer_norm(learned)))
    expected = projector.output_proj(normed)
    torch.testing.assert_close(projector([torch.randn(1, GRID.num_patches, 8)], GRID)[0], expected, rtol=0, atol=1e-6)


def test_queries_that_are_not_pooled_need_no_patches():
    features = [torch.randn(1, 2, 8)]
    assert build(pooled_queries="none")(features, PatchGrid(1, 2)).shape == (1, 4, 12)
    with pytest.raises(ProjectorError, match="1x2 grid holds 2 patches, fewer than num_queries 4"):
        build()(features, PatchGrid(1, 2))
    with pytest.raises(ProjectorError, match="0x2 grid holds no patch"):
        build(pooled_queries="none").config.num_output_tokens(PatchGrid(0, 2))


@pytest.mark.parametrize(
    "options, token_grid",
    [
        ({}, PatchGrid(2, 2)),
        ({"pooled_queries": "tgt"}, PatchGrid(2, 2)),
        ({"pooled_queries": "none"}, None),
        ({"num_eos_tokens": 1}, None),
    ],
)
def test_tokens_form_a_map_where_they_are_pooled_from_one(options, token_grid):
    assert build(**options).config.token_grid(GRID) == token_grid


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_queries": 5}, "num_queries: got 5, expected a square number"),
        ({"num_queries": 5, "pooled_queries": "none"}, "num_queries: got 5, expected a square number"),
        ({"num_heads": 3}, "hidden_size 16 is not a multiple of num_heads 3"),
        ({"keep_cls_token": True}, "keep_cls_token"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ProjectorError, match=words):
        build(**options)


def test_keys_are_honeybees():
    layer_names = [
        *(f"self_attn.{part}_proj" for part in "qkv"),
        "self_attn.out_proj",
        "self_attn_layer_norm",
        *(f"encoder_attn.{part}" for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")),
        "encoder_attn_layer_norm",
        "fc1",
        "fc2",
        "final_layer_norm",
    ]
    modules = ["input_proj.0", "output_proj", *(f"layers.{index}.{name}" for index in range(2) for name in layer_names)]
    keys = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    keys |= {"reference_points", "v_pos_emb", "query_position_embeddings.weight", "eos_tokens"}
    projector = build(num_eos_tokens=1)
    assert set(projector.to_original_state_dict(projector.state_dict())) == keys


def test_whole_models_state_dict_loads():
    source, target = build(), build(seed=1)
    whole = {f"abstractor.{key}": tensor for key, tensor in source.state_dict().items()}
    whole |= {"vision_model.encoder.layers.0.weight": torch.zeros(2), "language_model.lm_head.weight": torch.zeros(2)}
    load_projector_state_dict(target, whole)
    assert all(torch.equal(target.state_dict()[key], tensor) for key, tensor in source.state_dict().items())


def test_honeybees_name_is_an_alias():
    assert projector_spec("d-abs").name == "d_abstractor"


@pytest.mark.parametrize(
    "options",
    [
        {"pooled_queries": "tgt"},
        {"pooled_queries": "none", "num_eos_tokens": 2},
        {"use_position_embedding": False, "hidden_size": 16},
        {"init": "ring", "num_points": 1},
        {"vision_layers": [1, 3], "num_queries": 1},
        {"hidden_size": 24, "num_heads": 1, "depth": 1},
    ],
    ids=str,
)
def test_options_keep_the_contract(options):
    check_projector("d_abstractor", options).raise_if_failed()
