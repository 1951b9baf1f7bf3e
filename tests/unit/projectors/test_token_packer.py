"""TokenPacker against torch's own attention module, called window by window."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from projectors import PatchGrid, ProjectorError, load_projector_state_dict, select_projector
from projectors.conformance import check_projector

VISION, TEXT = 6, 10
TINY = {"hidden_size": 8, "num_heads": 2, "vision_layers": [3, 1, 2]}


def build(options=None, **sizes):
    selection = select_projector("token_packer", TINY | (options or {}))
    sizes = {"vision_hidden_size": VISION, "text_hidden_size": TEXT} | sizes
    return selection.build(selection.build_config(**sizes)).eval()


def randomise(module):
    """Every parameter: gains of one and biases of zero would hide errors."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module


def random_features(projector, grid, dtype=torch.float64):
    return [torch.randn(2, grid.num_patches, VISION, dtype=dtype) for _ in projector.config.vision_layers]


def modules_of_torch(weights, hidden_size, num_heads):
    """The original's modules where torch has them, with these weights under the original's keys."""
    attention = torch.nn.MultiheadAttention(hidden_size, num_heads, batch_first=True).double()
    prefix = "clip_attn."
    attention.load_state_dict({k.removeprefix(prefix): weights[k] for k in weights if k.startswith(prefix)})

    def mlp(name, tokens):
        inner = functional.linear(tokens, weights[f"{name}.0.weight"], weights[f"{name}.0.bias"])
        return functional.linear(functional.gelu(inner), weights[f"{name}.2.weight"], weights[f"{name}.2.bias"])

    def norm(name, tokens):
        return functional.layer_norm(tokens, [hidden_size], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    return attention, mlp, norm


def pool(query_map, factor, pooling):
    """(B, C, H, W) -> (B, C, H / factor, W / factor)."""
    if pooling == "area":
        return functional.avg_pool2d(query_map, factor)
    size = [side // factor for side in query_map.shape[2:]]
    return functional.interpolate(query_map, size=size, mode="bilinear", align_corners=False)


def written_out(projector, features, grid):
    weights, config = projector.state_dict(), projector.config
    attention, mlp, norm = modules_of_torch(weights, config.hidden_size, config.num_heads)
    query_map, *key_maps = (tokens.transpose(1, 2).unflatten(2, tuple(grid)) for tokens in features)
    pooled, key_map = pool(query_map, config.factor, config.query_pooling), torch.cat(key_maps, dim=1)
    tokens = []
    for row in range(grid.height // config.factor):
        for column in range(grid.width // config.factor):
            rows = slice(row * config.factor, (row + 1) * config.factor)
            columns = slice(column * config.factor, (column + 1) * config.factor)
            window = key_map[:, :, rows, columns].flatten(2).transpose(1, 2)
            query = norm("ln_q_1", functional.linear(pooled[:, None, :, row, column], weights["q_proj_1.weight"]))
            keys, values = norm("ln_k_1", mlp("k_proj_1", window)), norm("ln_v_1", mlp("v_proj_1", window))
            packed = attention(query, keys, values, need_weights=False)[0]
            tokens.append(mlp("mlp", packed + query if config.residual else packed))
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize(
    "grid, options",
    [
        (PatchGrid(4, 6), {}),
        (PatchGrid(6, 4), {"residual": True}),
        (PatchGrid(6, 3), {"factor": 3}),
        (PatchGrid(6, 9), {"factor": 3, "query_pooling": "bilinear"}),
        (PatchGrid(8, 4), {"factor": 4, "query_pooling": "bilinear", "num_heads": 4}),
        (PatchGrid(2, 3), {"factor": 1, "query_pooling": "bilinear"}),
        (PatchGrid(4, 4), {"vision_layers": [5, 5], "hidden_size": 6, "num_heads": 1}),
    ],
)
def test_output_is_that_of_torchs_attention_window_by_window(grid, options):
    projector = randomise(build(options)).double()
    features = random_features(projector, grid)
    # Double precision, so only the order of sums differs.
    torch.testing.assert_close(projector(features, grid), written_out(projector, features, grid), rtol=0, atol=1e-10)


@pytest.mark.parametrize("factor, is_equal", [(1, True), (2, True), (3, False), (4, False), (5, False)])
def test_query_poolings_agree_up_to_factor_2(factor, is_equal):
    """Beyond it the original's interpolation, tested against torch's here, sees only the middle of a window."""
    grid = PatchGrid(2 * factor, 3 * factor)
    area, bilinear = (randomise(build({"factor": factor, "query_pooling": how})) for how in ("area", "bilinear"))
    features = random_features(area, grid, torch.float32)
    query_map = features[0].transpose(1, 2).unflatten(2, tuple(grid))
    pooled = bilinear._pool(bilinear._windows(features[0], grid))
    expected = pool(query_map, factor, "bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-6)  # means of at most four values
    assert torch.equal(area(features, grid), bilinear(features, grid)) == is_equal


def test_corner_of_a_large_window_reaches_the_query_of_area_pooling_alone():
    grid, corner = PatchGrid(3, 3), torch.zeros(1, 9, VISION)
    corner[0, 0] = 9
    for pooling, is_seen in (("area", True), ("bilinear", False)):
        projector = randomise(build({"factor": 3, "query_pooling": pooling}))
        rest = random_features(projector, grid, torch.float32)[1:]
        plain, changed = (projector([tokens.expand(2, -1, -1), *rest], grid) for tokens in (corner * 0, corner))
        assert ((plain - changed).abs().max() > 1e-3) == is_seen


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_patch_changes_the_token_of_its_own_window_alone(layer):
    """Square on purpose: exchanged rows and columns would change another token, and no shape."""
    projector, grid = randomise(build()), PatchGrid(6, 6)
    features = random_features(projector, grid, torch.float32)
    before = projector(features, grid)
    features[layer][:, 1 * 6 + 4] += 1  # row 1, column 4: window row 0, column 2
    differs = (projector(features, grid) - before)[0].abs().amax(1) > 1e-4
    assert differs.nonzero().flatten().tolist() == [2]


def test_padding_repeats_the_last_row_and_column():
    projector = randomise(build({"pad_grid": True}))
    features = random_features(projector, PatchGrid(3, 5), torch.float32)
    rows, columns = [0, 1, 2, 2], [0, 1, 2, 3, 4, 4]
    padded = [tokens[:, [row * 5 + column for row in rows for column in columns]] for tokens in features]
    # The same sums over other memory.
    expected = projector(padded, PatchGrid(4, 6))
    torch.testing.assert_close(projector(features, PatchGrid(3, 5)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "num_vision_layers, layers",
    [(None, (23, 12, 16, 22, 23)), (24, (23, 12, 16, 22, 23)), (12, (11, 6, 8, 11, 12)), (27, (26, 14, 18, 25, 26))],
)
def test_default_layers_are_the_originals_or_at_the_same_depths(num_vision_layers, layers):
    config = select_projector("token_packer").build_config(
        vision_hidden_size=VISION, text_hidden_size=TEXT, num_vision_layers=num_vision_layers
    )
    assert config.vision_layers == layers


def test_contradicting_options_are_refused():
    with pytest.raises(ProjectorError, match=r"vision_layers: got 1 layer \(3,\), expected at least 2"):
        build({"vision_layers": [3]})
    with pytest.raises(ProjectorError, match="hidden_size 10.*num_heads 4"):
        build({"hidden_size": 10, "num_heads": 4})


def test_grid_that_windows_do_not_tile_is_refused():
    projector = build()
    with pytest.raises(ProjectorError, match="4x3 grid.*factor 2"):
        projector(random_features(projector, PatchGrid(4, 3), torch.float32), PatchGrid(4, 3))


def test_initialisation_is_the_originals():
    """Linear layers truncated normal; what goes into the attention as torch.nn.MultiheadAttention starts."""
    torch.manual_seed(0)
    projector = build({"hidden_size": 64}, vision_hidden_size=64)
    attention = torch.nn.MultiheadAttention(64, 2)
    # Truncation at two standard deviations leaves 0.88 of them. At least 640 draws: known to 3 %, so 15 % is five.
    for linear in (projector.q_proj_1, projector.k_proj_1[0], projector.clip_attn.out_proj, projector.mlp[0]):
        assert abs(linear.weight.std() / (0.88 * 0.02) - 1) < 0.15
        assert linear.weight.abs().max() <= 0.04
        assert linear.bias is None or not linear.bias.any()
    # The largest of 12288 uniform draws is within 1 % of the bound.
    bounds = [module.in_proj_weight.abs().max() for module in (projector.clip_attn, attention)]
    assert abs(bounds[0] / bounds[1] - 1) < 0.01
    assert not projector.clip_attn.in_proj_bias.any()


def test_original_checkpoint_loads_from_a_whole_model():
    source, target = randomise(build()), build()
    whole = {f"model.mm_projector.{key}": tensor for key, tensor in source.state_dict().items()}
    assert "model.mm_projector.clip_attn.in_proj_weight" in whole
    load_projector_state_dict(target, whole | {"model.layers.0.mlp.up_proj.weight": torch.zeros(2)})
    for key, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], tensor), key


def test_bfloat16_attention_is_as_exact_as_torchs():
    """Products or scores that round to bfloat16 are three times as far off with scores of this size."""
    torch.manual_seed(0)
    attention = build({"hidden_size": 64, "num_heads": 1}).clip_attn
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.eye(64).repeat(3, 1))
        attention.out_proj.weight.copy_(torch.eye(64))
    queries, keys, values = (torch.randn(1, 500, *size) for size in ((64,), (4, 64), (4, 64)))
    queries, keys, values = (tensor.bfloat16() for tensor in (8 * queries, keys, values))
    exact = attention.double()(queries.double(), keys.double(), values.double())
    output = attention.bfloat16()(queries, keys, values)
    torchs = functional.scaled_dot_product_attention(queries.unsqueeze(2), keys, values).squeeze(2)
    errors = [(result - exact).pow(2).mean().sqrt() for result in (output, torchs)]
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize(
    "options",
    [
        {"factor": 3, "query_pooling": "bilinear"},
        {"pad_grid": True, "residual": True},
        {"vision_layers": [3, 3], "num_heads": 1},
        {"factor": 1, "residual": True},
    ],
)
def test_options_keep_the_contract(options):
    check_projector("token_packer", options).raise_if_failed()
