"""Options mean the same from the command line, JSON and Python, and errors say what was given and what is allowed."""

from __future__ import annotations

import pytest
import torch

from projectors import (
    PatchGrid,
    ProjectorError,
    describe_options,
    parse_projector_options,
    projector_spec,
    select_projector,
)


@pytest.mark.parametrize(
    "text, options",
    [
        ("", {}),
        ("stride=3", {"stride": "3"}),
        (" stride = 3 , order = dw_pw ", {"stride": "3", "order": "dw_pw"}),
        ("vision_layers=7|15|23,stride=3", {"vision_layers": "7|15|23", "stride": "3"}),
        ("vision_layers=[7, 15, 23],stride=3", {"vision_layers": "[7, 15, 23]", "stride": "3"}),
        ('{"stride": 3, "vision_layers": [7, 15]}', {"stride": 3, "vision_layers": [7, 15]}),
    ],
)
def test_option_text_is_json_or_key_value(text, options):
    assert parse_projector_options(text) == options


@pytest.mark.parametrize(
    "text, word",
    [
        ("stride", "key=value"),
        ("stride=2,stride=3", "twice"),
        ('{"stride": 2, "stride": 3}', "twice"),
        ('{"stride": 2', "JSON"),
    ],
)
def test_unreadable_option_text_is_refused(text, word):
    with pytest.raises(ProjectorError, match=word):
        parse_projector_options(text)


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("saep", "stride=3", {"stride": 3}),
        ("saep", "squeeze_excite=true", {"squeeze_excite": True}),
        ("saep", "squeeze_excite=0", {"squeeze_excite": False}),
        ("saep", "mid_channels=none", {"mid_channels": None}),
        ("saep", "mid_channels=512", {"mid_channels": 512}),
        ("saep", "vision_layers=7|15|23", {"vision_layers": [7, 15, 23]}),
        ("saep", "vision_layers=[7,15,23]", {"vision_layers": [7, 15, 23]}),
        ("saep", "vision_layers=-2", {"vision_layers": [-2]}),
        ("saep", "vision_layers=sci", {"vision_layers": [7, 15, 23]}),
        ("saep", '{"position_grid": [3, 4]}', {"position_grid": [3, 4]}),
        ("qformer", "dropout=0", {"dropout": 0.0}),
        ("qformer", '{"dropout": 0}', {"dropout": 0.0}),
    ],
)
def test_text_is_converted_by_the_options_type(name, text, expected):
    options = select_projector(name, parse_projector_options(text)).options
    assert options == expected
    assert [type(value) for value in options.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("saep", {"stride": 5}, ("stride", "5", "1, 2, 3, 4")),
        ("saep", {"stride": True}, ("stride", "True", "1, 2, 3, 4")),
        ("saep", {"stride": "two"}, ("stride", "'two'")),
        ("saep", {"order": "dw"}, ("order", "'dw'", "pw_dw, dw_pw")),
        ("saep", {"readout_depth": 0}, ("readout_depth", "0", "at least 1")),
        ("saep", {"readout_depth": 1.5}, ("readout_depth", "1.5", "int")),
        ("saep", {"squeeze_excite": "maybe"}, ("squeeze_excite", "'maybe'", "true or false")),
        ("saep", {"squeeze_excite": 1}, ("squeeze_excite", "1", "true or false")),
        ("saep", {"vision_layers": "7|x"}, ("vision_layers", "7|x", "list of int")),
        ("saep", {"position_grid": [1, 2, 3]}, ("position_grid", "2 values")),
        ("qformer", {"dropout": 1.5}, ("dropout", "1.5", "at most 1")),
        ("qformer", {"dropout": "x"}, ("dropout", "'x'", "float")),
        ("qformer", {"dropout": "nan"}, ("dropout", "nan", "finite")),
        ("qformer", {"dropout": float("nan")}, ("dropout", "nan", "finite")),
        ("qformer", {"layer_norm_eps": "inf"}, ("layer_norm_eps", "inf", "finite")),
        ("qformer", {"layer_norm_eps": float("-inf")}, ("layer_norm_eps", "-inf", "finite")),
        ("qformer", {"num_queries": 10**23}, ("num_queries", f"{10**23}", "at most 1000000")),
        ("saep", {"position_grid": [24, 10**6 + 1]}, ("position_grid", "1000001", "at most 1000000")),
        ("mlp", {"depth": 1001}, ("depth", "1001", "at most 1000")),
        ("mlp1001x_gelu", {}, ("mlp", "depth", "1001", "at most 1000")),
        ("mlp99999999x_gelu", {}, ("mlp", "depth", "99999999", "at most 1000")),
        ("mlp2x_res1001x_gelu", {}, ("mlp", "num_residual_blocks", "1001", "at most 1000")),
        ("saep", {"strid": 2}, ("strid", "Did you mean 'stride'?", "Options:", "kernel_size")),
        ("saep", {"vision_hidden_size": 8}, ("vision_hidden_size", "Options:")),
    ],
)
def test_wrong_options_are_refused_with_what_is_allowed(name, options, words):
    with pytest.raises(ProjectorError) as error:
        select_projector(name, options)
    registered_name = name if "_gelu" not in name else "mlp"
    assert all(word in str(error.value) for word in (registered_name, *words)), str(error.value)


def test_configs_built_directly_are_checked_too_but_read_no_text():
    config_class = projector_spec("saep").config_class
    with pytest.raises(ProjectorError, match="stride.*5"):
        config_class(vision_hidden_size=8, text_hidden_size=8, stride=5)
    with pytest.raises(ProjectorError, match="stride.*'2'"):
        config_class(vision_hidden_size=8, text_hidden_size=8, stride="2")
    with pytest.raises(ProjectorError, match="vision_hidden_size.*0.*at least 1"):
        config_class(vision_hidden_size=0, text_hidden_size=8)
    assert config_class(vision_hidden_size=8, text_hidden_size=8, vision_layers=[1, 2]).vision_layers == (1, 2)


def test_config_from_dict_names_unknown_and_missing_fields():
    config_class = projector_spec("mlp").config_class
    with pytest.raises(ProjectorError, match="'dept'.*Did you mean 'depth'"):
        config_class.from_dict({"vision_hidden_size": 8, "text_hidden_size": 8, "dept": 2})
    with pytest.raises(ProjectorError, match="'text_hidden_size' is missing"):
        config_class.from_dict({"vision_hidden_size": 8})


def test_option_descriptions_name_type_and_default():
    described = {info.name: info for info in describe_options(projector_spec("saep").config_class)}
    assert described["stride"].type == "one of 1, 2, 3, 4"
    assert described["stride"].default == 2
    assert described["mid_channels"].type == "int or none"
    assert described["vision_layers"].type == "list of int (as 1|2|3 or 1-3)"
    assert "vision_hidden_size" not in described


@pytest.mark.parametrize(
    ("text", "layers"), [("0-3", [0, 1, 2, 3]), ("0-2|7|7", [0, 1, 2, 7, 7]), ("-2", [-2]), ("4-4", [4])]
)
def test_layers_are_also_written_as_ranges(text, layers):
    assert select_projector("saep", {"vision_layers": text}).options["vision_layers"] == layers


@pytest.mark.parametrize("text", ["12 16", "5-2", "0-10000000000", "1-2-3"])
def test_a_list_that_cannot_be_read_is_refused_with_how_to_write_one(text):
    with pytest.raises(ProjectorError) as error:
        select_projector("dense_connector", {"vision_layers": text})
    assert "as 1|2|3 or 1-3" in str(error.value)


def test_a_misspelt_name_of_layers_is_refused_with_the_names():
    with pytest.raises(ProjectorError, match=r"'lfs'.*1\|2\|3.*token_packer, sci, lsf.*Did you mean 'lsf'"):
        select_projector("saep", {"vision_layers": "lfs"})


def test_layers_are_read_in_the_order_given_and_the_last_named_is_the_shortcuts():
    """The help texts promise this order, not an order by depth; a layer may stand there twice."""
    described = {info.name: info.help for info in describe_options(projector_spec("saep").config_class)}
    assert "in this order" in described["vision_layers"] and "last layer named" in described["shortcut"]
    options = {"vision_layers": [5, 1, 1], "shortcut": "last_layer_avgpool", "init": "zero_residual"}
    selection = select_projector("saep", options)
    config = selection.build_config(vision_hidden_size=8, text_hidden_size=8, num_vision_layers=6)
    assert config.vision_layers == (5, 1, 1)
    projector = selection.build(config)
    features = [torch.randn(1, 4, 8, requires_grad=True) for _ in range(3)]
    projector(features, PatchGrid(2, 2)).square().sum().backward()
    # The residual branch starts at zero, so that the shortcut alone passes anything on.
    assert [bool(tokens.grad.any()) for tokens in features] == [False, False, True]
