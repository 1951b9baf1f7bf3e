"""A tiny model that answers, and images for it."""

import pytest

from tests.fixtures.predictors import tiny_predictor
from tests.fixtures.tiny import write_image


@pytest.fixture(scope="module", params=["saep", "mlp2x_gelu"])
def predictor(request, tmp_path_factory):
    return tiny_predictor(tmp_path_factory.mktemp("bases"), request.param)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return [write_image(folder / f"{seed}.png", height=24, width=24 + 8 * seed, seed=seed) for seed in range(3)]
