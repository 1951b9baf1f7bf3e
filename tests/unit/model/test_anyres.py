"""Images cut into crops: token counts and order, the newline token wherever a model goes, and transformers' LLaVA-NeXT.

tests/parity/test_original_merge.py compares with LLaVA's own outputs.
"""

import logging

import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from llava_saep.data.images import ImageSize, default_grid_pinpoints, select_tile_grid
from llava_saep.errors import UserError
from llava_saep.generation import GenerationOptions, Predictor
from llava_saep.model.anyres import ImageTokens, unpadded_window
from llava_saep.model.loading import (
    build_model,
    build_processor,
    build_tokenizer,
    load_model,
    load_processor,
    save_projector_weights,
)
from llava_saep.model.modeling_llava_saep import LlavaSaepForConditionalGeneration
from projectors import PatchGrid, registered_presets, registered_projectors, select_projector
from tests.fixtures.tiny import write_bases

VIEW = ImageSize(24, 24)
PINPOINTS = default_grid_pinpoints(VIEW)
SIZES = [ImageSize(24, 24), ImageSize(20, 32), ImageSize(37, 90), ImageSize(100, 40), ImageSize(3, 400)]
MERGE_TYPES = ("flat", "spatial", "spatial_unpad")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def tokenizer(bases):
    return build_tokenizer(str(bases.language_model))


def build(bases, tokenizer, projector="mlp2x_gelu", merge_type="spatial_unpad", **kwargs):
    torch.manual_seed(0)
    return build_model(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        projector=select_projector(projector),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        mm_patch_merge_type=merge_type,
        image_grid_pinpoints=PINPOINTS,
        **kwargs,
    ).eval()


def tiny_projector(name):
    """A small one between towers and language models of 24 channels."""
    selection = select_projector(name)
    options = selection.spec.config_class.tiny_options()
    selection = select_projector(name, {key: v for key, v in options.items() if key not in selection.options})
    config = selection.build_config(vision_hidden_size=24, text_hidden_size=24, num_vision_layers=24)
    torch.manual_seed(0)
    return selection.build(config).eval()


def stacks_of(sizes):
    torch.manual_seed(1)
    tiles = [select_tile_grid(size, VIEW, PINPOINTS) for size in sizes]
    return [torch.randn(1 + rows * columns, 3, *VIEW) for rows, columns in tiles]


def make_batch(model, sizes):
    """One row per image, padded on the right; labels on the text behind it."""
    counts = [model.config.image_tokens.num_tokens(size, VIEW) for size in sizes]
    longest = max(counts) + 5
    input_ids = torch.zeros(len(sizes), longest, dtype=torch.long)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for row, count in enumerate(counts):
        ids = [1, 5, *[model.config.image_token_id] * count, 7, 8, 9]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        labels[row, len(ids) - 2 : len(ids)] = torch.tensor([8, 9])
    images = {"pixel_values": stacks_of(sizes), "image_sizes": torch.tensor(sizes)}
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **images}


@pytest.mark.parametrize("name", [*registered_projectors(), *registered_presets()])
def test_token_grid_of_every_projector_is_the_map_that_its_tokens_form(name):
    """Where the patches of one corner change, the tokens of that corner change most."""
    grid = PatchGrid(8, 12)
    projector = tiny_projector(name)
    config = projector.config
    tokens = config.token_grid(grid)
    if tokens is None:
        return
    assert tokens.num_patches == config.num_output_tokens(grid)
    features = [torch.randn(1, grid.num_patches, 24) for _ in config.vision_layers]
    for top, left in ((0, 0), (0, 1), (1, 0), (1, 1)):
        changed = [feature.clone().unflatten(1, tuple(grid)) for feature in features]
        for feature in changed:
            feature[:, 5 * top : 5 * top + 3, 8 * left : 8 * left + 4] += 3.0
        with torch.no_grad():
            difference = projector([f.flatten(1, 2) for f in changed], grid) - projector(features, grid)
        strongest = int(difference.norm(dim=-1).argmax())
        row, column = divmod(strongest, tokens.width)
        assert (row >= tokens.height / 2, column >= tokens.width / 2) == (bool(top), bool(left))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("merge_type", MERGE_TYPES)
@pytest.mark.parametrize("name", ["mlp2x_gelu", "saep", "avg_pool"])
def test_counted_tokens_are_those_that_the_model_makes(bases, tokenizer, name, merge_type, size):
    """For projectors that keep the map, halve it, or pool it to a fixed one."""
    options = {"num_queries": 4} if name == "avg_pool" else {}
    config = select_projector(name, options).build_config(
        vision_hidden_size=24, text_hidden_size=8, num_vision_layers=4
    )
    arithmetic = ImageTokens(config, 4, merge_type, PINPOINTS)
    (stack,) = stacks_of([size])
    crops = torch.randn(len(stack), config.num_output_tokens(PatchGrid(6, 6)), 8)
    newline = torch.zeros(8) if arithmetic.has_newline else None
    assert len(arithmetic.merge(crops, size, VIEW, newline)) == arithmetic.num_tokens(size, VIEW)
    assert arithmetic.num_tokens(size, VIEW) <= arithmetic.max_tokens(VIEW)


def test_most_tokens_are_those_of_images_that_fill_their_tiles():
    config = select_projector("mlp2x_gelu").build_config(vision_hidden_size=24, text_hidden_size=8, num_vision_layers=4)
    arithmetic = ImageTokens(config, 4, "spatial_unpad", PINPOINTS)
    # 36 of the whole, and of 2 x 2 tiles 12 rows of 12 with a newline
    assert arithmetic.max_tokens(VIEW) == 36 + 12 * 13
    counts = {arithmetic.num_tokens(ImageSize(h, w), VIEW) for h in range(1, 80, 3) for w in range(1, 80, 3)}
    assert max(counts) <= arithmetic.max_tokens(VIEW)


def test_thin_images_lose_all_rows_or_keep_newlines_alone():
    """LLaVA-1.6's arithmetic, which its released weights have seen."""
    assert unpadded_window(PatchGrid(24, 72), ImageSize(1, 1000)).height == 0
    tall = unpadded_window(PatchGrid(72, 24), ImageSize(1000, 1))
    assert (tall.height, tall.width) == (72, 0)


@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES[1:4]], ids=["one", "several"])
def test_logits_equal_those_of_transformers_llava_next(bases, tokenizer, sizes):
    """The same weights in the library's own class; its pinpoints are heights and widths."""
    model = build(bases, tokenizer)
    config = LlavaNextConfig(
        vision_config=model.config.vision_config,
        text_config=model.config.text_config,
        image_token_index=model.config.image_token_id,
        image_grid_pinpoints=[[height, width] for width, height in PINPOINTS],
        vision_feature_layer=-2,
    )
    config.text_config.vocab_size = model.lm_head.out_features
    reference = LlavaNextForConditionalGeneration(config).eval()
    weights = model.state_dict()
    for ours, theirs in (("mlp.0", "linear_1"), ("mlp.2", "linear_2")):
        for kind in ("weight", "bias"):
            name = f"model.multi_modal_projector.{ours}.{kind}"
            weights[f"model.multi_modal_projector.{theirs}.{kind}"] = weights.pop(name)
    reference.load_state_dict(weights, strict=True)
    reference.resize_token_embeddings(model.config.image_token_id + 1)  # it looks the placeholder up
    batch = make_batch(model, sizes)
    labels = batch.pop("labels")
    with torch.no_grad():
        found = model(**batch).logits
        most = max(map(len, batch["pixel_values"]))
        padded = [torch.cat([stack, torch.zeros(most - len(stack), 3, *VIEW)]) for stack in batch["pixel_values"]]
        expected = reference(**(batch | {"pixel_values": torch.stack(padded)})).logits[..., : found.shape[-1]]
    real = batch["attention_mask"].bool()
    assert (labels != -100).any()
    # The same operations; the library's tower runs one layer more, on other batch sizes.
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-4)


def test_newline_learns_from_images_and_takes_part_without_any(bases, tokenizer):
    """ZeRO needs its gradient on every rank, also where all rows of an image are cut away or there is no image."""
    model = build(bases, tokenizer).train()
    thin = [ImageSize(1, 1000)]
    text = {"input_ids": torch.tensor([[1, 5, 6]]), "labels": torch.tensor([[1, 5, 6]])}
    zero = {"pixel_values": [torch.zeros(1, 3, *VIEW)], "image_sizes": torch.tensor([VIEW])}
    for batch, learns in ((make_batch(model, SIZES[:2]), True), (make_batch(model, thin), False), (text | zero, False)):
        model.zero_grad()
        model(**batch).loss.backward()
        gradient = model.model.image_newline.grad
        assert gradient is not None
        assert bool(gradient.any()) == learns


def test_tower_and_projector_are_called_once_for_all_crops(bases, tokenizer):
    model, calls = build(bases, tokenizer), []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append("tower"))
    model.model.multi_modal_projector.register_forward_hook(lambda *_: calls.append("projector"))
    with torch.no_grad():
        model(**make_batch(model, SIZES[:4]))
    assert calls == ["tower", "projector"]


def test_newline_is_saved_with_model_and_with_projector_alone(bases, tokenizer, tmp_path):
    model = build(bases, tokenizer)
    model.save_pretrained(tmp_path / "full")
    save_projector_weights(tmp_path / "projector", model.state_dict(), model.config)
    batch = make_batch(model, SIZES[:2])
    for folder in ("full", "projector"):
        loaded = load_model(tmp_path / folder)
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    continued = build(bases, tokenizer, projector_weights=tmp_path / "projector")
    assert torch.equal(continued.model.image_newline, model.model.image_newline)


def test_stage_one_weights_without_newline_start_it_anew_with_a_warning(bases, tokenizer, tmp_path, caplog):
    """LLaVA's own stage 1 does not write it."""
    model = build(bases, tokenizer)
    save_projector_weights(tmp_path, model.model.multi_modal_projector.state_dict(), model.config)
    with caplog.at_level(logging.WARNING):
        fresh = build(bases, tokenizer, projector_weights=tmp_path)
    assert "holds no image_newline" in caplog.text
    assert fresh.model.image_newline.abs().sum() > 0


def test_newline_of_another_width_is_named(bases, tokenizer, tmp_path):
    model = build(bases, tokenizer)
    weights = dict(model.state_dict()) | {"model.image_newline": torch.zeros(5)}
    save_projector_weights(tmp_path, weights, model.config)
    with pytest.raises(UserError, match=r"image_newline has shape \(5,\), expected \(32,\)"):
        build(bases, tokenizer, projector_weights=tmp_path)


def test_missing_newline_is_drawn_at_llavas_scale_and_refused_in_a_saved_model(bases, tokenizer, tmp_path):
    model = build(bases, tokenizer)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.image_newline"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    newlines = torch.stack(
        [LlavaSaepForConditionalGeneration.from_pretrained(tmp_path).model.image_newline for _ in range(8)]
    )
    # 256 numbers tell their spread to a quarter.
    assert newlines.std().item() == pytest.approx(32**-0.5, rel=0.25)
    with pytest.raises(UserError, match="model.image_newline"):
        load_model(tmp_path)


@pytest.mark.parametrize("merge_type", ["flat", "spatial"])
def test_other_ways_of_merging_have_no_newline(bases, tokenizer, merge_type):
    assert build(bases, tokenizer, merge_type=merge_type).model.image_newline is None


def test_way_of_merging_survives_building_on_a_saved_model(bases, tokenizer, tmp_path):
    model = build(bases, tokenizer)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    kept = build_model(
        language_model=str(tmp_path),
        vision_tower=None,
        projector=select_projector("mlp2x_gelu"),
        image_token_id=model.config.image_token_id,
    )
    assert kept.config.mm_patch_merge_type == "spatial_unpad"
    assert torch.equal(kept.model.image_newline, model.model.image_newline)
    flat = build(bases._replace(language_model=tmp_path), tokenizer, merge_type="flat")
    assert flat.model.image_newline is None


def test_sizes_and_crops_that_do_not_fit_are_named(bases, tokenizer):
    model = build(bases, tokenizer)
    stacks = stacks_of(SIZES[:2])
    with pytest.raises(UserError, match="needs image_sizes"):
        model.get_image_features(stacks)
    with pytest.raises(UserError, match="image_sizes has 1 rows, but there are 2 images"):
        model.get_image_features(stacks, torch.tensor(SIZES[:1]))
    with pytest.raises(UserError, match="90 x 37 pixels came in 3 crops, but image_grid_pinpoints cuts it into 3 x 1"):
        model.get_image_features(stacks, torch.tensor([SIZES[2], SIZES[1]]))


def test_projector_without_a_map_is_told_to_use_flat(bases, tokenizer):
    options = {"num_queries": 4, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = select_projector("qformer", options).build_config(
        vision_hidden_size=24, text_hidden_size=8, num_vision_layers=4
    )
    with pytest.raises(UserError, match="those of QFormer form none .* use --mm_patch_merge_type flat"):
        ImageTokens(config, 4, "spatial", PINPOINTS).num_tokens(SIZES[0], VIEW)
    assert ImageTokens(config, 4, "flat", PINPOINTS).num_tokens(SIZES[0], VIEW) == 3 * 4
    with pytest.raises(UserError, match="unknown mm_patch_merge_type 'unpad'; known: flat, spatial, spatial_unpad"):
        ImageTokens(config, 4, "unpad", PINPOINTS)


@pytest.fixture
def predictor(bases, tokenizer, tmp_path):
    model = build(bases, tokenizer)
    processor = build_processor(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        model_config=model.config,
        tokenizer=tokenizer,
        image_aspect_ratio="anyres",
    )
    processor.save_pretrained(tmp_path)
    return Predictor(model, load_processor(tmp_path))


def test_answers_of_a_batch_equal_those_given_one_by_one(predictor):
    def ask(*sizes):
        images = [Image.effect_noise((width, height), 80).convert("RGB") for height, width in sizes]
        parts = [{"type": "image", "image": image} for image in images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]

    conversations = [ask(SIZES[0]), ask(SIZES[2], SIZES[1]), [{"role": "user", "content": "Hello"}]]
    for options in (GenerationOptions(max_new_tokens=6), GenerationOptions(max_new_tokens=6, num_beams=2)):
        alone = [predictor.generate([conversation], options)[0] for conversation in conversations]
        assert predictor.generate(conversations, options) == alone


def test_processor_counts_what_the_model_makes(predictor):
    images = [Image.new("RGB", (width, height), "red") for height, width in SIZES[:3]]
    inputs = predictor.processor(images=images, text="<image>a <image> b<image>")
    num_placeholders = int((inputs["input_ids"] == predictor.model.config.image_token_id).sum())
    with torch.no_grad():
        output = predictor.model(**inputs)
    assert len(output.image_hidden_states) == num_placeholders == sum(predictor.processor.count_tokens(images))
    assert inputs["image_sizes"].tolist() == [list(size) for size in SIZES[:3]]


def test_processor_turns_photos_as_the_training_data_were(predictor, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (90, 37), "red").save(tmp_path / "sideways.jpg", exif=exif)
    processor = predictor.processor
    for is_turned, size in ((False, [37, 90]), (True, [90, 37])):
        processor.apply_exif_orientation = is_turned
        processor.save_pretrained(tmp_path / "processor")
        loaded = load_processor(tmp_path / "processor")
        for image in (str(tmp_path / "sideways.jpg"), Image.open(tmp_path / "sideways.jpg")):
            assert loaded.image_inputs([image])["image_sizes"].tolist() == [size]
