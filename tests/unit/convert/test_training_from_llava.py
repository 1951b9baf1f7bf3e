"""A run that starts from an original LLaVA folder, as finetune_task.sh does, and from llava-hf's."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_saep.arguments import parse_arguments
from llava_saep.convert.checkpoint import Source
from llava_saep.convert.run import convert
from llava_saep.errors import UserError
from llava_saep.model.loading import load_model, load_processor
from llava_saep.train import train_mem
from llava_saep.train.planning import plan_model
from tests.fixtures.ranks import train_on_ranks
from tests.fixtures.tiny import write_data
from tests.fixtures.training import logged

CHECKPOINTS = Path(__file__).parents[2] / "golden" / "llava" / "checkpoints"


@pytest.fixture(params=["llava", pytest.param("hf", marks=pytest.mark.slow)])
def start(request, tmp_path):
    folder = CHECKPOINTS / "llava_tiny_v15"
    if request.param == "hf":
        convert(Source(folder=folder), "hf", tmp_path / "start")
        return tmp_path / "start"
    return folder


def flags(start, data, output_dir, **more):
    values = {
        "model_name_or_path": start,
        "version": "v1",
        "data_path": data.data_path,
        "image_folder": data.image_folder,
        "image_aspect_ratio": "pad",
        "mm_vision_select_layer": -2,
        "output_dir": output_dir,
        "model_max_length": 512,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        **more,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_plan_keeps_the_folders_projector_and_tower(start, tmp_path):
    data = write_data(tmp_path / "data", num_records=2)
    tower = {"vision_tower": CHECKPOINTS / "clip_tiny"} if start.name == "llava_tiny_v15" else {}
    arguments = parse_arguments(flags(start, data, tmp_path / "out", mm_projector_type="mlp2x_gelu", **tower))
    processor, config = plan_model(arguments)
    assert config.projector_config == load_model(start).config.projector_config
    assert processor.image_aspect_ratio == "pad" and config.vision_config.hidden_size == 24


def test_training_goes_on_from_its_weights_and_writes_a_model_that_converts_back(start, tmp_path):
    data = write_data(tmp_path / "data", num_records=4)
    train_mem.main(flags(start, data, tmp_path / "out", num_train_epochs=1))
    losses = logged(tmp_path / "out", "loss")
    assert len(losses) == 2 and all(torch.isfinite(torch.tensor(losses)))
    convert(Source(folder=tmp_path / "out"), "llava", tmp_path / "back")
    stored = load_file(CHECKPOINTS / "llava_tiny_v15" / "model.safetensors")
    trained = load_file(tmp_path / "back" / "model.safetensors")
    assert trained.keys() == stored.keys()
    name = "model.mm_projector.0.weight"
    moved = (trained[name].float() - stored[name].float()).abs()
    assert 0 < moved.max() < 1e-2  # two steps of 1e-3 away from where it was, not a fresh start
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "llava_llama"
    # The original LLaVA reads its tokenizer from this file, which transformers 5 does not write.
    sentencepiece = (CHECKPOINTS / "llava_tiny_v15" / "tokenizer.model").read_bytes()
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == sentencepiece
    load_processor(tmp_path / "out").save_pretrained(tmp_path / "out")  # onto itself
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == sentencepiece


def test_tower_that_cannot_be_had_by_its_name_is_taken_from_the_flag(tmp_path):
    """Released checkpoints name a hub model, which a machine without network has in a folder of its own."""
    folder = tmp_path / "llava"
    folder.mkdir()
    for file in (CHECKPOINTS / "llava_tiny_v15").iterdir():
        (folder / file.name).symlink_to(file)
    fields = json.loads((folder / "config.json").read_text()) | {"mm_vision_tower": "nobody/gone"}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(fields))
    data = write_data(tmp_path / "data", num_records=4)
    with pytest.raises(UserError, match="'nobody/gone' .*cannot be read.* with --vision_tower"):
        plan_model(parse_arguments(flags(folder, data, tmp_path / "out")))
    argv = flags(folder, data, tmp_path / "out", vision_tower=CHECKPOINTS / "clip_tiny", max_steps=1, learning_rate=0)
    train_on_ranks(argv, world_size=1, output_dir=tmp_path / "out")
    log = (tmp_path / "out" / "ranks" / "rank_0.txt").read_text()
    assert f"'nobody/gone' that its config names cannot be read here; {CHECKPOINTS / 'clip_tiny'} takes" in log
    trained, expected = load_model(tmp_path / "out"), load_model(CHECKPOINTS / "llava_tiny_v15")
    assert trained.config.vision_tower_name_or_path == str(CHECKPOINTS / "clip_tiny")
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), expected.parameters(), strict=True))
