"""Our projectors, loaded with an original's weights through the checkpoint mapping, give the original's output."""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

from projectors import Projector, load_projector_state_dict, select_projector
from projectors._checkpoint import CHECKPOINT_MARKERS
from tests.parity.cases import CASES, REFERENCE_FOLDER, Case, complete_options, find_case, grid_of

REFERENCES = sorted(path.stem for path in REFERENCE_FOLDER.glob("*.json"))


@functools.cache
def read_reference(stem: str) -> dict:
    return json.loads((REFERENCE_FOLDER / f"{stem}.json").read_text())


def claimed_case(stem: str) -> Case:
    reference = read_reference(stem)
    names = (reference.get("name", stem), stem)
    cases = [case for case in (find_case(name, reference["options"]) for name in names) if case is not None]
    assert cases, f"no projector here claims the reference data {stem!r} (original: {names[0]!r})"
    return cases[0]


@functools.lru_cache(maxsize=2)  # the tests of one reference run one after another
def original_weights(stem: str) -> dict[str, torch.Tensor]:
    """The weights by the recipe in the reference folder's README."""
    reference, weights = read_reference(stem), {}
    for key, shape, offset, scale in reference["parameters"]:
        generator = numpy.random.RandomState((zlib.crc32(key.encode()) + reference["seed"]) % 2**32)
        values = offset + scale * generator.standard_normal(shape)
        weights[key] = torch.from_numpy(numpy.asarray(values, dtype=numpy.float32))
    return weights


def original_inputs(stem: str) -> list[torch.Tensor]:
    """The tensors of patch features, a class token in front dropped."""
    reference = read_reference(stem)
    inputs = [
        torch.from_numpy(numpy.random.RandomState(seed).standard_normal(shape).astype(numpy.float32))
        for shape, seed in zip(reference["inputs"], reference["input_seeds"], strict=True)
    ]
    num_patches = grid_of(reference["options"]).num_patches
    return [tokens[:, tokens.shape[1] - num_patches :] for tokens in inputs]


def build_projector(stem: str) -> Projector:
    reference, case = read_reference(stem), claimed_case(stem)
    original, num_inputs = complete_options(reference), len(reference["inputs"])
    options = case.options(original)
    if num_inputs > 1 and not case.reads_hidden_states:
        options["vision_layers"] = list(range(num_inputs))
    selection = select_projector(case.spelling, options)
    config = selection.build_config(
        vision_hidden_size=original["mm_hidden"],
        text_hidden_size=original["hidden"],
        num_vision_layers=num_inputs - 1 if case.reads_hidden_states else None,
    )
    return selection.build(config).eval()


def test_reference_data_is_there():
    assert REFERENCES, f"no reference data in {REFERENCE_FOLDER}"


@pytest.mark.parametrize("stem", REFERENCES)
def test_output_equals_the_originals(stem):
    projector = build_projector(stem)
    load_projector_state_dict(projector, original_weights(stem))
    features, grid = original_inputs(stem), grid_of(read_reference(stem)["options"])
    if claimed_case(stem).reads_hidden_states:
        features = [features[layer] for layer in projector.config.vision_layers]
    with torch.no_grad():
        output = projector(features, grid)
    assert output.shape[1] == projector.config.num_output_tokens(grid)
    expected = load_file(REFERENCE_FOLDER / f"{stem}.safetensors")["output"]
    torch.testing.assert_close(output, expected, rtol=0, atol=claimed_case(stem).tolerance)


@pytest.mark.parametrize("stem", REFERENCES)
def test_original_keys_load_from_a_whole_models_state_dict(stem):
    weights = original_weights(stem)
    bare, prefixed = build_projector(stem), build_projector(stem)
    load_projector_state_dict(bare, weights)
    names_itself = any(key.split(".")[0] in CHECKPOINT_MARKERS for key in weights)
    prefix = "base_model.model.model." + ("" if names_itself else "mm_projector.")
    whole_model = {prefix + key: tensor for key, tensor in weights.items()}
    whole_model["base_model.model.model.embed_tokens.weight"] = torch.zeros(3, 4)
    whole_model["base_model.model.lm_head.weight"] = torch.zeros(3, 4)
    load_projector_state_dict(prefixed, whole_model)
    for key, tensor in bare.state_dict().items():
        assert torch.equal(tensor, prefixed.state_dict()[key]), key


def without_common_prefix(keys: Iterable[str]) -> Mapping[str, str]:
    """Short key -> key, where all keys begin with the same name of a projector."""
    keys = list(keys)
    first = {key.split(".")[0] for key in keys}
    is_marked = len(first) == 1 and first <= set(CHECKPOINT_MARKERS)
    return {key.partition(".")[2] if is_marked else key: key for key in keys}


@pytest.mark.parametrize("stem", REFERENCES)
def test_original_keys_come_back(stem):
    weights = original_weights(stem)
    projector = build_projector(stem)
    load_projector_state_dict(projector, weights)
    exported = projector.to_original_state_dict(projector.state_dict())
    ours, theirs = without_common_prefix(exported), without_common_prefix(weights)
    assert set(ours) == set(theirs)
    assert all(torch.equal(exported[ours[short]], weights[theirs[short]]) for short in theirs)


def test_unknown_reference_data_is_not_claimed():
    for name in ("mystery", "linearised", "nonlinear", "c_abstractors", "mlp2x_relu", "mlp2x_gelus", "qformers"):
        assert find_case(name, {"grid": 8}) is None


def test_any_naming_of_an_original_is_claimed():
    named = CASES["c_abstractor"]
    for name in ("c_abstractor-12", "c_abstractor_12x12", "c_abstractor2", "03_c_abstractor", "C-Abstractor seed 7"):
        assert find_case(name, {"grid": 12}) is named
    assert find_case("qwen2.5vl_merger", {"kind": "2.5"}) is CASES["qwen2_5vl_merger"]
    assert find_case("dense_connector", {"kind": "sci"}) is CASES["dense_connector_sci"]
    assert find_case("tinyllava_qformer_q7", {}) is not find_case("qformer_q7", {})


def test_the_spelling_of_an_mlp_is_read_from_name_or_options():
    assert find_case("mlp3x_res1x_gelu", {"grid": 8}).spelling == "mlp3x_res1x_gelu"
    assert find_case("llava_next_mlp2x_res4x_gelu_b", {}).spelling == "mlp2x_res4x_gelu"
    assert find_case("case_003", {"projector_type": "mlp4x_gelu"}).spelling == "mlp4x_gelu"
    assert find_case("case_003", {"projector_type": "linear"}) is CASES["linear"]
    # The read-out of another projector is no MLP of its own.
    assert find_case("perceiver_resampler", {"projector_type": "mlp2x_gelu"}) is CASES["perceiver_resampler"]


def test_sizes_left_out_are_the_originals():
    keys = ["vision_resampler.perceiver.layers.0.0.to_q.weight", "vision_resampler.perceiver.layers.10.0.to_q.weight"]
    keys += ["mm_projector.0.weight", "mm_projector.2.weight"]
    reference = {"options": {}, "parameters": [[key, [1], 0.0, 1.0] for key in keys], "output": [2, 9, 48]}
    options = CASES["perceiver_resampler"].options(complete_options(reference))
    assert options == {"num_queries": 9, "depth": 2, "readout_depth": 2}
    stated = CASES["perceiver_resampler"].options(complete_options(reference | {"options": {"depth": 3, "latents": 5}}))
    assert stated == {"num_queries": 5, "depth": 3, "readout_depth": 2}


def test_reference_folder_is_a_folder():
    assert Path(REFERENCE_FOLDER).is_dir()
