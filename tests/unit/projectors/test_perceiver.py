"""The perceiver resampler against attention written out, and the keys of its two originals."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from projectors import PatchGrid, ProjectorError, load_projector_state_dict, select_projector
from projectors.conformance import check_projector

VISION, TEXT = 6, 10
TINY = {"num_queries": 3, "depth": 2, "num_heads": 2, "head_size": 5}
GRID = PatchGrid(2, 3)


def build(spelling="perceiver", options=None, **sizes):
    selection = select_projector(spelling, TINY | (options or {}))
    sizes = {"vision_hidden_size": VISION, "text_hidden_size": TEXT} | sizes
    return selection.build(selection.build_config(**sizes)).eval()


def randomise(module):
    """Every parameter: gains of one and biases of zero would hide errors."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module


def layer_norm(weights, name, tokens):
    return functional.layer_norm(tokens, tokens.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)


def attend(weights, prefix, latents, media, num_heads, head_size):
    """One image, head by head and latent by latent."""
    latents = layer_norm(weights, f"{prefix}.norm_latents", latents)
    tokens = torch.cat([layer_norm(weights, f"{prefix}.norm_media", media), latents])
    keys, values = (tokens @ weights[f"{prefix}.to_kv.weight"].T).chunk(2, dim=1)
    queries = latents @ weights[f"{prefix}.to_q.weight"].T
    rows = []
    for query in queries:
        heads = []
        for head in range(num_heads):
            channels = slice(head * head_size, (head + 1) * head_size)
            scores = torch.stack([query[channels] @ key[channels] for key in keys]) / math.sqrt(head_size)
            heads.append(scores.softmax(0) @ values[:, channels])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ weights[f"{prefix}.to_out.weight"].T


def blocks_written_out(weights, latents, media, depth, num_heads, head_size):
    for index in range(depth):
        latents = latents + attend(weights, f"layers.{index}.0", latents, media, num_heads, head_size)
        prefix = f"layers.{index}.1"
        inner = functional.gelu(layer_norm(weights, f"{prefix}.0", latents) @ weights[f"{prefix}.1.weight"].T)
        latents = latents + inner @ weights[f"{prefix}.3.weight"].T
    return layer_norm(weights, "norm", latents)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 3, "num_heads": 3, "head_size": 2, "feedforward_multiplier": 1},
        {"projection": "input"},
        {"projection": "input", "depth": 1, "num_queries": 8, "vision_layers": [1, 3]},
        {"vision_layers": [1, 3, 3]},
        {"keep_cls_token": True},
    ],
)
def test_output_is_attention_written_out(options):
    projector = randomise(build(options=options)).double()
    weights, config = projector.state_dict(), projector.config
    num_tokens = config.num_input_tokens(GRID)
    features = [torch.randn(2, num_tokens, VISION, dtype=torch.float64) for _ in config.vision_layers]
    expected = []
    for media in torch.cat(features, dim=2):
        if config.projection == "input":
            media = functional.linear(media, weights["linear.weight"], weights["linear.bias"])
        sizes = (config.depth, config.num_heads, config.head_size)
        tokens = blocks_written_out(weights, weights["latents"], media, *sizes)
        if config.projection == "output":
            tokens = functional.linear(tokens, weights["readout.0.weight"], weights["readout.0.bias"])
        expected.append(tokens)
    # Double precision, so only the order of sums differs.
    torch.testing.assert_close(projector(features, GRID), torch.stack(expected), rtol=0, atol=1e-10)


def test_readout_is_llavas_mlp():
    shallow, deep = build(), build(options={"readout_depth": 3})
    assert [type(module).__name__ for module in deep.readout] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    deep.load_state_dict(shallow.state_dict(), strict=False)
    tokens = [torch.randn(2, 6, VISION)]
    expected = deep.readout[1:](shallow(tokens, GRID))
    torch.testing.assert_close(deep(tokens, GRID), expected, rtol=0, atol=1e-6)


def test_readout_that_is_not_there_cannot_be_deepened():
    with pytest.raises(ProjectorError, match="projection 'input'.*readout_depth 2"):
        build(options={"projection": "input", "readout_depth": 2})


LANGUAGE_MODEL = {
    "model.layers.0.self_attn.q_proj.weight": torch.zeros(TEXT, TEXT),
    "model.norm.weight": torch.zeros(TEXT),
    "model.embed_tokens.weight": torch.zeros(3, TEXT),
    "lm_head.weight": torch.zeros(3, TEXT),
}


@pytest.mark.parametrize(
    "depth, places", [(1, {"readout.0": ""}), (1, {"readout.0": "0."}), (2, {"readout.0": "0.", "readout.2": "2."})]
)
def test_llava_next_model_is_read_part_by_part(depth, places):
    """Its language model has layers and a norm of its own, and its read-out may be linear, mlp1x_gelu or mlp2x_gelu."""
    source, target = randomise(build(options={"readout_depth": depth})), build(options={"readout_depth": depth})
    whole = dict(LANGUAGE_MODEL)
    for key, tensor in source.state_dict().items():
        module, _, parameter = key.rpartition(".")
        is_readout = module in places
        place = f"mm_projector.{places[module]}{parameter}" if is_readout else f"vision_resampler.perceiver.{key}"
        whole[f"model.{place}"] = tensor
    load_projector_state_dict(target, whole)
    for key, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], tensor), key


def test_tinyllavas_keys_load_from_a_whole_model():
    options = {"projection": "input"}
    source, target = randomise(build(options=options)), build(options=options)
    whole = {f"connector._connector.{key}": tensor for key, tensor in source.state_dict().items()} | LANGUAGE_MODEL
    load_projector_state_dict(target, whole)
    for key, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], tensor), key


@pytest.mark.parametrize("depth, modules", [(1, {"mm_projector"}), (2, {"mm_projector.0", "mm_projector.2"})])
def test_export_has_llava_nexts_two_parts(depth, modules):
    projector = build(options={"readout_depth": depth})
    exported = projector.to_original_state_dict(projector.state_dict())
    readout = {key for key in exported if not key.startswith("vision_resampler.perceiver.")}
    assert {key.rpartition(".")[0] for key in readout} == modules
    assert "vision_resampler.perceiver.layers.1.0.to_kv.weight" in exported


def test_weights_of_another_projector_are_named():
    with pytest.raises(ProjectorError, match="Missing: latents.*Unexpected: .*projector.9.weight"):
        load_projector_state_dict(build(), {"vision_resampler.projector.9.weight": torch.zeros(1)})


def test_initialisation_is_the_originals():
    torch.manual_seed(0)
    projector = build(options={"num_queries": 256}, vision_hidden_size=64)
    # 16384 draws: the standard deviation is known to 0.6 %, so 3 % is five of its errors.
    assert abs(projector.latents.std() - 1) < 0.03
    bound = 1 / math.sqrt(64)
    for linear in (projector.layers[0][0].to_q, projector.readout[0]):
        assert 0.9 * bound < linear.weight.abs().max() <= bound


def test_presets_start_from_the_originals_sizes_and_may_be_resized():
    sizes = {"vision_hidden_size": VISION, "text_hidden_size": TEXT}
    tinyllava = select_projector("perceiver_tinyllava").build_config(**sizes)
    assert (tinyllava.projection, tinyllava.num_queries, tinyllava.depth) == ("input", 128, 3)
    llava_next = select_projector("perceiver_llava_next").build_config(**sizes)
    assert (llava_next.projection, llava_next.num_queries, llava_next.depth) == ("output", 32, 3)
    assert select_projector("perceiver_tinyllava", {"depth": 5}).build_config(**sizes).depth == 5
    with pytest.raises(ProjectorError, match="perceiver_tinyllava.*projection=input"):
        select_projector("perceiver_tinyllava", {"projection": "output"})


@pytest.mark.parametrize(
    "options",
    [
        {"projection": "input", "vision_layers": [1, 3]},
        {"readout_depth": 2, "keep_cls_token": True},
        {"feedforward_multiplier": 1, "num_heads": 3},
        {"depth": 1, "num_queries": 1, "vision_layers": [1, 1]},
    ],
)
def test_options_keep_the_contract(options):
    check_projector("perceiver", options).raise_if_failed()
