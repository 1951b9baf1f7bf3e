"""Pixel shuffle against transformers' own connectors of InternVL, Idefics3 and SmolVLM, with their weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from projectors import PatchGrid, ProjectorError, load_projector_state_dict, select_projector
from projectors.conformance import check_projector

VISION, TEXT = 6, 10


def build(spelling, options=None, vision_hidden_size=VISION):
    selection = select_projector(spelling, options)
    sizes = {"vision_hidden_size": vision_hidden_size, "text_hidden_size": TEXT}
    return selection.build(selection.build_config(**sizes)).eval()


def randomise(module):
    """Every parameter: gains of one and biases of zero would hide errors."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module.eval()


def prefixed(prefix, module):
    return {prefix + key: tensor for key, tensor in module.state_dict().items()}


class InternVL:
    """transformers' projector and the shuffle in front of it."""

    def __init__(self, factor, channels):
        from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

        config = SimpleNamespace(
            vision_config=SimpleNamespace(hidden_size=channels),
            text_config=SimpleNamespace(hidden_size=TEXT),
            downsample_ratio=1 / factor,
            projector_hidden_act="gelu",
        )
        self.factor, self.pixel_shuffle = factor, InternVLModel.pixel_shuffle
        self.projector = randomise(InternVLMultiModalProjector(config))

    def __call__(self, tokens, grid):
        image = tokens.unflatten(1, (grid.height, grid.width))
        return self.projector(self.pixel_shuffle(None, image, 1 / self.factor).flatten(1, 2))


@pytest.mark.parametrize(
    "factor, grid, channels",
    [(2, PatchGrid(4, 6), 6), (2, PatchGrid(6, 4), 6), (2, PatchGrid(4, 4), 5), (4, PatchGrid(4, 12), 3)],
)
def test_output_is_internvls_on_rectangles(factor, grid, channels):
    original, tokens = InternVL(factor, channels), torch.randn(2, grid.num_patches, channels)
    projector = build("pixel_shuffle_internvl", {"factor": factor}, vision_hidden_size=channels)
    whole = prefixed("model.multi_modal_projector.", original.projector) | {"lm_head.weight": torch.zeros(3, TEXT)}
    load_projector_state_dict(projector, whole)
    # The same operations in the same order.
    torch.testing.assert_close(projector([tokens], grid), original(tokens, grid), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
@pytest.mark.parametrize("factor, side", [(2, 4), (2, 6), (3, 6), (4, 4)])
def test_output_is_that_of_idefics3_and_smolvlm(family, factor, side):
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

    config = SimpleNamespace(
        scale_factor=factor,
        vision_config=SimpleNamespace(hidden_size=VISION),
        text_config=SimpleNamespace(hidden_size=TEXT),
    )
    original = randomise({"idefics3": Idefics3Connector, "smolvlm": SmolVLMConnector}[family](config))
    projector, tokens = build("pixel_shuffle_idefics3", {"factor": factor}), torch.randn(2, side**2, VISION)
    whole = prefixed("model.connector.", original) | {"model.text_model.norm.weight": torch.zeros(TEXT)}
    load_projector_state_dict(projector, whole)
    torch.testing.assert_close(projector([tokens], PatchGrid(side, side)), original(tokens), rtol=0, atol=1e-6)


def test_a_patch_changes_the_token_of_its_own_window_alone():
    """Square on purpose: exchanged rows and columns would change another token, and no shape."""
    projector, tokens, other = randomise(build("pixel_shuffle")), torch.randn(1, 36, VISION), torch.randn(VISION)
    before = projector([tokens], PatchGrid(6, 6))
    tokens[0, 1 * 6 + 4] = other  # row 1, column 4: window row 0, column 2
    differs = (projector([tokens], PatchGrid(6, 6)) - before)[0].abs().amax(1) > 1e-4
    assert differs.nonzero().flatten().tolist() == [2]


def test_column_order_is_internvls_first_version():
    row, column = (randomise(build("pixel_shuffle", {"token_order": order})) for order in ("row", "column"))
    tokens, grid = torch.randn(2, 24, VISION), PatchGrid(4, 6)
    # 2x3 windows, listed column by column.
    expected = row([tokens], grid)[:, [0, 3, 1, 4, 2, 5]]
    torch.testing.assert_close(column([tokens], grid), expected, rtol=0, atol=1e-6)


def test_padding_repeats_the_last_row_and_column():
    projector, tokens = randomise(build("pixel_shuffle", {"pad_grid": True})), torch.randn(2, 15, VISION)
    rows, columns = [0, 1, 2, 2], [0, 1, 2, 3, 4, 4]
    padded = tokens[:, [row * 5 + column for row in rows for column in columns]]
    output = projector([tokens], PatchGrid(3, 5))
    assert torch.equal(output, projector([padded], PatchGrid(4, 6)))


def test_several_layers_are_concatenated_in_order():
    projector = randomise(build("pixel_shuffle", {"vision_layers": [1, 2]}))
    features = [torch.randn(2, 8, VISION) for _ in range(2)]
    single = build("pixel_shuffle", vision_hidden_size=2 * VISION)
    single.load_state_dict(projector.state_dict())
    joined = torch.cat(features, dim=2)
    assert torch.equal(projector(features, PatchGrid(2, 4)), single([joined], PatchGrid(2, 4)))


def test_grid_that_windows_do_not_tile_is_refused():
    with pytest.raises(ProjectorError, match="4x3 grid.*factor 2"):
        build("pixel_shuffle")([torch.zeros(1, 12, VISION)], PatchGrid(4, 3))


@pytest.mark.parametrize("prefix", ["model.mlp1.", "mlp1.", ""])
def test_internvls_own_keys_load_with_and_without_their_prefix(prefix):
    source, target = randomise(build("pixel_shuffle")), build("pixel_shuffle")
    places = {"norm": "0", "readout.0": "1", "readout.2": "3"}
    theirs = {}
    for key, tensor in source.state_dict().items():
        module, _, parameter = key.rpartition(".")
        theirs[f"{prefix}{places[module]}.{parameter}"] = tensor
    load_projector_state_dict(target, theirs | ({"language_model.x": torch.zeros(1)} if prefix else {}))
    for key, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], tensor), key


@pytest.mark.parametrize(
    "key, others",
    [
        ("MP.proj.weight", ["decoder.norm.weight", "vision_encoder.cls_token"]),
        ("MP.proj.weight", []),
        ("proj.weight", []),
    ],
)
def test_nanovlms_keys_load(key, others):
    projector, weight = build("pixel_shuffle_nanovlm"), torch.randn(TEXT, 16 * VISION)
    load_projector_state_dict(projector, {key: weight} | {other: torch.zeros(2) for other in others})
    assert torch.equal(projector.readout[0].weight, weight)


@pytest.mark.parametrize(
    "options, modules",
    [
        ({}, {"mlp1.0", "mlp1.1", "mlp1.3"}),
        ({"readout_depth": 3}, {"mlp1.0", "mlp1.1", "mlp1.3", "mlp1.5"}),
        ({"norm": False}, {"mlp1.1", "mlp1.3"}),
        ({"readout_depth": 1}, {"mlp1.0", "mlp1.1"}),
        ({"norm": False, "readout_depth": 1}, {"modality_projection.proj"}),
    ],
)
def test_export_has_the_keys_of_the_original_of_that_form(options, modules):
    projector = build("pixel_shuffle", options)
    exported = projector.to_original_state_dict(projector.state_dict())
    assert {key.rpartition(".")[0] for key in exported} == modules


def test_export_of_the_presets_fits_the_originals_in_transformers():
    original = InternVL(2, VISION).projector
    projector = randomise(build("pixel_shuffle_internvl"))
    exported = projector.to_original_state_dict(projector.state_dict())
    sequential = torch.nn.Sequential(original.layer_norm, original.linear_1, torch.nn.GELU(), original.linear_2)
    torch.nn.ModuleDict({"mlp1": sequential}).load_state_dict(exported)
    assert torch.equal(original.linear_2.weight, projector.readout[2].weight)


def test_presets_say_the_originals_forms():
    internvl, nanovlm = select_projector("pixel_shuffle_internvl"), select_projector("pixel_shuffle_nanovlm")
    sizes = {"vision_hidden_size": VISION, "text_hidden_size": TEXT}
    assert internvl.build_config(**sizes) == select_projector("pixel_shuffle").build_config(**sizes)
    config = nanovlm.build_config(**sizes)
    assert (config.factor, config.norm, config.readout_depth, config.readout_bias) == (4, False, 1, False)
    assert config.init == "normal"
    assert config.num_output_tokens(PatchGrid(24, 24)) == 36
    with pytest.raises(ProjectorError, match="pixel_shuffle_idefics3.*norm=False"):
        select_projector("pixel_shuffle_idefics3", {"norm": True})


def test_normal_init_is_nanovlms():
    torch.manual_seed(0)
    projector = build("pixel_shuffle", {"init": "normal"}, vision_hidden_size=256)
    # 10240 draws: the standard deviation is known to 0.7 %, so 5 % is seven of its errors; the default's is 0.018.
    assert abs(projector.readout[0].weight.std() / 0.02 - 1) < 0.05
    assert not projector.readout[0].bias.any()


@pytest.mark.parametrize(
    "options",
    [
        {"factor": 3},
        {"pad_grid": True},
        {"norm": False},
        {"readout_depth": 3, "readout_bias": False},
        {"token_order": "column", "vision_layers": [1, 2]},
        {"init": "normal"},
    ],
)
def test_options_keep_the_contract(options):
    check_projector("pixel_shuffle", options).raise_if_failed()


def test_tokens_in_column_order_form_no_map():
    """They are the transposed map; read row by row, crops would be put together scrambled."""
    for order, expected in (("row", PatchGrid(4, 2)), ("column", None)):
        config = build("pixel_shuffle", {"token_order": order}).config
        assert config.token_grid(PatchGrid(8, 4)) == expected
        assert config.num_output_tokens(PatchGrid(8, 4)) == 8
