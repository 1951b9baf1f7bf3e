"""Our projectors, loaded with an original's weights through the checkpoint mapping, give the original's output."""

from __future__ import annotations

import json
import zlib

import numpy
import pytest
import torch
from safetensors.torch import load_file

from projectors import PatchGrid, Projector, load_projector_state_dict, select_projector
from tests.parity.cases import CASES, REFERENCE_FOLDER

REFERENCES = sorted(path.stem for path in REFERENCE_FOLDER.glob("*.json"))


def read_reference(name: str) -> dict:
    return json.loads((REFERENCE_FOLDER / f"{name}.json").read_text())


def original_weights(reference: dict) -> dict[str, torch.Tensor]:
    """The weights by the recipe in the reference folder's README."""
    weights = {}
    for key, shape, offset, scale in reference["parameters"]:
        generator = numpy.random.RandomState((zlib.crc32(key.encode()) + reference["seed"]) % 2**32)
        values = offset + scale * generator.standard_normal(shape)
        weights[key] = torch.from_numpy(numpy.asarray(values, dtype=numpy.float32))
    return weights


def original_inputs(reference: dict) -> list[torch.Tensor]:
    return [
        torch.from_numpy(numpy.random.RandomState(seed).standard_normal(shape).astype(numpy.float32))
        for shape, seed in zip(reference["inputs"], reference["input_seeds"], strict=True)
    ]


def build_projector(name: str, original_options: dict) -> Projector:
    case = CASES[name]
    selection = select_projector(case.spelling, case.options(original_options))
    config = selection.build_config(
        vision_hidden_size=original_options["mm_hidden"], text_hidden_size=original_options["hidden"]
    )
    return selection.build(config).eval()


def test_reference_data_is_there():
    assert set(CASES) <= set(REFERENCES)


@pytest.mark.parametrize("name", REFERENCES)
def test_output_equals_the_originals(name):
    if name not in CASES:
        pytest.skip(f"no projector here claims the reference data {name!r}")
    reference = read_reference(name)
    projector = build_projector(name, reference["options"])
    load_projector_state_dict(projector, original_weights(reference))
    side = reference["options"]["grid"]
    with torch.no_grad():
        output = projector(original_inputs(reference), PatchGrid(side, side))
    expected = load_file(REFERENCE_FOLDER / f"{name}.safetensors")["output"]
    torch.testing.assert_close(output, expected, rtol=0, atol=CASES[name].tolerance)


@pytest.mark.parametrize("name", sorted(CASES))
def test_original_keys_load_under_the_prefixes_that_checkpoints_use(name):
    reference = read_reference(name)
    weights = original_weights(reference)
    bare, prefixed = build_projector(name, reference["options"]), build_projector(name, reference["options"])
    load_projector_state_dict(bare, weights)
    whole_model = {f"base_model.model.model.mm_projector.{key}": tensor for key, tensor in weights.items()}
    whole_model["model.embed_tokens.weight"] = torch.zeros(3, 4)
    load_projector_state_dict(prefixed, whole_model)
    for key, tensor in bare.state_dict().items():
        assert torch.equal(tensor, prefixed.state_dict()[key]), key


@pytest.mark.parametrize("name", sorted(CASES))
def test_original_keys_come_back(name):
    reference = read_reference(name)
    weights = original_weights(reference)
    projector = build_projector(name, reference["options"])
    load_projector_state_dict(projector, weights)
    exported = projector.to_original_state_dict(projector.state_dict())
    assert set(exported) == set(weights)
    assert all(torch.equal(exported[key], tensor) for key, tensor in weights.items())
