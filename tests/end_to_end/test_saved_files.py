"""What training leaves on disk, looked at as files: names of weights, who may read them, what the configs say."""

import json
import stat
from pathlib import Path

import pytest
from safetensors import safe_open

from llava_saep.model.loading import load_model, load_processor
from tests.fixtures.ranks import train_on_ranks
from tests.fixtures.tiny import write_bases, write_data
from tests.fixtures.training import deepspeed_json, training_flags

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


@pytest.fixture(scope="module", params=[None, 3], ids=["no_deepspeed", "zero3"])
def trained(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    bases, data = write_bases(folder / "bases"), write_data(folder / "data")
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "image_aspect_ratio": "pad"}
    flags = training_flags(bases, data, folder / "out", **options)
    if request.param is not None:
        flags += ["--deepspeed", deepspeed_json(request.param)]
    train_on_ranks(flags, world_size=1, output_dir=folder / "out")
    return folder / "out"


def test_weights_have_the_models_own_names_however_they_were_gathered(trained):
    with safe_open(trained / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(load_model(trained).state_dict())


def test_files_may_be_read_by_whoever_may_read_their_folder(trained):
    """safetensors writes files for their owner alone."""
    for folder in (trained, trained / "checkpoint-1"):
        expected = stat.S_IMODE(folder.stat().st_mode) & 0o444
        for path in folder.iterdir():
            if path.is_file():
                assert stat.S_IMODE(path.stat().st_mode) & 0o444 == expected, path


def test_config_says_how_images_were_prepared(trained):
    """LLaVA's programs read it there."""
    assert json.loads((trained / "config.json").read_text())["image_aspect_ratio"] == "pad"


def test_tokenizer_that_was_loaded_with_its_processor_is_saved_as_it_was(trained, tmp_path):
    load_processor(trained).save_pretrained(tmp_path)
    names = ("tokenizer_config.json", "tokenizer.json")
    assert [json.loads((tmp_path / n).read_text()) for n in names] == [
        json.loads((trained / n).read_text()) for n in names
    ]
