"""What is written for transformers' own classes, loaded and run by them: equal logits, equal answers."""

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

from llava_saep.convert.checkpoint import Checkpoint, Source, load_checkpoint
from llava_saep.convert.run import convert
from llava_saep.convert.to_hf import write_hf
from llava_saep.data.images import load_image
from llava_saep.errors import UserError
from llava_saep.model.loading import build_model, build_processor, build_tokenizer, load_model, load_processor
from projectors import select_projector
from tests.fixtures.tiny import write_bases, write_image

PINPOINTS = [[24, 48], [48, 24], [48, 48]]
PROMPTS = (
    "USER: <image>\nWhat is shown? ASSISTANT:",
    "USER: Is <image> like <image> or not, and why? ASSISTANT:",
    "USER: Hi ASSISTANT:",
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Wide, tall and square: with crops, each is cut in another way."""
    folder = tmp_path_factory.mktemp("images")
    sizes = ((20, 50), (61, 22), (24, 24))
    paths = [
        write_image(folder / f"{index}.png", height=height, width=width, seed=index)
        for index, (height, width) in enumerate(sizes)
    ]
    return [load_image(path) for path in paths]


def build(bases, aspect_ratio="pad", projector="mlp2x_gelu", **options):
    """A model with random projector, as training leaves it."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(str(bases.language_model))
    is_cut = aspect_ratio == "anyres"
    model = build_model(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        projector=select_projector(projector, options),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **({"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS} if is_cut else {}),
    ).eval()
    processor = build_processor(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        model_config=model.config,
        image_aspect_ratio=aspect_ratio,
    )
    processor.tokenizer.padding_side = "left"
    return Checkpoint(model, processor)


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def answers(model, batch, **kwargs):
    output = model.generate(**batch, max_new_tokens=12, do_sample=False, **kwargs)
    return output[:, batch["input_ids"].shape[1] :].tolist()


def assert_same_model(ours, theirs, batch):
    """Equal logits (of the vocabulary that both have) and equal greedy answers, of a batch padded on the left."""
    vocabulary = ours.config.text_config.vocab_size
    real = batch["attention_mask"].bool()
    # The same operations on the same numbers; the head multiplies one row more, which may change the order of sums.
    torch.testing.assert_close(
        logits_of(theirs, batch)[..., :vocabulary][real], logits_of(ours, batch)[real], atol=1e-6, rtol=0
    )
    assert answers(theirs, batch) == answers(ours, batch)


@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
@pytest.mark.parametrize(
    "options", [{}, {"keep_cls_token": True}, {"vision_layers": [1, 3]}], ids=["default", "cls", "layers"]
)
def test_llava_of_transformers_computes_what_ours_does(tmp_path, bases, images, aspect_ratio, options):
    checkpoint = build(bases, aspect_ratio, **options)
    write_hf(checkpoint, tmp_path)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    batch = checkpoint.processor(images=images, text=list(PROMPTS))
    assert_same_model(checkpoint.model, theirs, batch)


def test_llava_next_of_transformers_computes_what_ours_does(tmp_path, bases, images):
    checkpoint = build(bases, "anyres")
    write_hf(checkpoint, tmp_path)
    theirs = LlavaNextForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    batch = checkpoint.processor(images=images, text=list(PROMPTS))
    most = max(len(crops) for crops in batch["pixel_values"])
    padded = [torch.nn.functional.pad(c, (0, 0, 0, 0, 0, 0, 0, most - len(c))) for c in batch["pixel_values"]]
    # transformers takes one stack for all images and finds the number of crops from image_sizes.
    for_theirs = {**batch, "pixel_values": torch.stack(padded)}
    ours, vocabulary = checkpoint.model, checkpoint.model.config.text_config.vocab_size
    real = batch["attention_mask"].bool()
    found, expected = logits_of(theirs, for_theirs)[..., :vocabulary][real], logits_of(ours, batch)[real]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert answers(theirs, for_theirs) == answers(ours, batch)


@pytest.mark.parametrize("aspect_ratio", ["square", "pad", "anyres"])
def test_processor_of_transformers_prepares_images_as_ours_does(tmp_path, bases, images, aspect_ratio):
    checkpoint = build(bases, aspect_ratio)
    write_hf(checkpoint, tmp_path)
    theirs = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    for image in images:
        found = theirs.image_processor(image, return_tensors="pt")["pixel_values"][0]
        expected = checkpoint.processor.preprocess_images([image])[0]
        # Both resize with Pillow, in bytes; normalisation is in another order of float operations.
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        prompt = "USER: <image>\nWhat is shown? ASSISTANT:"
        own = checkpoint.processor(images=[image], text=prompt)["input_ids"]
        batch = theirs(images=[image], text=prompt, return_tensors="pt")
        placeholder = checkpoint.model.config.image_token_id
        assert (batch["input_ids"] == placeholder).sum() == (own == placeholder).sum()


@pytest.mark.parametrize("who", ["ours", "transformers"])
def test_left_padded_batch_gives_each_row_its_logits_and_answer_alone(tmp_path, bases, images, who):
    """Positions are counted from the padding on here, and the rotary embedding knows distances alone."""
    checkpoint = build(bases)
    model = checkpoint.model
    if who == "transformers":
        write_hf(checkpoint, tmp_path)
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    together = checkpoint.processor(images=images, text=list(PROMPTS))
    own = [images[:1], images[1:3], []]
    alone = [checkpoint.processor(images=few or None, text=prompt) for few, prompt in zip(own, PROMPTS, strict=True)]
    logits = logits_of(model, together)
    assert len({batch["input_ids"].shape[1] for batch in alone}) == 3  # each row has another padding
    for row, batch in zip(logits, alone, strict=True):
        expected = logits_of(model, batch)[0]
        torch.testing.assert_close(row[-len(expected) :], expected, atol=1e-5, rtol=0)
    assert answers(model, together) == [answers(model, batch)[0] for batch in alone]


@pytest.mark.parametrize("aspect_ratio", ["pad", "anyres"])
def test_round_trip_through_llava_hf_changes_no_bit(tmp_path, bases, images, aspect_ratio):
    checkpoint = build(bases, aspect_ratio)
    write_hf(checkpoint, tmp_path / "hf")
    convert(Source(folder=tmp_path / "hf"), "own", tmp_path / "own")
    model, processor = load_model(tmp_path / "own"), load_processor(tmp_path / "own")
    expected = checkpoint.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.config.image_grid_pinpoints == checkpoint.model.config.image_grid_pinpoints
    assert processor.image_aspect_ratio == aspect_ratio
    processor.tokenizer.padding_side = "left"
    batch, again = (p(images=images, text=list(PROMPTS)) for p in (checkpoint.processor, processor))
    assert torch.equal(logits_of(model, again), logits_of(checkpoint.model, batch))
    assert model.generation_config.suppress_tokens is None


def test_folder_of_transformers_own_making_loads_here(tmp_path, bases, images):
    """Written by transformers from a model that it drew itself, not by our exporter."""
    write_hf(build(bases), tmp_path / "template")
    drawn = LlavaForConditionalGeneration.from_pretrained(tmp_path / "template")
    generator = torch.Generator().manual_seed(1)
    for parameter in drawn.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    del drawn.config.num_placeholder_rows
    drawn.save_pretrained(tmp_path / "hf")
    AutoProcessor.from_pretrained(tmp_path / "template", backend="pil").save_pretrained(tmp_path / "hf")
    ours = load_checkpoint(Source(folder=tmp_path / "hf", format="hf"))
    ours.processor.tokenizer.padding_side = "left"
    assert ours.model.config.text_config.vocab_size == drawn.config.text_config.vocab_size
    assert_same_model(ours.model, drawn.eval(), ours.processor(images=images, text=list(PROMPTS)))


@pytest.mark.parametrize(
    ("projector", "options", "reason"),
    [("saep", {}, "has saep"), ("mlp", {"depth": 3}, "'depth': 3"), ("linear", {}, "has linear")],
)
def test_what_llava_hf_has_no_place_for_is_refused_before_anything_is_written(
    tmp_path, bases, projector, options, reason
):
    checkpoint = build(bases, projector=projector, **options)
    with pytest.raises(UserError, match=f"llava-hf's format knows one projector.*{reason}"):
        write_hf(checkpoint, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_greedy_decoding_never_writes_the_placeholder(tmp_path, bases):
    """Its row repeats the first one, which is made the best: but for the order of sums, both are."""
    checkpoint = build(bases)
    with torch.no_grad():
        checkpoint.model.lm_head.weight.zero_()
        checkpoint.model.lm_head.weight[0] = 1.0
    write_hf(checkpoint, tmp_path)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = checkpoint.processor(text="USER: Hi ASSISTANT:")
    assert answers(theirs, batch) == answers(checkpoint.model, batch) == [[0] * 12]


def test_image_processor_stays_one_for_transformers_auto_class(tmp_path, bases):
    write_hf(build(bases, "anyres"), tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    # LLaVA says width first, transformers height first: the same sizes, each pair turned.
    assert [list(pair) for pair in loaded.image_grid_pinpoints] == [[48, 24], [24, 48], [48, 48]]


def test_tower_with_registers_is_refused(tmp_path, bases):
    checkpoint = build(bases)
    config = checkpoint.model.config
    config.vision_config.model_type = "dinov2_with_registers"
    config.vision_config.num_register_tokens = 4
    with pytest.raises(UserError, match="drops one token before the patches, but .* has 5"):
        write_hf(checkpoint, tmp_path)
