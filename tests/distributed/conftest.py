import pytest

from tests.fixtures.tiny import TinyBases, TinyData, write_bases, write_data


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> TinyBases:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> TinyData:
    """Every second record is text only: with one sample per rank, rank 0 always has an image and rank 1 never."""
    return write_data(tmp_path_factory.mktemp("data"), num_records=8, text_only_every=2)
