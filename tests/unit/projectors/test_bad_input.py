"""What a user gets wrong about a projector: mistakes are named with both numbers, foreign weights by their owner."""

from __future__ import annotations

import typing

import pytest
import torch

from projectors import (
    PatchGrid,
    ProjectorError,
    _recognition,
    load_projector_state_dict,
    projector_spec,
    registered_presets,
    registered_projectors,
    select_projector,
)
from projectors._options import option_fields
from projectors._recognition import recognise_projector
from projectors._windows import WindowedProjectorConfig

CLIP_L_AND_7B = {"vision_hidden_size": 1024, "text_hidden_size": 4096, "num_vision_layers": 24}


def numbers_out_of_range():
    """(projector, option, wrong value, the bound that it crosses) for each bounded option of each projector."""
    for name in registered_projectors():
        for option_name, field in option_fields(projector_spec(name).config_class).items():
            for bound, step in (("minimum", -1), ("maximum", 1)):
                limit = field.metadata.get(bound)
                if limit is not None:
                    yield name, option_name, limit + step, limit


def wrong_choices():
    """(projector, option, its choices) for each option that is one of several values."""
    for name in registered_projectors():
        config_class = projector_spec(name).config_class
        hints = typing.get_type_hints(config_class)
        for option_name in option_fields(config_class):
            if typing.get_origin(hints[option_name]) is typing.Literal:
                yield name, option_name, typing.get_args(hints[option_name])


def as_typed(name, option_name, value):
    """The value as a command line has it, twice where the option is a pair."""
    hint = typing.get_type_hints(projector_spec(name).config_class)[option_name]
    is_pair = any(typing.get_origin(part) is tuple for part in (hint, *typing.get_args(hint)))
    return "|".join([str(value)] * (1 + is_pair))


@pytest.mark.parametrize("name, option_name, value, limit", list(numbers_out_of_range()))
def test_number_out_of_range_is_refused_with_the_option_the_number_and_the_limit(name, option_name, value, limit):
    with pytest.raises(ProjectorError) as error:
        select_projector(name, {option_name: as_typed(name, option_name, value)})
    assert all(word in str(error.value) for word in (f"'{option_name}'", f"got {value}", f" {limit}"))


def integers():
    """(projector, option) for each option that holds integers, but the layers, which the tower bounds."""
    for name in registered_projectors():
        config_class = projector_spec(name).config_class
        hints = typing.get_type_hints(config_class)
        for option_name in option_fields(config_class):
            types = {hints[option_name], *typing.get_args(hints[option_name])}
            if option_name != "vision_layers" and types & {int, tuple[int, int], tuple[int, ...]}:
                yield name, option_name


@pytest.mark.parametrize("name, option_name", list(integers()))
def test_integer_beyond_all_sense_is_refused_before_anything_is_built(name, option_name):
    with pytest.raises(ProjectorError, match=f"'{option_name}': got 99999999999, expected at most 1000"):
        select_projector(name, {option_name: as_typed(name, option_name, 99999999999)})


@pytest.mark.parametrize("name, option_name, choices", list(wrong_choices()))
def test_value_that_is_no_choice_is_refused_with_the_choices(name, option_name, choices):
    with pytest.raises(ProjectorError) as error:
        select_projector(name, {option_name: "99"})
    assert all(word in str(error.value) for word in (f"'{option_name}'", "'99'", *map(str, choices)))


WINDOWED = [
    name for name in registered_projectors() if issubclass(projector_spec(name).config_class, WindowedProjectorConfig)
]


@pytest.mark.parametrize("name", WINDOWED)
def test_grid_that_the_windows_do_not_tile_is_refused_with_grid_and_factor(name):
    config = select_projector(name, {"factor": 5}).build_config(**CLIP_L_AND_7B)
    with pytest.raises(ProjectorError, match=r"24x24 grid.*factor 5 divides"):
        config.num_output_tokens(PatchGrid(24, 24))


@pytest.mark.parametrize("name", registered_projectors())
@pytest.mark.parametrize("layer", [40, -40])
def test_layer_that_the_tower_lacks_is_refused_with_layer_and_depth(name, layer):
    layers = [*projector_spec(name).config_class.default_vision_layers(24, {})[:-1], layer]
    widths = CLIP_L_AND_7B | ({"text_hidden_size": 1024} if name == "identity" else {})
    with pytest.raises(ProjectorError, match=f"layer {layer} does not exist.*24 blocks"):
        select_projector(name, {"vision_layers": layers}).build_config(**widths)


@pytest.mark.parametrize("layers", [(-2,), ()])
def test_projector_that_joins_layers_refuses_too_few_with_both_numbers(layers):
    with pytest.raises(ProjectorError, match=rf"got {len(layers) or 'no'} layer.*expected at least"):
        select_projector("dense_connector", {"vision_layers": list(layers)}).build_config(**CLIP_L_AND_7B)


# Whose weights are these?


def weights_of(name, original):
    """Keys and shapes between CLIP-L and a 7B model, without memory."""
    selection = select_projector(name)
    config = selection.build_config(**CLIP_L_AND_7B | ({"text_hidden_size": 1024} if name == "identity" else {}))
    with torch.device("meta"):
        projector = selection.build(config)
    weights = projector.state_dict()
    return projector.to_original_state_dict(weights) if original else weights


NAMES_WITH_WEIGHTS = [
    name
    for name in (*registered_projectors(), *registered_presets(), "mlp1x_gelu", "mlp3x_gelu", "mlp2x_res2x_gelu")
    if name != "identity"
]


@pytest.fixture(scope="module")
def all_candidates():
    return list(_recognition._candidates(**CLIP_L_AND_7B))


@pytest.mark.parametrize("name", NAMES_WITH_WEIGHTS)
def test_weights_are_recognised_by_their_keys(name, all_candidates, monkeypatch):
    monkeypatch.setattr(_recognition, "_candidates", lambda *arguments, **widths: all_candidates)
    registered = select_projector(name).name
    for prefix, is_original in (("", False), ("model.mm_projector.", True)):
        weights = {prefix + key: tensor for key, tensor in weights_of(name, is_original).items()}
        names, is_exact = recognise_projector(weights, **CLIP_L_AND_7B)
        assert is_exact
        # A preset with the keys of its projector is called by the projector's name.
        assert name in names or registered in names, names


@pytest.mark.parametrize("shape", [(), (1, 2, 3)])
@pytest.mark.parametrize("name", NAMES_WITH_WEIGHTS)
def test_tensors_of_senseless_shapes_are_refused_like_all_others(name, shape):
    """A converter that slices or joins tensors may meet any."""
    selection = select_projector(name)
    with torch.device("meta"):
        projector = selection.build(selection.build_config(**CLIP_L_AND_7B))
    weights = {key: torch.empty(shape, device="meta") for key in weights_of(name, original=True)}
    with pytest.raises(ProjectorError, match="these weights"):
        load_projector_state_dict(projector, weights)


def test_weights_of_other_depth_are_recognised_as_near():
    selection = select_projector("qformer", {"num_hidden_layers": 10})
    with torch.device("meta"):
        weights = selection.build(selection.build_config(**CLIP_L_AND_7B)).state_dict()
    assert recognise_projector(weights, **CLIP_L_AND_7B) == (("qformer",), False)


def test_weights_of_other_widths_are_recognised():
    weights = weights_of("qformer", original=True)
    narrow = {"vision_hidden_size": 768, "text_hidden_size": 2048, "num_vision_layers": 12}
    assert recognise_projector(weights, **narrow) == (("qformer",), True)


def test_weights_of_nobody_are_nobodys():
    weights = {f"encoder.{index}.kernel": torch.zeros(3) for index in range(9)}
    assert recognise_projector(weights, **CLIP_L_AND_7B) == ((), False)
    assert recognise_projector({}, **CLIP_L_AND_7B) == ((), False)


@pytest.mark.parametrize("name", NAMES_WITH_WEIGHTS)
def test_whether_weights_fit_is_decided_without_their_values(name):
    """Before anything is loaded, a file's keys and shapes alone are tried on the projector."""
    selection = select_projector(name)
    with torch.device("meta"):
        projector = selection.build(selection.build_config(**CLIP_L_AND_7B))
    load_projector_state_dict(projector, weights_of(name, original=True))
    short = dict(list(weights_of(name, original=True).items())[:-1])
    with pytest.raises(ProjectorError):
        load_projector_state_dict(projector, short)
