"""Training on images that are cut into crops: stage 1, stage 2 from its projector and newline, adapters, resuming."""

import pytest
import torch
from safetensors.torch import load_file

from llava_saep.generation import GenerationOptions, Predictor
from llava_saep.model.loading import load_model, load_processor
from llava_saep.train import train_mem
from tests.fixtures.tiny import write_bases, write_data, write_image
from tests.fixtures.training import logged, training_flags

pytestmark = pytest.mark.timeout(200)

CUTTING = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "model_max_length": 1024}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


def write_uneven_data(folder, kind):
    data = write_data(folder, num_records=6, kind=kind)
    for index, path in enumerate(sorted(data.image_folder.iterdir())):
        write_image(path, height=(24, 36, 72)[index % 3], width=(40, 36, 20)[index % 3])
    return data


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return write_uneven_data(tmp_path_factory.mktemp("captions"), "captions")


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    return write_uneven_data(tmp_path_factory.mktemp("conversations"), "conversations")


@pytest.fixture(scope="module")
def stage_one(bases, captions, tmp_path_factory):
    """A trained projector that halves each crop's map, and its newline."""
    folder = tmp_path_factory.mktemp("stage_one")
    flags = training_flags(bases, captions, folder, version="plain", tune_mm_mlp_adapter=True, **CUTTING)
    assert train_mem.main(flags) == 0
    return folder


def newline_of(folder):
    return load_model(folder).model.image_newline


def test_stage_one_trains_and_saves_the_newline(bases, captions, stage_one, tmp_path):
    weights = load_file(stage_one / "mm_projector.safetensors")
    assert "model.image_newline" in weights
    flags = training_flags(bases, captions, tmp_path, version="plain", tune_mm_mlp_adapter=True, **CUTTING)
    assert train_mem.main([*flags, "--learning_rate", "1e-12"]) == 0
    start = load_file(tmp_path / "mm_projector.safetensors")["model.image_newline"]
    # Four steps of Adam at 1e-2, and none to speak of at 1e-12, from the same seed.
    assert 1e-3 < (weights["model.image_newline"] - start).abs().max() < 0.1


@pytest.mark.parametrize(
    "kind",
    [
        {"per_device_train_batch_size": 2, "group_by_modality_length": True},
        pytest.param({"lora_enable": True, "lora_r": 4, "gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"unfreeze_mm_vision_tower": True, "gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=["full", "lora", "tower"],
)
def test_stage_two_goes_on_from_stage_one_and_answers(bases, conversations, stage_one, kind, tmp_path):
    order = {"train_sampling_strategy": "random"} if "group_by_modality_length" in kind else {}
    flags = training_flags(
        bases,
        conversations,
        tmp_path,
        pretrain_mm_mlp_adapter=stage_one / "mm_projector.bin",
        **CUTTING,
        **kind,
        **order,
    )
    assert train_mem.main(flags) == 0
    losses = logged(tmp_path, "loss")
    assert len(losses) == 4 and all(loss == loss for loss in losses)
    # It started from stage 1's and has moved by four steps at most.
    assert 0 < (newline_of(tmp_path) - newline_of(stage_one)).abs().max() < 0.1
    predictor = Predictor.from_pretrained(tmp_path)
    image = str(sorted(conversations.image_folder.iterdir())[0])
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "Which colour?"}]
    (answer,) = predictor.generate([[{"role": "user", "content": parts}]], GenerationOptions(max_new_tokens=3))
    assert isinstance(answer, str)
    assert predictor.processor.image_aspect_ratio == "anyres"


def test_saved_model_goes_on_cutting_as_it_did(bases, conversations, tmp_path):
    """Without a word about merging or sizes, which the first run's flags gave."""
    own = {"image_grid_pinpoints": "[(48, 24), (24, 48)]", "apply_exif_orientation": True, **CUTTING}
    assert train_mem.main(training_flags(bases, conversations, tmp_path / "first", max_steps=1, **own)) == 0
    words = training_flags(bases, conversations, tmp_path / "second", max_steps=1, image_aspect_ratio="anyres")
    flags = dict(zip(words[::2], words[1::2], strict=True)) | {"--model_name_or_path": str(tmp_path / "first")}
    del flags["--vision_tower"], flags["--mm_projector_type"]
    assert train_mem.main([word for pair in flags.items() for word in pair] + ["--model_max_length", "1024"]) == 0
    assert load_processor(tmp_path / "first").apply_exif_orientation
    config = load_model(tmp_path / "second").config
    assert config.mm_patch_merge_type == "spatial_unpad"
    assert config.image_grid_pinpoints == [[48, 24], [24, 48]]


@pytest.mark.slow
def test_resumed_run_ends_where_an_unbroken_one_does(bases, captions, tmp_path):
    stage = {"version": "plain", "tune_mm_mlp_adapter": True, "save_strategy": "steps", "save_steps": 2, **CUTTING}
    for name, steps in (("whole", 4), ("broken", 2), ("broken", 4)):
        flags = training_flags(bases, captions, tmp_path / name, lr_scheduler_type="constant", **stage, max_steps=steps)
        assert train_mem.main(flags) == 0
    whole, resumed = newline_of(tmp_path / "whole"), newline_of(tmp_path / "broken")
    torch.testing.assert_close(resumed, whole, atol=1e-6, rtol=0)
