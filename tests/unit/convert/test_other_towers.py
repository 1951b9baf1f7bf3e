"""Towers that the original LLaVA does not build, and several side by side, through its format and llava-hf's."""

import json

import pytest
import torch
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlavaForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_saep.convert.checkpoint import Checkpoint, Source
from llava_saep.convert.run import convert
from llava_saep.convert.to_hf import write_hf
from llava_saep.convert.to_llava import write_llava
from llava_saep.errors import UserError
from llava_saep.model.loading import build_model, build_processor, build_tokenizer, load_model
from projectors import select_projector
from tests.fixtures.tiny import write_image, write_language_model

SIZES = {"num_attention_heads": 2, "patch_size": 4, "image_size": 24, "hidden_size": 24, "num_hidden_layers": 3}
CROP = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    parts = {
        "clip": (CLIPVisionModel(CLIPVisionConfig(intermediate_size=48, **SIZES)), CLIPImageProcessorPil(**CROP)),
        "dino": (
            Dinov2WithRegistersModel(Dinov2WithRegistersConfig(mlp_ratio=2, **SIZES)),
            BitImageProcessorPil(**CROP),
        ),
        "siglip": (
            SiglipVisionModel(SiglipVisionConfig(intermediate_size=48, **SIZES)),
            SiglipImageProcessorPil(size={"height": 24, "width": 24}),
        ),
    }
    for name, (model, processor) in parts.items():
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    write_language_model(folder / "language_model")
    return folder


def build(bases, *towers):
    tokenizer = build_tokenizer(str(bases / "language_model"))
    parts = {
        "language_model": str(bases / "language_model"),
        "vision_tower": ",".join(str(bases / name) for name in towers),
    }
    model = build_model(
        **parts, projector=select_projector("mlp2x_gelu"), image_token_id=tokenizer.convert_tokens_to_ids("<image>")
    ).eval()
    return Checkpoint(model, build_processor(**parts, model_config=model.config))


def as_llava(checkpoint, folder):
    folder.mkdir()
    write_llava(checkpoint, folder, final_folder=folder)
    return folder


@pytest.mark.parametrize("towers", [["siglip"], ["dino"], ["clip", "dino"]], ids="-".join)
@pytest.mark.parametrize("was_trained", [False, True], ids=["frozen", "trained"])
def test_tower_comes_back_from_llavas_format(tmp_path, bases, towers, was_trained):
    checkpoint = build(bases, *towers)
    if was_trained:
        for parameter in checkpoint.model.model.vision_tower.parameters():
            parameter.data += 1
    folder = as_llava(checkpoint, tmp_path / "llava")
    expected = checkpoint.model.state_dict()
    found = load_model(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    fields = json.loads((folder / "config.json").read_text())
    assert fields.get("unfreeze_mm_vision_tower", False) == was_trained
    assert fields["mm_vision_tower"] == ",".join(str(bases / name) for name in towers)


def test_relative_names_of_several_towers_are_found_each(tmp_path, bases):
    checkpoint = build(bases, "clip", "dino")
    folder = as_llava(checkpoint, tmp_path / "llava")
    for name in ("clip", "dino"):
        (tmp_path / name).symlink_to(bases / name)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "mm_vision_tower": "clip,dino"}))
    assert load_model(folder).config.vision_config.hidden_size == 48


def test_siglip_in_transformers_llava_computes_what_ours_does(tmp_path, bases):
    checkpoint = build(bases, "siglip")
    write_hf(checkpoint, tmp_path / "hf")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    image = str(write_image(tmp_path / "image.png"))
    batch = checkpoint.processor(images=[image], text="USER: <image>\nWhat? ASSISTANT:")
    with torch.no_grad():
        ours, logits = checkpoint.model(**batch).logits, theirs(**batch).logits
    # The head multiplies one row more there, which may change the order of sums.
    torch.testing.assert_close(logits[..., : ours.shape[-1]], ours, atol=1e-6, rtol=0)


def test_several_towers_have_no_place_in_llava_hfs_format(tmp_path, bases):
    with pytest.raises(UserError, match="has one vision tower, and this model has several"):
        write_hf(build(bases, "clip", "dino"), tmp_path)


def test_towers_that_are_gone_have_to_be_named(tmp_path, bases):
    checkpoint = build(bases, "clip", "dino")
    checkpoint.model.save_pretrained(tmp_path / "own")
    checkpoint.processor.save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    gone = {**config, "vision_tower_name_or_path": "/gone/clip,/gone/dino"}
    (tmp_path / "own" / "config.json").write_text(json.dumps(gone))
    with pytest.raises(UserError, match="came from are gone.* --vision_tower"):
        convert(Source(folder=tmp_path / "own"), "llava", tmp_path / "out")
    towers = config["vision_tower_name_or_path"]
    convert(Source(folder=tmp_path / "own", vision_tower=towers), "llava", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mm_vision_tower"] == towers
    with pytest.raises(UserError, match="is another tower than the model's"):
        convert(Source(folder=tmp_path / "own", vision_tower=str(bases / "siglip")), "llava", tmp_path / "other")
