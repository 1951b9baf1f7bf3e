"""Weights load under every prefix and spelling that the field uses, or not at all."""

from __future__ import annotations

import pytest
import torch

from projectors import PatchGrid, ProjectorError, load_projector_state_dict, select_projector


def build(spelling, options=None, vision_hidden_size=8, text_hidden_size=12):
    selection = select_projector(spelling, options)
    config = selection.build_config(vision_hidden_size=vision_hidden_size, text_hidden_size=text_hidden_size)
    return selection.build(config).eval()


def random_weights(projector):
    return {key: torch.randn_like(tensor) for key, tensor in projector.state_dict().items()}


def assert_loaded(projector, weights):
    for key, tensor in projector.state_dict().items():
        assert torch.equal(tensor, weights[key]), key


@pytest.mark.parametrize(
    "first, second",
    [
        ("model.mm_projector.0", "model.mm_projector.2"),
        ("mm_projector.0", "mm_projector.2"),
        ("base_model.model.model.mm_projector.0", "base_model.model.model.mm_projector.2"),
        ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
        ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
        ("_connector.0", "_connector.2"),
        ("projector.projector.0", "projector.projector.2"),
        ("0", "2"),
    ],
)
def test_mlp_reads_the_fields_spellings(first, second):
    projector = build("mlp2x_gelu")
    weights = random_weights(projector)
    theirs = {key.replace("mlp.0", first).replace("mlp.2", second): tensor for key, tensor in weights.items()}
    load_projector_state_dict(projector, theirs)
    assert_loaded(projector, weights)


def test_projector_is_found_in_a_whole_models_state_dict():
    projector = build("linear")
    weights = random_weights(projector)
    whole = {
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(12, 8),
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(12),
        "model.mm_projector.weight": weights["linear.weight"],
        "model.mm_projector.bias": weights["linear.bias"],
        "model.embed_tokens.weight": torch.zeros(5, 12),
    }
    load_projector_state_dict(projector, whole)
    assert_loaded(projector, weights)


TINY_PERCEIVER = {"num_queries": 3, "depth": 1, "num_heads": 2, "head_size": 4}


@pytest.mark.parametrize(
    "larger, options, part",
    [
        ("perceiver", TINY_PERCEIVER, "linear"),
        ("perceiver", TINY_PERCEIVER | {"readout_depth": 2}, "mlp2x_gelu"),
        ("llava_sp", {"kernel_sizes": [1, 2]}, "mlp2x_gelu"),
        ("llava_sp", {"kernel_sizes": [1, 2], "variant": "cropping", "detail_kernel_size": 2}, "mlp2x_gelu"),
        ("token_fusion", {}, "mlp2x_gelu"),
    ],
)
@pytest.mark.parametrize("outer", ["model.", "base_model.model.model.", ""])
def test_part_of_a_larger_projector_is_not_loaded_as_if_it_were_the_whole(larger, options, part, outer):
    """What lies beside `mm_projector` would be lost without a word."""
    whole = build(larger, options)
    theirs = {outer + key: tensor for key, tensor in whole.to_original_state_dict(random_weights(whole)).items()}
    theirs[f"{outer}layers.0.self_attn.q_proj.weight"] = torch.zeros(12, 12)
    smaller = build(part)
    if larger == "token_fusion":  # whose read-out is as wide as an MLP's only where both are cut to fit
        own = build(part).to_original_state_dict(random_weights(smaller))
        theirs = {key: tensor for key, tensor in theirs.items() if "crosslayer" in key}
        theirs |= {f"{outer}mm_projector.{key}": tensor for key, tensor in own.items()}
    before = {key: tensor.clone() for key, tensor in smaller.state_dict().items()}
    left_out = next(key for key in theirs if "mm_projector." not in key and "layers.0.self_attn" not in key)
    with pytest.raises(ProjectorError, match=f"Missing: none. Unexpected: .*{left_out}"):
        load_projector_state_dict(smaller, theirs)
    assert_loaded(smaller, before)
    if larger != "token_fusion":
        load_projector_state_dict(whole, theirs)


def test_what_else_a_whole_model_holds_beside_its_projector_is_passed_over():
    """Also where a vision tower has modules of the names that parts of projectors have."""
    projector = build("mlp2x_gelu")
    weights = random_weights(projector)
    tower = "model.vision_tower.vision_tower.vision_model"
    whole = {f"model.mm_projector.{key.removeprefix('mlp.')}": tensor for key, tensor in weights.items()}
    others = ("model.embed_tokens.weight", "model.image_newline", "model.norm.weight", "lm_head.weight")
    inner = ("conv_1.weight", "vision_resampler.norm.weight", "encoder.layers.0.query_projector.weight")
    whole |= {key: torch.zeros(2) for key in (*others, *(f"{tower}.{key}" for key in inner))}
    load_projector_state_dict(projector, whole)
    assert_loaded(projector, weights)


def test_llava_export_is_the_inverse_of_loading():
    for spelling, keys in (("linear", {"weight", "bias"}), ("mlp1x_gelu", {"0.weight", "0.bias"})):
        projector = build(spelling)
        assert set(projector.to_original_state_dict(projector.state_dict())) == keys


def test_missing_and_unexpected_tensors_are_named_and_nothing_is_loaded():
    projector = build("mlp2x_gelu")
    before = {key: tensor.clone() for key, tensor in projector.state_dict().items()}
    with pytest.raises(ProjectorError) as error:
        load_projector_state_dict(
            projector, {"mm_projector.0.weight": torch.zeros(12, 8), "mm_projector.9.x": torch.zeros(1)}
        )
    assert all(word in str(error.value) for word in ("MLPProjector", "mlp.0.bias", "mlp.2.weight", "mlp.9.x"))
    assert_loaded(projector, before)


def test_misshapen_tensor_is_named_with_both_shapes_and_nothing_is_loaded():
    projector, wider = build("mlp2x_gelu"), build("mlp2x_gelu", vision_hidden_size=9)
    before = {key: tensor.clone() for key, tensor in projector.state_dict().items()}
    with pytest.raises(ProjectorError) as error:
        load_projector_state_dict(projector, wider.state_dict())
    assert all(word in str(error.value) for word in ("mlp.0.weight", "(12, 9)", "(12, 8)"))
    assert_loaded(projector, before)


def test_empty_state_dict_is_refused():
    with pytest.raises(ProjectorError, match="Missing: linear.weight, linear.bias"):
        load_projector_state_dict(build("linear"), {})


def test_half_precision_file_loads_into_a_float32_projector():
    projector = build("linear")
    weights = random_weights(projector)
    load_projector_state_dict(projector, {key: tensor.half() for key, tensor in weights.items()})
    assert projector.linear.weight.dtype == torch.float32
    torch.testing.assert_close(projector.linear.weight.detach(), weights["linear.weight"], rtol=1e-3, atol=1e-3)


def test_projector_on_the_meta_device_takes_the_tensors_over():
    selection = select_projector("linear")
    with torch.device("meta"):
        projector = selection.build(selection.build_config(vision_hidden_size=8, text_hidden_size=12))
    weights = random_weights(build("linear"))
    load_projector_state_dict(projector, weights)
    assert_loaded(projector, weights)


TINY_QFORMER = {
    "num_queries": 5,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}


def test_tinyllava_qformer_keys_give_the_same_network():
    projector, features = build("qformer", TINY_QFORMER), [torch.randn(2, 6, 8)]
    weights = random_weights(projector)
    # TinyLLaVA's norm of the queries has neither gain nor bias.
    weights["qformer.layernorm.weight"] = torch.ones(24)
    weights["qformer.layernorm.bias"] = torch.zeros(24)
    load_projector_state_dict(projector, weights)
    theirs = {"_connector.bert.embeddings.position_ids": torch.arange(512)[None]}
    for key, tensor in weights.items():
        if key.startswith("qformer.layernorm"):
            continue
        key = key.replace("attention.attention.", "attention.self.").replace("qformer.", "bert.")
        theirs["_connector." + key.replace("language_projection", "projector")] = tensor
    assert "_connector.bert.encoder.layer.0.crossattention.self.key.weight" in theirs
    other = build("qformer", TINY_QFORMER)
    load_projector_state_dict(other, theirs)
    assert torch.equal(other(features, PatchGrid(2, 3)), projector(features, PatchGrid(2, 3)))


def test_qformer_is_found_in_a_whole_blip2_state_dict():
    projector = build("qformer", TINY_QFORMER)
    weights = random_weights(projector)
    whole = weights | {"vision_model.x.weight": torch.zeros(1), "language_model.y.weight": torch.zeros(1)}
    load_projector_state_dict(projector, whole)
    assert_loaded(projector, weights)


def test_honeybees_position_of_the_class_token_is_dropped():
    options = {"num_queries": 4, "hidden_size": 16, "depth": 1, "position_grid": [2, 3]}
    projector = build("c_abstractor", options)
    weights = random_weights(projector)
    theirs = {f"abstractor.{key}": tensor for key, tensor in weights.items()}
    theirs["abstractor.pos_emb"] = torch.cat([torch.full((1, 1, 8), 9.0), weights["pos_emb"]], dim=1)
    load_projector_state_dict(projector, theirs)
    assert_loaded(projector, weights)


def test_honeybee_checkpoint_of_another_resolution_names_both_shapes():
    options = {"num_queries": 4, "hidden_size": 16, "depth": 1}
    large = build("c_abstractor", options | {"position_grid": [4, 4]})
    small = build("c_abstractor", options | {"position_grid": [2, 3]})
    with pytest.raises(ProjectorError, match=r"pos_emb is \(1, 16, 8\), expected \(1, 6, 8\)"):
        load_projector_state_dict(small, {f"abstractor.{key}": tensor for key, tensor in large.state_dict().items()})
