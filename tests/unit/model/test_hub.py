"""Models that are named as on the hub, found in a cache as huggingface_hub lays it out; the network is not used."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from llava_saep.convert.checkpoint import Source, load_checkpoint, stored_dtype
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


@pytest.fixture
def adapter(tmp_path):
    """An adapter in LLaVA's format, whose base is a LLaVA of the hub: what finetune_task_lora.sh writes."""
    folder = shutil.copytree(CHECKPOINTS / "llava_tiny_lora", tmp_path / "adapter")
    shutil.copytree(CHECKPOINTS / "clip_tiny", tmp_path / "clip_tiny")
    fields = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": NAME}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def test_adapter_of_llava_finds_its_llava_on_the_hub(cache, adapter):
    found = load_checkpoint(Source(folder=adapter)).model
    expected = load_checkpoint(Source(folder=adapter, model_base=str(CHECKPOINTS / "llava_tiny_v15"))).model
    assert found.dtype == expected.dtype == stored_dtype(NAME) == torch.float16
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    stored = expected.state_dict()
    assert all(tensor.equal(stored[name]) for name, tensor in found.state_dict().items())


def test_base_that_is_not_to_be_had_is_named(cache, adapter, tmp_path):
    with hub_cache(str(tmp_path / "empty")), pytest.raises(UserError, match=f"'{NAME}' that .* with --model_base"):
        load_model(adapter)
    with pytest.raises(UserError, match="'./gone' is named as the base is no folder here.*; expected a folder"):
        load_model(adapter, model_base="./gone")


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
