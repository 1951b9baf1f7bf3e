"""Going on from a saved model: flags that would silently have no effect on its tower and projector are refused."""

import logging

import pytest

from llava_saep.arguments import parse_arguments
from llava_saep.errors import UserError
from llava_saep.model.loading import build_model, build_processor, build_tokenizer
from llava_saep.train.planning import plan_model
from projectors import select_projector
from tests.fixtures.tiny import VISION_LAYERS, write_bases


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def saved(bases, tmp_path_factory):
    """Folders of saved models, by projector."""
    parts = {"language_model": str(bases.language_model), "vision_tower": str(bases.vision_tower)}
    tokenizer = build_tokenizer(str(bases.language_model))
    folders = {}
    for name in ("linear", "saep"):
        folders[name] = tmp_path_factory.mktemp(name)
        image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        model = build_model(**parts, projector=select_projector(name), image_token_id=image_token_id)
        model.save_pretrained(folders[name])
        build_processor(**parts, model_config=model.config, tokenizer=tokenizer).save_pretrained(folders[name])
    return folders


def plan(folder, *flags):
    needed = ["--model_name_or_path", str(folder), "--data_path", "data.json", "--output_dir", "out"]
    return plan_model(parse_arguments([*needed, *map(str, flags)]))[1]


def test_other_tower_than_the_saved_ones_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match="brings its own tower"):
        plan(saved["linear"], "--vision_tower", tmp_path)
    with pytest.raises(UserError, match="brings its own tower"):
        plan(saved["linear"], "--vision_tower", "openai/clip-vit-large-patch14-336")


def test_saved_models_own_tower_may_be_named(saved, bases):
    own = bases.vision_tower
    for spelling in (own, own / ".." / own.name, saved["linear"]):
        assert plan(saved["linear"], "--vision_tower", spelling).vision_tower_name_or_path == str(own)


def test_other_layer_than_the_saved_projectors_is_refused(saved):
    with pytest.raises(UserError, match=r"reads layer\(s\) \[-2\] and not \[-1\]"):
        plan(saved["linear"], "--mm_vision_select_layer", -1)


@pytest.mark.parametrize("layer", [-2, VISION_LAYERS - 1])
def test_saved_projectors_own_layer_may_be_named(saved, layer):
    assert plan(saved["linear"], "--mm_vision_select_layer", layer).projector["name"] == "linear"


def test_single_layer_is_not_applied_to_a_saved_projector_of_several(saved, caplog):
    with caplog.at_level(logging.WARNING, "llava_saep"):
        planned = plan(saved["saep"], "--mm_vision_select_layer", -2)
    assert len(planned.projector_config.vision_layers) > 1
    assert "is not applied" in caplog.text


def test_class_token_that_the_saved_projector_does_not_read_is_refused(saved):
    with pytest.raises(UserError, match="cls_patch"):
        plan(saved["linear"], "--mm_vision_select_feature", "cls_patch")


def test_layer_is_applied_to_a_projector_that_is_named(saved):
    planned = plan(saved["saep"], "--mm_projector_type", "linear", "--mm_vision_select_layer", -1)
    assert list(planned.projector["options"]["vision_layers"]) == [-1]
