"""Projector weights from other projects' checkpoints, where they lie among everything else that a model has."""

import pytest
import torch

from llava_saep.errors import UserError
from llava_saep.model.loading import build_model, load_projector_weights
from projectors import projector_spec, select_projector
from tests.fixtures.tiny import write_bases

SURROUNDINGS = {
    "model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2),
    "vision_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2, 2),
    "language_model.lm_head.weight": torch.zeros(2, 2),
}
PLACES = {
    "c_abstractor": "abstractor.",  # Honeybee
    "d_abstractor": "abstractor.",
    "token_packer": "model.mm_projector.",  # TokenPacker
    "ldp": "model.mm_projector.",  # MobileVLM
    "ldpv2": "model.mm_projector.",
    "mlp": "multi_modal_projector.",  # llava-hf before transformers 4.52
}
"""Under which name each project keeps its projector."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


def build(bases, name, **kwargs):
    return build_model(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        projector=select_projector(name, projector_spec(name).config_class.tiny_options()),
        image_token_id=400,
        **kwargs,
    )


def original_file(model, folder, place):
    """What the project itself would have saved: its keys, in its place, among others."""
    projector = model.model.multi_modal_projector
    for index, parameter in enumerate(projector.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    original = projector.to_original_state_dict(projector.state_dict())
    torch.save(SURROUNDINGS | {f"{place}{key}": tensor for key, tensor in original.items()}, folder / "model.bin")
    return folder / "model.bin"


@pytest.mark.parametrize(("name", "place"), PLACES.items())
def test_weights_are_found_by_their_place_and_converted(tmp_path, bases, name, place):
    model = build(bases, name)
    file = original_file(model, tmp_path, place)
    expected = model.model.multi_modal_projector.state_dict()
    started = build(bases, name, projector_weights=file).model.multi_modal_projector.state_dict()
    assert started.keys() == expected.keys()
    assert all(torch.equal(started[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize(("name", "place"), PLACES.items())
def test_missing_or_misshapen_tensor_is_an_error(tmp_path, bases, name, place):
    model = build(bases, name)
    file = original_file(model, tmp_path, place)
    stored = torch.load(file, weights_only=True)
    key = next(key for key in stored if key.startswith(place) and stored[key].dim() > 0)
    torch.save({other: tensor for other, tensor in stored.items() if other != key}, file)
    with pytest.raises(UserError, match="Missing"):
        load_projector_weights(model, file)
    torch.save({**stored, key: torch.cat([stored[key], stored[key]])}, file)
    with pytest.raises(UserError, match="expected"):
        load_projector_weights(model, file)
