"""Dense Connector: each kind against a hand-written fusion, in front of every projector that reads one layer."""

from __future__ import annotations

import pytest
import torch

from projectors import (
    PatchGrid,
    ProjectorError,
    load_projector_state_dict,
    parse_projector_options,
    registered_projectors,
    select_projector,
)
from projectors.conformance import check_projector

GRID = PatchGrid(4, 6)
NEEDS_SEVERAL_LAYERS = {"dense_connector", "token_packer"}


def build(options=None, num_vision_layers=6, spelling="dense_connector", widths=(8, 12)):
    selection = select_projector(spelling, options or {})
    config = selection.build_config(
        vision_hidden_size=widths[0], text_hidden_size=widths[1], num_vision_layers=num_vision_layers
    )
    torch.manual_seed(0)
    return selection.build(config).eval()


def hidden_states(num_vision_layers=6, channels=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, GRID.num_patches, channels, generator=generator) for _ in range(num_vision_layers + 1)]


def read(states, projector):
    return [states[layer] for layer in projector.config.vision_layers]


@pytest.mark.parametrize(
    "kind, num_vision_layers, layers",
    [
        ("sti", 24, (7, 15, 23)),
        ("sci", 24, (7, 15, 23)),
        ("dci", 24, (*range(24), 23)),
        (
            "dci",
            27,
            (*range(26), 26),
        ),  # SigLIP-so400m: means of h0 to h12 and h13 to h25, without the base
        ("sci", 12, (4, 8, 11)),
        ("sci", 3, (1, 2)),  # two of the relative depths meet, or the base
        ("sti", 2, (0, 1)),
    ],
)
def test_layers_are_the_originals_relative_depths(kind, num_vision_layers, layers):
    assert build({"kind": kind}, num_vision_layers).config.vision_layers == layers


# Equal operations in another order of summation: float32 at unit scale agrees to 1e-6; 1e-5 leaves room.
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def test_dci_concatenates_the_means_of_both_halves():
    states, projector = hidden_states(), build({"kind": "dci"})
    shallow, deep = (states[0] + states[1] + states[2]) / 3, (states[3] + states[4] + states[5]) / 3
    assert projector.config.vision_layers == (0, 1, 2, 3, 4, 5, 5)
    expected = projector.projector([torch.cat([states[5], shallow, deep], dim=2)], GRID)
    torch.testing.assert_close(projector(read(states, projector), GRID), expected, **TOLERANCE)


def test_sci_concatenates_the_base_first():
    states, projector = hidden_states(), build({"kind": "sci", "vision_layers": [1, 4, 5]})
    expected = projector.projector([torch.cat([states[5], states[1], states[4]], dim=2)], GRID)
    torch.testing.assert_close(projector(read(states, projector), GRID), expected, **TOLERANCE)


def test_sti_appends_strips_of_the_raster():
    states, projector = hidden_states(), build({"kind": "sti", "vision_layers": [1, 4, 5], "pool_size": 5})
    strips = [[states[layer][:, 5 * i : 5 * i + 5].mean(1) for i in range(4)] for layer in (1, 4)]
    tokens = torch.cat([states[5], torch.stack(strips[0], 1), torch.stack(strips[1], 1)], dim=1)
    output = projector(read(states, projector), GRID)
    torch.testing.assert_close(output, projector.projector([tokens], PatchGrid(1, 32)), **TOLERANCE)
    assert output.shape[1] == projector.config.num_output_tokens(GRID) == 24 + 2 * (24 // 5)


@pytest.mark.parametrize("kind", ["sci", "dci"])
@pytest.mark.parametrize("name", sorted(set(registered_projectors()) - NEEDS_SEVERAL_LAYERS))
def test_every_projector_that_reads_one_layer_can_stand_behind(name, kind):
    inner = select_projector(name).spec.config_class.tiny_options()
    options = {"kind": kind, "projector": name, "projector_options": inner, "vision_layers": [1, 3, 5]}
    if name == "identity":
        projector = build(options, widths=(8, 24))
        assert projector(hidden_states()[:3], GRID).shape == (2, 24, 24)
        return
    checks = ("config_survives_json", "output_has_the_promised_shape", "gradient_reaches_the_features")
    checks += ("it_builds_on_the_meta_device", "original_keys_survive_a_round_trip", "input_is_unchanged")
    checks += ("reset_parameters_covers_everything", "state_dict_loads_under_any_prefix")
    check_projector("dense_connector", options, checks=checks).raise_if_failed()


@pytest.mark.parametrize("name", sorted(set(registered_projectors()) - NEEDS_SEVERAL_LAYERS - {"identity"}))
def test_sti_takes_exactly_what_reads_no_map(name):
    tiny = select_projector(name).spec.config_class.tiny_options()
    config = select_projector(name, tiny | {"vision_layers": [-2]}).build_config(
        vision_hidden_size=8, text_hidden_size=12
    )
    options = {"kind": "sti", "projector": name, "projector_options": tiny}
    if config.reads_patch_map:
        with pytest.raises(ProjectorError, match=f"sti.*{name}"):
            build(options)
    else:
        projector = build(options)
        output = projector(read(hidden_states(), projector), GRID)
        assert output.shape[1] == projector.config.num_output_tokens(GRID)


def test_options_of_the_projector_behind_can_be_written_in_three_ways():
    written = (
        {"projector": "avg_pool", "projector_options": {"num_queries": 4, "depth": 1}},
        parse_projector_options("projector=avg_pool,projector_options=[num_queries=4,depth=1]"),
        parse_projector_options('{"projector": "avg_pool", "projector_options": {"num_queries": 4, "depth": 1}}'),
    )
    configs = {str(build(options).config.inner_config) for options in written}
    assert len(configs) == 1
    assert "num_queries=4" in configs.pop()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"vision_layers": [5], "kind": "sci"}, ("got 1", "at least 2")),
        ({"vision_layers": [3, 5], "kind": "dci"}, ("got 2", "at least 3")),
        ({"projector": "mlp", "projector_options": {"keep_cls_token": True}}, ("keep_cls_token",)),
        ({"projector": "mlpp"}, ("mlpp", "Registered")),
        ({"projector": "blur.py:Blur"}, ("blur.py:Blur", "registered names")),
        ({"projector": "token_packer"}, ("token_packer", "one layer")),
        ({"projector": "identity"}, ("identity", "24", "12")),
        ({"projector": "mlp", "projector_options": {"depht": 2}}, ("depht", "depth")),
        ({"projector": "mlp", "projector_options": {"depth": 0}}, ("depth", "0", "at least 1")),
        ({"projector": "mlp", "projector_options": {"vision_layers": [1, 2]}}, ("vision_layers", "projector_options")),
        ({"projector_options": "depth"}, ("depth", "key=value")),
        ({"projector_options": 3}, ("projector_options", "3")),
        ({"kind": "sti", "projector": "c_abstractor"}, ("sti", "c_abstractor")),
        ({"keep_cls_token": True}, ("keep_cls_token",)),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ProjectorError) as error:
        build({"vision_layers": [1, 3, 5]} | options)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("inner", ["mlp2x_gelu", "c_abstractor"])
def test_weights_of_the_projector_behind_load_in_its_own_and_in_the_originals_keys(inner):
    options = {"vision_layers": [1, 3, 5], "projector": inner}
    if inner == "c_abstractor":
        options["projector_options"] = {"num_queries": 4, "hidden_size": 16, "depth": 1, "position_grid": [4, 6]}
    source = build(options)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    own = source.projector.state_dict()
    originals = {f"model.mm_projector.{key}": t for key, t in source.projector.to_original_state_dict(own).items()}
    for weights in (own, originals, {f"model.mm_projector.{key}": t for key, t in source.state_dict().items()}):
        target = build(options)
        load_projector_state_dict(target, weights)
        assert all(torch.equal(t, source.state_dict()[key]) for key, t in target.state_dict().items())


def test_a_misspelt_projector_behind_is_not_blamed_on_the_widths():
    with pytest.raises(ProjectorError) as error:
        build({"projector": "mpl2x_gelu"})
    assert str(error.value).startswith("unknown projector")


def test_more_patches_to_pool_than_there_are_is_refused():
    projector = build({"kind": "sti", "pool_size": 25})
    for call in (projector.config.num_output_tokens, lambda grid: projector(read(hidden_states(), projector), grid)):
        with pytest.raises(ProjectorError, match="pool_size 25.*24 patches.*4x6"):
            call(GRID)


def test_configs_with_options_of_another_projector_can_be_keys():
    options = {"projector": "avg_pool", "projector_options": {"num_queries": 4}}
    assert len({build(options).config, build(options).config, build().config}) == 2
