"""A tiny random model, in a folder and in front of an engine."""

import pytest

from llava_saep.generation import LocalEngine
from tests.fixtures.model import write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def local_engine(model_folder):
    engine = LocalEngine.from_pretrained(model_folder, device="cpu")
    yield engine
    engine.close()
