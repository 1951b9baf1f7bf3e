"""The Q-Former against transformers' Blip2QFormerModel, and the keys of everything that holds the same network."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from projectors import PatchGrid, ProjectorError, load_projector_state_dict, select_projector
from projectors.conformance import check_projector

VISION, TEXT = 8, 12
TINY = {"num_queries": 5, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 32}
GRID = PatchGrid(2, 3)


def build(spelling="qformer", options=None, **sizes):
    selection = select_projector(spelling, TINY | (options or {}))
    sizes = {"vision_hidden_size": VISION, "text_hidden_size": TEXT} | sizes
    return selection.build(selection.build_config(**sizes)).eval()


def randomise(module):
    """Every parameter: gains of one and biases of zero would hide errors."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module.eval()


def assert_same_weights(projector, other):
    for key, tensor in projector.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


def transformers_qformer(config):
    from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    options = {name: getattr(config, name) for name in (*sizes, "cross_attention_frequency", "layer_norm_eps")}
    return Blip2QFormerModel(Blip2QFormerConfig(encoder_hidden_size=config.fused_hidden_size, **options)).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_hidden_layers": 3, "cross_attention_frequency": 1, "num_attention_heads": 6},
        {"num_hidden_layers": 7, "cross_attention_frequency": 3, "hidden_size": 20, "intermediate_size": 13},
        {"num_hidden_layers": 1, "num_queries": 9, "vision_layers": [1, 2]},
        {"keep_cls_token": True, "cross_attention_frequency": 5},
        {"input_norm": True, "vision_layers": [1, 2, 2]},
        {"affine_query_norm": False, "layer_norm_eps": 1e-3},
    ],
)
def test_output_is_transformers_qformers(options):
    projector = randomise(build(options=options)).double()
    config, original = projector.config, transformers_qformer(projector.config).double()
    norm = original.layernorm
    weights = {f"layernorm.{name}": tensor for name, tensor in (("weight", norm.weight), ("bias", norm.bias))}
    original.load_state_dict(weights | projector.qformer.state_dict())
    num_tokens = config.num_input_tokens(GRID)
    # Small enough for the epsilon of the norm on the features to matter.
    features = [0.01 * torch.randn(2, num_tokens, VISION, dtype=torch.float64) for _ in config.vision_layers]
    image = torch.cat(features, dim=2)
    if config.input_norm:
        image = functional.layer_norm(image, image.shape[2:], projector.input_norm.weight, projector.input_norm.bias)
    queries = projector.query_tokens.expand(2, -1, -1)
    hidden = original(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
    readout = projector.language_projection
    # Double precision, so only the order of sums differs.
    expected = functional.linear(hidden, readout.weight, readout.bias)
    torch.testing.assert_close(projector(features, GRID), expected, rtol=0, atol=1e-10)


def test_readout_is_llavas_mlp():
    shallow, deep = randomise(build()), randomise(build(options={"readout_depth": 2}))
    names = [type(module).__name__ for module in deep.language_projection]
    assert names == ["Linear", "GELU", "Linear"]
    shared = {key: tensor for key, tensor in shallow.state_dict().items() if not key.startswith("language")}
    deep.load_state_dict(shared, strict=False)
    deep.language_projection[0].load_state_dict(shallow.language_projection.state_dict())
    features = [torch.randn(2, 6, VISION)]
    expected = deep.language_projection[1:](shallow(features, GRID))
    torch.testing.assert_close(deep(features, GRID), expected, rtol=0, atol=1e-6)


def bert_key(key):
    """Ours -> what LAVIS's BERT calls it."""
    key = key.replace("attention.attention.", "attention.self.")
    return key.replace("qformer.layernorm", "bert.embeddings.LayerNorm").replace("qformer.encoder", "bert.encoder")


def lavis_checkpoint(projector, readout, norm=True):
    """As LAVIS stores BLIP-2 after its first stage: what BERT has for text is still there."""
    stored = {}
    for key, tensor in projector.state_dict().items():
        key = bert_key(key)
        key = f"Qformer.{key}" if key.startswith("bert.") else key
        stored[key.replace("language_projection", readout).replace("input_norm", "ln_vision")] = tensor
    if not norm:
        stored = {key: tensor for key, tensor in stored.items() if not key.startswith("ln_vision")}
    text = ["embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight", "embeddings.position_ids"]
    for layer in range(projector.config.num_hidden_layers):
        for part in ("intermediate.dense.weight", "output.dense.weight", "output.LayerNorm.bias"):
            text.append(f"encoder.layer.{layer}.{part}")
    stored |= {f"Qformer.bert.{key}": torch.zeros(2) for key in text}
    others = ("visual_encoder.blocks.0.norm1.weight", "opt_model.lm_head.weight", "t5_model.shared.weight", "temp")
    others += ("Qformer.cls.predictions.bias", "vision_proj.weight", "text_proj.bias", "itm_head.weight")
    return stored | {key: torch.zeros(2) for key in others}


@pytest.mark.parametrize("readout", ["opt_proj", "t5_proj", "llm_proj", "llama_proj"])
def test_lavis_checkpoint_loads_without_its_text_branch(readout):
    options = {"input_norm": True}
    source, target = randomise(build(options=options)), build(options=options)
    stored = lavis_checkpoint(source, readout)
    assert "Qformer.bert.encoder.layer.0.crossattention.self.query.weight" in stored
    assert "Qformer.bert.encoder.layer.3.output_query.LayerNorm.bias" in stored
    load_projector_state_dict(target, stored)
    assert_same_weights(source, target)


def test_lavis_norm_on_the_features_is_never_dropped_silently():
    source = randomise(build(options={"input_norm": True}))
    with pytest.raises(ProjectorError, match="ln_vision.weight .*input_norm=true"):
        load_projector_state_dict(build(), lavis_checkpoint(source, "opt_proj"))
    with pytest.raises(ProjectorError, match="Missing: input_norm.weight, input_norm.bias"):
        load_projector_state_dict(build(options={"input_norm": True}), lavis_checkpoint(source, "opt_proj", norm=False))
    plain = build()
    load_projector_state_dict(plain, lavis_checkpoint(source, "opt_proj", norm=False))
    assert_same_weights(plain, source)


@pytest.mark.parametrize(
    "depth, places",
    [(1, {"": "mm_projector."}), (1, {"": "mm_projector.0."}), (2, {"0.": "mm_projector.0.", "2.": "mm_projector.2."})],
)
def test_llava_next_model_is_read_part_by_part(depth, places):
    options = {"readout_depth": depth}
    source, target = (build("qformer_llava_next", options) for _ in range(2))
    randomise(source)
    whole = {}
    for key, tensor in source.state_dict().items():
        if key.startswith("language_projection."):
            rest, _, parameter = key.removeprefix("language_projection.").rpartition(".")
            whole[f"model.{places[rest + '.' if rest else '']}{parameter}"] = tensor
            continue
        theirs = bert_key(key).replace("input_norm", "ln_vision")
        model = "Qformer." if theirs.startswith("bert.") else ""
        whole[f"model.vision_resampler.{model}{theirs}"] = tensor
    assert "model.vision_resampler.query_tokens" in whole
    whole["model.vision_resampler.Qformer.bert.embeddings.position_ids"] = torch.zeros(1, 512)
    whole |= {"model.layers.0.mlp.up_proj.weight": torch.zeros(2), "lm_head.weight": torch.zeros(2)}
    load_projector_state_dict(target, whole)
    assert_same_weights(source, target)


def test_llava_next_weights_ask_for_the_norm():
    source = randomise(build("qformer_llava_next", {"cross_attention_frequency": 2}))
    with pytest.raises(ProjectorError, match="input_norm=true"):
        load_projector_state_dict(build(), source.to_original_state_dict(source.state_dict()))


def test_norm_on_the_features_comes_from_transformers_vision_tower():
    source, target = randomise(build(options={"input_norm": True})), build(options={"input_norm": True})
    norm = "vision_model.post_layernorm"
    whole = {key.replace("input_norm", norm): tensor for key, tensor in source.state_dict().items()}
    whole |= {"vision_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2), "language_model.x.weight": torch.zeros(2)}
    load_projector_state_dict(target, whole)
    assert_same_weights(source, target)
    plain = build()
    load_projector_state_dict(plain, whole)
    assert_same_weights(plain, source)


def test_tinyllavas_keys_load_with_and_without_a_weighted_norm_on_the_queries():
    source = randomise(build("qformer_tinyllava"))
    stored = {"_connector.bert.embeddings.position_ids": torch.zeros(1, 512)}
    for key, tensor in source.state_dict().items():
        stored["_connector." + bert_key(key).replace("language_projection", "projector")] = tensor
    assert not any("LayerNorm" in key and "embeddings" in key for key in stored)
    same, affine = build("qformer_tinyllava"), build()
    features = [torch.randn(2, 6, VISION)]
    for projector in (same, affine):
        load_projector_state_dict(projector, stored)
        assert_same_weights(source, projector)
        assert torch.equal(projector(features, GRID), source(features, GRID))
    assert affine.qformer.layernorm.weight.eq(1).all() and affine.qformer.layernorm.bias.eq(0).all()


def test_older_tinyllava_weights_keep_their_norm_on_the_queries():
    source, target = randomise(build()), build()
    stored = {bert_key(key).replace("language_projection", "projector"): t for key, t in source.state_dict().items()}
    load_projector_state_dict(target, {f"_connector.{key}": tensor for key, tensor in stored.items()})
    assert_same_weights(source, target)
    with pytest.raises(ProjectorError, match="Unexpected: qformer.layernorm.weight"):
        load_projector_state_dict(build("qformer_tinyllava"), stored)


@pytest.mark.parametrize(
    "options, keys",
    [
        ({"input_norm": True}, ("vision_resampler.ln_vision.bias", "mm_projector.weight")),
        ({"input_norm": True}, ("vision_resampler.Qformer.bert.embeddings.LayerNorm.bias",)),
        ({"input_norm": True, "readout_depth": 2}, ("vision_resampler.query_tokens", "mm_projector.2.bias")),
        ({"affine_query_norm": False}, ("query_tokens", "bert.encoder.layer.0.attention.self.key.bias")),
        ({"affine_query_norm": False, "readout_depth": 2}, ("projector.0.bias",)),
        ({}, ("qformer.encoder.layer.0.attention.attention.key.bias", "language_projection.bias")),
    ],
)
def test_export_has_the_keys_of_the_original_of_that_form(options, keys):
    projector = build(options=options)
    exported = projector.to_original_state_dict(projector.state_dict())
    assert set(keys) <= set(exported) and len(exported) == len(projector.state_dict())


@pytest.mark.parametrize(
    "spelling, options, num_parameters, num_tokens",
    [
        ("qformer_llava_next", {}, 99_260_928, 32),  # with the read-out, as counted on the original
        ("qformer_llava_next", {"cross_attention_frequency": 2}, 104_775_168, 32),
        ("qformer_tinyllava", {}, 104_845_312, 128),
    ],
)
def test_presets_have_the_originals_sizes(spelling, options, num_parameters, num_tokens):
    selection = select_projector(spelling, options)
    config = selection.build_config(vision_hidden_size=1024, text_hidden_size=4096)
    with torch.device("meta"):
        projector = selection.build(config)
    assert sum(parameter.numel() for parameter in projector.parameters()) == num_parameters
    assert config.num_output_tokens(PatchGrid(24, 24)) == num_tokens


def test_presets_fix_what_they_mean():
    assert select_projector("qformer_tinyllava", {"num_queries": 7}).options["num_queries"] == 7
    for spelling, option in (("qformer_tinyllava", "affine_query_norm"), ("qformer_llava_next", "input_norm")):
        fixed = select_projector(spelling).options[option]
        with pytest.raises(ProjectorError, match=f"{spelling}.*{option}={fixed}"):
            select_projector(spelling, {option: not fixed})


@pytest.mark.parametrize(
    "options",
    [
        {"input_norm": True, "vision_layers": [1, 3]},
        {"affine_query_norm": False, "keep_cls_token": True},
        {"readout_depth": 3, "cross_attention_frequency": 1},
        {"input_norm": True, "affine_query_norm": False, "readout_depth": 2},
    ],
)
def test_options_keep_the_contract(options):
    check_projector("qformer", options).raise_if_failed()
