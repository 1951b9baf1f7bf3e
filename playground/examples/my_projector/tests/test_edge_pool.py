"""The contract, check by check, and the arithmetic that makes this projector what it is."""

import itertools

import pytest
import torch
from my_projector import EdgePool

from projectors import PatchGrid, ProjectorError, load_projector_state_dict, select_projector
from projectors.conformance import CHECK_NAMES, run_check

GRID = PatchGrid(3, 5)  # windows of 2 x 2 do not tile it


def build(**options):
    selection = select_projector("edge_pool", options)
    config = selection.build_config(vision_hidden_size=6, text_hidden_size=8, num_vision_layers=4)
    return selection.build(config).eval()


def random_features(grid=GRID, batch_size=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch_size, grid.num_patches, 6, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("check", CHECK_NAMES)
@pytest.mark.parametrize("name", ["edge_pool", "edge_pool_average", "edge_pool_coarse"])
def test_the_contract_is_kept(name, check):
    result = run_check(name, check)
    assert result.status != "failed", result.detail
    if result.status == "skipped":
        pytest.skip(result.detail)


def test_the_installed_package_offers_it_under_its_name():
    selection = select_projector("edge_pool")
    assert selection.provider == "entry-point"
    assert selection.spec.module_class is EdgePool


def test_tokens_are_the_means_that_a_loop_over_windows_gives():
    projector, features = build(), random_features()
    with torch.no_grad():
        projector.sharpness.fill_(2.0)
    shallow, deep = (tokens[0].unflatten(0, (GRID.height, GRID.width)) for tokens in features)
    contrast = torch.zeros(GRID.height, GRID.width)
    for row in range(GRID.height):
        for column in range(GRID.width):
            around = shallow[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].flatten(0, 1).mean(0)
            contrast[row, column] = (shallow[row, column] - around).square().mean()
    contrast = contrast / contrast.mean()
    height, width = GRID
    tokens = []
    for top, left in itertools.product(range(0, height, 2), range(0, width, 2)):
        # The last row and column stand in for what lies outside.
        rows = [min(top + step, height - 1) for step in (0, 1)]
        columns = [min(left + step, width - 1) for step in (0, 1)]
        values, weights = [], []
        for row, column in itertools.product(rows, columns):
            place = torch.tensor([(2 * row + 1) / height - 1, (2 * column + 1) / width - 1])
            values.append(torch.cat([shallow[row, column], deep[row, column], place]))
            weights.append((2.0 * contrast[row, column]).exp())
        weights = torch.stack(weights)
        tokens.append((weights[:, None] * torch.stack(values)).sum(0) / weights.sum())
    expected = projector.readout(torch.stack(tokens))
    # Sums of a few float32 numbers of unit size, in another order.
    torch.testing.assert_close(projector(features, GRID)[0], expected, rtol=0, atol=1e-5)


def test_on_a_flat_image_all_patches_count_alike():
    shallow, deep = random_features()
    flat = torch.ones_like(shallow)
    edges, average = build(), build(pooling="average")
    average.readout.load_state_dict(edges.readout.state_dict())
    torch.testing.assert_close(edges([flat, deep], GRID), average([flat, deep], GRID), rtol=0, atol=1e-6)


def test_no_parameter_is_a_scalar_since_deepspeed_cannot_broadcast_one():
    assert all(parameter.dim() > 0 for parameter in build().parameters())


@pytest.mark.parametrize("key", ["edge_gain", "sharpness"])
def test_sharpness_stored_as_a_scalar_loads(key):
    source, target = build(), build()
    with torch.no_grad():
        source.sharpness.fill_(1.5)
    stored = {"edge_gain" if name == "sharpness" else name: tensor for name, tensor in source.state_dict().items()}
    stored[key] = stored.pop("edge_gain").reshape(())
    load_projector_state_dict(target, stored)
    assert target.sharpness.tolist() == [1.5]


def test_weights_of_the_earlier_program_load():
    source, target = build(), build()
    original = {
        "model.mm_projector.edge_gain": source.sharpness,
        "model.mm_projector.fc1.weight": source.readout[0].weight,
        "model.mm_projector.fc1.bias": source.readout[0].bias,
        "model.mm_projector.fc2.weight": source.readout[2].weight,
        "model.mm_projector.fc2.bias": source.readout[2].bias,
    }
    load_projector_state_dict(target, {key: tensor.detach() for key, tensor in original.items()})
    assert torch.equal(target(random_features(), GRID), source(random_features(), GRID))


@pytest.mark.parametrize("layers", [[-2], [1, 2, 3]])
def test_other_than_two_layers_are_refused_with_their_number(layers):
    with pytest.raises(ProjectorError, match=f"got {len(layers)} .*expected 2"):
        build(vision_layers=layers)
