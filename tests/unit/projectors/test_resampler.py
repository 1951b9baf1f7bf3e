"""Honeybee's resampler against its layers written out, and what it does with positions, queries and checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from projectors import PatchGrid, ProjectorError, load_projector_state_dict, select_projector
from projectors.conformance import check_projector

VISION, TEXT = 6, 10
TINY = {"num_queries": 3, "hidden_size": 8, "depth": 2, "num_heads": 2, "intermediate_size": 12}
GRID = PatchGrid(2, 3)


def build(options=None, **sizes):
    selection = select_projector("resampler", TINY | (options or {}))
    sizes = {"vision_hidden_size": VISION, "text_hidden_size": TEXT} | sizes
    return selection.build(selection.build_config(**sizes)).eval()


def randomise(module):
    """Every parameter: gains of one and biases of zero would hide errors."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module


def linear(weights, name, tokens):
    return tokens @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(weights, name, tokens, eps=1e-5):
    return functional.layer_norm(tokens, tokens.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def attend(weights, prefix, queries, context, num_heads):
    """One image, head by head and query by query."""
    queries, keys, values = (
        linear(weights, f"{prefix}.{name}", tokens)
        for name, tokens in (("query", queries), ("key", context), ("value", context))
    )
    head_size = queries.shape[1] // num_heads
    rows = []
    for query in queries:
        heads = []
        for head in range(num_heads):
            channels = slice(head * head_size, (head + 1) * head_size)
            scores = torch.stack([query[channels] @ key[channels] for key in keys]) / math.sqrt(head_size)
            heads.append(scores.softmax(0) @ values[:, channels])
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def layers_written_out(weights, queries, features, depth, num_heads):
    for index in range(depth):
        prefix = f"encoder.layers.{index}.crossattention"
        queries = layer_norm(weights, f"{prefix}.norm1", queries)
        context = torch.cat([queries, layer_norm(weights, f"{prefix}.normk", features)])
        attended = attend(weights, f"{prefix}.attention", queries, context, num_heads)
        queries = queries + linear(weights, f"{prefix}.output.out_proj", attended)
        normed, mlp = layer_norm(weights, f"{prefix}.output.norm2", queries), f"{prefix}.output.mlp"
        gated = functional.silu(linear(weights, f"{mlp}.w1", normed)) * linear(weights, f"{mlp}.w3", normed)
        queries = queries + linear(weights, f"{mlp}.w2", layer_norm(weights, f"{mlp}.ffn_ln", gated, 1e-6))
    return queries


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 3, "num_heads": 4, "hidden_size": 12, "intermediate_size": 7, "num_queries": 9},
        {"depth": 1, "vision_layers": [1, 3]},
        {"keep_cls_token": True},
        {"attention": "explicit", "depth": 3},
    ],
)
def test_output_is_the_layers_written_out(options):
    projector = randomise(build(options)).double()
    weights, config = projector.state_dict(), projector.config
    num_tokens = config.num_input_tokens(GRID)
    features = [torch.randn(2, num_tokens, VISION, dtype=torch.float64) for _ in config.vision_layers]
    expected = []
    for image in torch.cat(features, dim=2):
        image = linear(weights, "visual_input_fc", image)
        queries = layers_written_out(weights, weights["query_tokens"][0], image, config.depth, config.num_heads)
        expected.append(linear(weights, "visual_output_fc", queries))
    # Double precision, so only the order of sums differs.
    torch.testing.assert_close(projector(features, GRID), torch.stack(expected), rtol=0, atol=1e-10)


def test_output_does_not_depend_on_the_scale_of_the_queries():
    """The residual is the normalised query, as in Honeybee."""
    projector, features = randomise(build()).double(), [torch.randn(2, 6, VISION, dtype=torch.float64)]
    with torch.no_grad():
        projector.query_tokens.mul_(1e4)  # so that the norm's epsilon means nothing
        expected = projector(features, GRID)
        projector.query_tokens.mul_(100)
        torch.testing.assert_close(projector(features, GRID), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("grid", [PatchGrid(2, 3), PatchGrid(5, 4)])
def test_positions_are_added_to_the_towers_features_and_interpolated(grid):
    options = {"use_position_embedding": True, "position_grid": [2, 3]}
    projector, without = randomise(build(options)), build()
    weights = projector.state_dict()
    positions = weights["pos_emb"].view(1, 2, 3, VISION).permute(0, 3, 1, 2)
    without.load_state_dict({key: tensor for key, tensor in weights.items() if key != "pos_emb"})
    resized = functional.interpolate(positions, size=tuple(grid), mode="bicubic").flatten(2).transpose(1, 2)
    tokens = torch.randn(2, grid.num_patches, VISION)
    # float32, in which positions are interpolated.
    torch.testing.assert_close(projector([tokens], grid), without([tokens + resized], grid), rtol=0, atol=1e-4)


def test_positions_alone_make_the_arrangement_matter():
    for use_position_embedding in (False, True):
        options = {"use_position_embedding": use_position_embedding, "position_grid": [2, 3]}
        projector, tokens = randomise(build(options)), torch.randn(1, 6, VISION)
        difference = (projector([tokens], GRID) - projector([tokens.flip(1)], GRID)).abs().max()
        assert (difference > 1e-2) == use_position_embedding == projector.config.reads_patch_map


def test_learned_tokens_are_appended():
    projector, without = randomise(build({"num_eos_tokens": 2})), build()
    weights, features = projector.state_dict(), [torch.randn(2, 6, VISION)]
    without.load_state_dict({key: tensor for key, tensor in weights.items() if key != "vit_eos"})
    output = projector(features, GRID)
    assert torch.equal(output[:, :3], without(features, GRID))
    assert torch.equal(output[1, 3:], weights["vit_eos"][0])


def test_queries_start_different_or_as_honeybees_all_alike():
    features = [torch.randn(2, 6, VISION)]
    for query_init, are_alike in (("normal", False), ("zeros", True)):
        output = build({"query_init": query_init})(features, GRID)
        # Alike to the order of sums; different tokens are 1e-3 apart at this start.
        assert torch.allclose(output, output[:, :1], rtol=0, atol=1e-6) == are_alike


def test_initialisation_is_honeybees_in_training():
    torch.manual_seed(0)
    projector = build({"hidden_size": 128})
    for module in (projector.visual_input_fc, projector.encoder.layers[0].crossattention.attention.key):
        # At least 768 draws: the standard deviation is known to 2.6 %, so 12 % is more than four of its errors.
        assert abs(module.weight.std() / 0.02 - 1) < 0.12
        assert not module.bias.any()


def test_dropout_acts_on_the_attention_in_training_only():
    projector, features = randomise(build({"dropout": 0.5})), [torch.randn(1, 6, VISION)]
    evaluated = projector(features, GRID)
    assert torch.equal(evaluated, projector(features, GRID))
    assert not torch.equal(projector.train()(features, GRID), evaluated)
    assert torch.equal(randomise(build({"dropout": 0.0}).train())(features, GRID), evaluated)


@pytest.mark.parametrize("has_class_position", [False, True])
def test_honeybee_model_loads_and_the_class_tokens_position_is_dropped(has_class_position):
    options = {"use_position_embedding": True, "position_grid": [2, 3], "num_eos_tokens": 1}
    source, target = randomise(build(options)), build(options)
    whole = {f"abstractor.{key}": tensor for key, tensor in source.state_dict().items()}
    if has_class_position:
        whole["abstractor.pos_emb"] = torch.cat([torch.full((1, 1, VISION), 9.0), source.pos_emb.detach()], dim=1)
    whole |= {"vision_model.x.weight": torch.zeros(2), "language_model.lm_head.weight": torch.zeros(2)}
    load_projector_state_dict(target, whole)
    for key, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], tensor), key


def test_contradicting_options_are_refused():
    with pytest.raises(ProjectorError, match="hidden_size 10.*num_heads 4"):
        build({"hidden_size": 10, "num_heads": 4})
    with pytest.raises(ProjectorError, match="keep_cls_token"):
        build({"use_position_embedding": True, "keep_cls_token": True})


@pytest.mark.parametrize(
    "options",
    [
        {"use_position_embedding": True, "vision_layers": [1, 3]},
        {"num_eos_tokens": 2, "keep_cls_token": True},
        {"query_init": "zeros", "depth": 1},
        {"dropout": 0.0, "num_heads": 1},
    ],
)
def test_options_keep_the_contract(options):
    check_projector("resampler", options).raise_if_failed()


def test_explicit_attention_drops_weights_in_training_like_the_fused_one():
    features = [torch.randn(2, 6, VISION)]
    outputs = {}
    for attention in ("fused", "explicit"):
        projector = randomise(build({"attention": attention, "dropout": 0.5})).train()
        assert not torch.equal(projector(features, GRID), projector(features, GRID))
        outputs[attention] = projector.eval()(features, GRID)
    # The same weights; float32 sums in another order at the size of these outputs.
    torch.testing.assert_close(outputs["fused"], outputs["explicit"], rtol=1e-4, atol=1e-4)
