"""Models that are named as on the hub, found in a cache as huggingface_hub lays it out; the network is not used."""

import shutil
from pathlib import Path

import pytest

from llava_saep.errors import UserError
from llava_saep.generation import Predictor
from llava_saep.model.formats import read_base_config
from llava_saep.model.hub import hub_cache, is_hub_name, local_folder
from llava_saep.model.loading import load_model

CHECKPOINTS = Path(__file__).parents[2] / "golden" / "llava" / "checkpoints"
NAME = "liuhaotian/llava-tiny"
REVISION = "0" * 40


@pytest.fixture
def cache(tmp_path):
    """A cache with the original's tiny model, under a name that is no folder here."""
    repository = tmp_path / "cache" / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    shutil.copytree(CHECKPOINTS / "llava_tiny_v15", repository / "snapshots" / REVISION)
    # The tower is named by a relative path, which is looked for around the model's folder.
    shutil.copytree(CHECKPOINTS / "clip_tiny", repository / "snapshots" / "clip_tiny")
    with hub_cache(str(tmp_path / "cache")):
        yield tmp_path / "cache"


def test_model_of_the_hub_loads_by_its_name(cache):
    named, stored = load_model(NAME).state_dict(), load_model(CHECKPOINTS / "llava_tiny_v15").state_dict()
    assert all(named[name].equal(tensor) for name, tensor in stored.items())
    assert Predictor.from_pretrained(NAME, device="cpu").template.name == "v1"


def test_training_can_start_from_a_llava_of_the_hub(cache):
    """scripts/v1_5/finetune_task.sh names liuhaotian/llava-v1.5-13b."""
    assert read_base_config(NAME, "--model_name_or_path").projector["name"] == "mlp"


def test_only_inside_the_block_is_the_cache_another(cache, tmp_path):
    with hub_cache(str(tmp_path / "empty")), pytest.raises(UserError, match="cannot be had from the hub"):
        local_folder(NAME)
    assert local_folder(NAME).is_dir()
    with hub_cache(None):
        assert local_folder(NAME).is_dir()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("org/model", True), ("/org/model", False), ("model", False), ("a/b/c", False), ("./a", False)],
)
def test_what_can_only_be_a_name_of_the_hub_is_taken_for_one(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(name) == expected
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert not is_hub_name("org/model")
