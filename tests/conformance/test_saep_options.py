"""Each option of SAEP keeps the contract, alone and in the combinations that take different paths."""

from __future__ import annotations

import itertools

import pytest

from projectors import ProjectorError, select_projector
from projectors.conformance import CHECK_NAMES, check_projector

VALUE_CHECKS = (
    "config_survives_json",
    "output_has_the_promised_shape",
    "input_is_unchanged",
    "rows_are_independent",
    "gradient_reaches_every_parameter",
    "gradient_reaches_the_features",
    "gradient_checkpointing_changes_nothing",
    "bf16_is_close_to_fp32",
    "reset_parameters_covers_everything",
    "it_builds_on_the_meta_device",
    "state_dict_loads_under_any_prefix",
)

SINGLE_OPTIONS = [
    {"vision_layers": "-2"},
    {"vision_layers": "1|3|3|6"},
    {"mid_channels": 20},
    {"kernel_size": 1},
    {"kernel_size": 2},
    {"kernel_size": 5},
    {"kernel_size": 7},
    {"stride": 1},
    {"stride": 3},
    {"stride": 4, "kernel_size": 2},
    {"norm": "none"},
    {"input_norm": True},
    {"squeeze_excite": True},
    {"positions": "learned"},
    {"positions": "sincos"},
    {"readout_depth": 1},
    {"readout_depth": 3},
    {"init": "trunc_normal"},
    {"init": "zero_residual"},
    {"init": "zero_residual", "norm": "none", "order": "pw_dw_pw"},
]

STRUCTURES = [
    {"order": order, "aggregation": aggregation, "shortcut": shortcut}
    for order, aggregation, shortcut in itertools.product(
        ("pw_dw", "dw_pw", "pw_dw_pw", "pw"),
        ("concat", "sum", "softmax", "depthwise_concat"),
        ("none", "avgpool", "last_layer_avgpool"),
    )
    if (order, shortcut) != ("pw", "none")
]


def say(options):
    return ",".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize("options", SINGLE_OPTIONS + STRUCTURES, ids=say)
def test_option_keeps_the_contract(options):
    assert set(VALUE_CHECKS) <= set(CHECK_NAMES)
    check_projector("saep", options, checks=VALUE_CHECKS).raise_if_failed()


@pytest.mark.slow
@pytest.mark.parametrize("options", SINGLE_OPTIONS + STRUCTURES, ids=say)
def test_option_compiles_to_one_graph(options):
    check_projector("saep", options, checks=["torch_compile_takes_it"], compile=True).raise_if_failed()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"shortcut": "last_layer_avgpool", "mid_channels": 20}, ("last_layer_avgpool", "16", "20")),
        ({"init": "zero_residual", "shortcut": "none"}, ("zero_residual", "shortcut")),
        ({"order": "pw", "shortcut": "none"}, ("order", "shortcut")),
        ({"order": "pw", "squeeze_excite": True}, ("order", "squeeze_excite")),
        ({"keep_cls_token": True}, ("keep_cls_token",)),
        ({"vision_layers": []}, ("vision_layers",)),
    ],
)
def test_contradicting_options_are_refused(options, words):
    with pytest.raises(ProjectorError) as error:
        select_projector("saep", options).build_config(vision_hidden_size=16, text_hidden_size=24)
    assert all(word in str(error.value) for word in words)
