"""Vision towers side by side: the features of each on its own, channels joined, from images prepared once."""

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_saep.data.images import preprocess_image
from llava_saep.errors import UserError
from llava_saep.generation import GenerationOptions, Predictor
from llava_saep.model.combined_towers import split_tower_names
from llava_saep.model.reading import read_image_processor, read_vision_config
from llava_saep.model.vision_tower import has_class_token, read_patch_features, unused_tower_parameters
from llava_saep.train import train_mem
from tests.fixtures.tiny import TinyBases, write_data, write_language_model
from tests.fixtures.training import logged, training_flags

SIZES = {"num_attention_heads": 2, "patch_size": 4}
CROP = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Towers of 24, 16 and 32 channels and of 4, 3 and 5 blocks, each with its own mean and spread of colours."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    clip = CLIPVisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=4, image_size=24, **SIZES)
    dino = Dinov2WithRegistersConfig(hidden_size=16, mlp_ratio=2, num_hidden_layers=3, image_size=32, **SIZES)
    siglip = SiglipVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=5, image_size=24, **SIZES)
    parts = {
        "clip": (CLIPVisionModel(clip), CLIPImageProcessorPil(**CROP)),
        "dino": (Dinov2WithRegistersModel(dino), BitImageProcessorPil(**CROP, image_mean=[0.485, 0.456, 0.406])),
        "siglip": (SiglipVisionModel(siglip), SiglipImageProcessorPil(size={"height": 24, "width": 24})),
    }
    for name, (model, processor) in parts.items():
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


def named(folders, *names):
    return ",".join(str(folders / name) for name in names)


def load(folders, *names):
    config = read_vision_config(named(folders, *names))
    tower = AutoModel.from_config(config).eval()
    for single, name in zip(tower.towers, names, strict=True):
        single.load_state_dict(AutoModel.from_pretrained(folders / name).state_dict())
    return tower


@pytest.mark.parametrize("names", [("clip", "dino"), ("siglip", "dino", "clip")])
def test_features_are_those_of_each_tower_on_its_own_preprocessing(folders, names):
    image = Image.effect_noise((24, 24), 90).convert("RGB")
    pixels = preprocess_image(image, read_image_processor(named(folders, *names)), "square")[None]
    with torch.no_grad():
        features = read_patch_features(load(folders, *names), pixels, (-2, 1), keep_cls_token=False)
        for layer, feature in zip((-2, 1), features, strict=True):
            expected = []
            for name in names:
                own = preprocess_image(image, read_image_processor(str(folders / name)), "square")[None]
                single = AutoModel.from_pretrained(folders / name).eval()
                expected += read_patch_features(single, own, (layer,), keep_cls_token=False)
            # Pixels that were normalised for another tower first differ by float32 rounding.
            torch.testing.assert_close(feature, torch.cat(expected, dim=2), atol=1e-5, rtol=1e-4)


def test_config_speaks_for_all_towers(folders):
    config = read_vision_config(named(folders, "clip", "dino"))
    assert (config.hidden_size, config.num_hidden_layers, config.patch_size, config.image_size) == (40, 3, 4, 24)
    assert has_class_token(config)
    assert not has_class_token(read_vision_config(named(folders, "clip", "siglip")))


def test_unused_parameters_are_exactly_those_without_gradient(folders):
    tower = load(folders, "clip", "dino")
    features = read_patch_features(tower, torch.randn(1, 3, 24, 24), (-2,), keep_cls_token=False)
    features[0].sum().backward()
    without = {id(parameter) for parameter in tower.parameters() if parameter.grad is None}
    # DINOv2's mask token replaces masked patches, and no patch is masked.
    without -= {id(p) for name, p in tower.named_parameters() if "mask_token" in name}
    assert {id(parameter) for parameter in unused_tower_parameters(tower, (-2,))} == without


@pytest.mark.parametrize("kind", [{}, {"tune_mm_mlp_adapter": True}, {"unfreeze_mm_vision_tower": True}], ids=str)
def test_two_towers_train_save_load_and_answer(folders, kind, tmp_path):
    bases = TinyBases(named(folders, "clip", "dino"), write_language_model(tmp_path / "lm"))
    data = write_data(tmp_path / "data", num_records=2, text_only_every=2)
    flags = training_flags(bases, data, tmp_path / "out", per_device_train_batch_size=2, **kind)
    assert train_mem.main(flags) == 0
    losses = logged(tmp_path / "out", "loss")
    assert losses[-1] < losses[0]
    image = str(sorted(data.image_folder.iterdir())[0])
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "Which colour?"}]
    answers = [
        Predictor.from_pretrained(tmp_path / "out").generate(
            [[{"role": "user", "content": parts}]], GenerationOptions(max_new_tokens=4)
        )
        for _ in range(2)
    ]
    assert answers[0] == answers[1]
    first = AutoModel.from_pretrained(folders / "clip").state_dict()
    saved = Predictor.from_pretrained(tmp_path / "out").model.model.vision_tower.towers[0].state_dict()
    is_trained = "unfreeze_mm_vision_tower" in kind
    assert all(torch.equal(saved[name], tensor) for name, tensor in first.items()) != is_trained


def test_towers_that_do_not_fit_are_named_with_both_numbers(folders, tmp_path):
    for name, size, patch in (("large", 32, 4), ("coarse", 24, 8)):
        config = CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=size,
            patch_size=patch,
        )
        CLIPVisionModel(config).save_pretrained(tmp_path / name)
        CLIPImageProcessorPil(**CROP).save_pretrained(tmp_path / name)
    with pytest.raises(UserError, match="large takes images of 32 pixels only, but those that .*dino gets have 24"):
        read_vision_config(f"{folders / 'dino'},{tmp_path / 'large'}")
    with pytest.raises(UserError, match="has patches of 4 pixels and .*coarse of 8; towers side by side need the same"):
        read_vision_config(f"{folders / 'dino'},{tmp_path / 'coarse'}")


def test_names_are_split_at_commas_unless_a_folder_has_one(tmp_path):
    (tmp_path / "a,b").mkdir()
    assert split_tower_names(str(tmp_path / "a,b")) == [str(tmp_path / "a,b")]
    assert split_tower_names("openai/clip, facebook/dinov2") == ["openai/clip", "facebook/dinov2"]
