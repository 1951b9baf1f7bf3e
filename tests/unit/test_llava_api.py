"""LLaVA's Python API, and transformers' own ways to the same model."""

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import llava_saep
from llava_saep.convert.checkpoint import Source
from llava_saep.convert.run import convert
from llava_saep.data.images import load_image
from llava_saep.errors import UserError
from llava_saep.generation import GenerationOptions, Predictor
from llava_saep.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava_saep.model.llava_generation import expand_rows, match_images, pad_left

GOLDEN = Path(__file__).parents[1] / "golden" / "llava"
CHECKPOINTS = GOLDEN / "checkpoints"
QUESTION = "USER: <image>\nWhat is the color of the car? ASSISTANT:"


@pytest.fixture(scope="module")
def loaded():
    return llava_saep.load_pretrained_model(str(CHECKPOINTS / "llava_tiny_v15"), None, "llava", device="cpu")


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "own"
    convert(Source(folder=CHECKPOINTS / "llava_tiny_v15", dtype=torch.float32), "own", folder)
    return folder


@pytest.fixture(scope="module")
def images():
    return [load_image(GOLDEN / "images" / name) for name in ("wide.png", "tall.png", "square.png")]


def generated(model, *arguments, **kwargs):
    return model.generate(*arguments, do_sample=False, max_new_tokens=8, **kwargs)


# Names


def test_every_name_of_llavas_api_is_there():
    for name in llava_saep.__all__:
        assert getattr(llava_saep, name) is not None
    from llava_saep.constants import IMAGE_TOKEN_INDEX
    from llava_saep.conversation import SeparatorStyle, conv_templates

    assert (llava_saep.IMAGE_TOKEN_INDEX, llava_saep.IGNORE_INDEX) == (IMAGE_TOKEN_INDEX, -100) == (-200, -100)
    from llava_saep.utils import disable_torch_init

    assert llava_saep.conv_templates is conv_templates
    assert disable_torch_init() is None
    assert conv_templates["llava_v1"].sep_style is SeparatorStyle.TWO
    with pytest.raises(AttributeError, match="has no attribute 'load_pretrained'"):
        _ = llava_saep.load_pretrained


LLAVA_SIGNATURES = {
    "load_pretrained_model": "(model_path, model_base, model_name, load_8bit=False, load_4bit=False, "
    "device_map='auto', device='cuda', use_flash_attn=False, **kwargs)",
    "process_images": "(images, image_processor, model_cfg)",
    "tokenizer_image_token": "(prompt, tokenizer, image_token_index=-200, return_tensors=None)",
    "get_model_name_from_path": "(model_path)",
    "KeywordsStoppingCriteria": "(keywords, tokenizer, input_ids)",
}
"""As llava.model.builder and llava.mm_utils have them."""


@pytest.mark.parametrize("name", LLAVA_SIGNATURES)
def test_signatures_are_llavas(name):
    """Names, order and defaults, so that calls by position and by name both work."""
    signature = inspect.signature(getattr(llava_saep, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == LLAVA_SIGNATURES[name]


def test_constants_are_llavas():
    """llava.constants."""
    values = {name: value for name, value in vars(llava_saep.constants).items() if name.isupper()}
    assert values == {
        "IGNORE_INDEX": -100,
        "IMAGE_TOKEN_INDEX": -200,
        "DEFAULT_IMAGE_TOKEN": "<image>",
        "DEFAULT_IMAGE_PATCH_TOKEN": "<im_patch>",
        "DEFAULT_IM_START_TOKEN": "<im_start>",
        "DEFAULT_IM_END_TOKEN": "<im_end>",
        "IMAGE_PLACEHOLDER": "<image-placeholder>",
    }


def test_conversations_have_llavas_methods_and_fields():
    conversation = llava_saep.conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], "<image>\nHi")
    conversation.append_message(conversation.roles[1], None)
    assert conversation.get_prompt().endswith("USER: <image>\nHi ASSISTANT:")
    assert len(llava_saep.conv_templates["vicuna_v1"].messages) == 0
    names = ["system", "roles", "messages", "offset", "sep_style", "sep", "sep2", "version", "skip_next"]
    assert [field.name for field in dataclasses.fields(conversation)] == names


@pytest.mark.slow
def test_importing_the_package_imports_nothing_of_the_api():
    code = "import sys, llava_saep; print([m for m in sys.modules if m in " + repr(
        ["llava_saep.mm_utils", "llava_saep.model.builder", "llava_saep.convert", "llava_saep.model.loading", "peft"]
    )
    output = subprocess.run([sys.executable, "-c", f"{code}])"], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"),
        ("runs/llava/", "llava"),
        ("runs/llava-lora/checkpoint-100/", "llava-lora_checkpoint-100"),
    ],
)
def test_name_of_a_model_is_the_last_part_of_its_path(path, name):
    assert get_model_name_from_path(path) == name


# Loading


def test_what_a_folder_is_does_not_follow_from_the_models_name():
    folder = str(CHECKPOINTS / "llava_tiny_v15")
    first, second = (llava_saep.load_pretrained_model(folder, None, name, device="cpu")[1] for name in ("lora", "mpt"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_loaded_model_has_what_llavas_scripts_read(loaded):
    tokenizer, model, image_processor, context_length = loaded
    assert model.config.image_aspect_ratio == "pad"
    assert model.config.mm_use_im_start_end is False
    assert not model.training
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert tokenizer.pad_token_id == 0
    assert image_processor.crop_size["height"] == 56
    assert context_length == 2048


def test_base_of_an_adapter_is_named_as_in_llava():
    lora, base = str(CHECKPOINTS / "llava_tiny_lora"), str(CHECKPOINTS / "llava_tiny_v15")
    merged = llava_saep.load_pretrained_model(lora, base, "llava-lora", device="cpu")[1]
    plain = llava_saep.load_pretrained_model(base, None, "llava", device="cpu")[1]
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged.get_parameter(name), plain.get_parameter(name))
    with pytest.raises(UserError, match="name it with --model_base"):
        llava_saep.load_pretrained_model(lora, None, "llava-lora", device="cpu")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"load_4bit": True, "load_8bit": True}, r"load_8bit \(--load-4bit, --load-8bit\) are both set"),
        ({"device_map": "balanced"}, "device_map 'balanced': expected 'auto'"),
        ({"max_memory": {}}, "does not know max_memory"),
    ],
)
def test_what_is_not_supported_is_refused(kwargs, message):
    with pytest.raises(UserError, match=message):
        llava_saep.load_pretrained_model(
            str(CHECKPOINTS / "llava_tiny_v15"), None, "llava", **{"device": "cpu", **kwargs}
        )


def test_own_folder_loads_too_and_refuses_a_base(own_folder, loaded):
    tokenizer, model, _, _ = llava_saep.load_pretrained_model(str(own_folder), None, "any", device="cpu")
    assert model.config.image_aspect_ratio == "pad"
    assert tokenizer("USER: Hi").input_ids == loaded[0]("USER: Hi").input_ids
    with pytest.raises(UserError, match="says itself what it is made of; leave model_base out"):
        llava_saep.load_pretrained_model(str(own_folder), "vicuna", "any", device="cpu")


# Prompts and images


@pytest.mark.parametrize("return_tensors", [None, "pt"])
def test_tokenizer_image_token_puts_the_mark_between_the_chunks(loaded, return_tensors):
    case = json.loads((GOLDEN / "generation.json").read_text())["cases"][1]
    found = tokenizer_image_token(case["prompt"], loaded[0], return_tensors=return_tensors)
    assert torch.is_tensor(found) == (return_tensors == "pt")
    assert list(found) == case["input_ids"]
    with pytest.raises(ValueError, match="expected None or 'pt'"):
        tokenizer_image_token("x", loaded[0], return_tensors="np")


@pytest.mark.parametrize("aspect_ratio", [None, "square", "pad"])
def test_process_images_stacks_images_as_the_config_says(loaded, images, aspect_ratio):
    pixels = process_images(images, loaded[2], SimpleNamespace(image_aspect_ratio=aspect_ratio))
    assert pixels.shape == (3, 3, 56, 56)
    corner = pixels[0, :, 0, 0]
    mean = torch.tensor([122, 116, 104]) / 255  # the colour that "pad" fills with, LLaVA's
    filled = (mean - torch.tensor(loaded[2].image_mean)) / torch.tensor(loaded[2].image_std)
    assert torch.allclose(corner, filled, atol=1e-5) == (aspect_ratio == "pad")


def test_process_images_gives_a_list_only_where_crops_differ_in_number(loaded, images):
    pinpoints = "[(56, 112), (112, 56), (112, 112)]"
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=pinpoints)
    assert process_images(images[:1] * 2, loaded[2], config).shape == (2, 3, 3, 56, 56)
    config.image_grid_pinpoints = [[112, 56], [112, 112]]
    assert [len(crops) for crops in process_images([images[0], images[1]], loaded[2], config)] == [3, 5]


# generate, in LLaVA's way


def test_batch_padded_on_either_side_gives_each_row_its_answer_alone(loaded, images):
    tokenizer, model, image_processor, _ = loaded
    pixels = process_images(images, image_processor, model.config)
    prompts = (QUESTION, "USER: Is <image> like <image> or not? ASSISTANT:", "USER: Hello ASSISTANT:")
    rows = [tokenizer_image_token(prompt, tokenizer) for prompt in prompts]
    shown = [pixels[:1], pixels[1:], None]
    alone = [
        generated(model, torch.tensor([row]), images=own)[0].tolist() for row, own in zip(rows, shown, strict=True)
    ]
    longest = max(map(len, rows))
    for side in ("left", "right"):
        pads = [[0] * (longest - len(row)) for row in rows]
        padded = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
        mask = [
            [0] * len(pad) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(pad)
            for row, pad in zip(rows, pads, strict=True)
        ]
        together = generated(model, torch.tensor(padded), attention_mask=torch.tensor(mask), images=pixels)
        assert together.tolist() == alone


def test_rows_that_images_lengthen_unequally_need_no_mask(loaded, images):
    """LLaVA pads them, and without a mask attends to the padding."""
    tokenizer, model, image_processor, _ = loaded
    pixels = process_images(images, image_processor, model.config)
    rows = [[1, -200, 5, -200, 7], [1, 6, -200, 8, 9], [1, 6, 7, 8, 9]]
    shown = [pixels[:2], pixels[2:], None]
    alone = [generated(model, torch.tensor([row]), images=own).tolist() for row, own in zip(rows, shown, strict=True)]
    assert [[row] for row in generated(model, torch.tensor(rows), images=pixels).tolist()] == alone


def test_images_as_a_list_or_stacked_are_the_same(loaded, images):
    tokenizer, model, image_processor, _ = loaded
    pixels = process_images(images[:1], image_processor, model.config)
    ids = tokenizer_image_token(QUESTION, tokenizer, return_tensors="pt")[None]
    expected = generated(model, ids, images=pixels)
    assert torch.equal(generated(model, input_ids=ids, images=[pixels[0]]), expected)
    assert torch.equal(generated(model, ids, images=pixels[:, None]), expected)
    assert torch.equal(generated(model, ids, images=pixels.double()), expected)


def test_prompt_of_an_image_alone_is_answered(loaded, images):
    """The original looks -200 up in its embedding."""
    pixels = process_images(images[:1], loaded[2], loaded[1].config)
    assert generated(loaded[1], torch.tensor([[-200]]), images=pixels).shape[1] > 0


def test_images_and_marks_that_differ_in_number_are_an_error(loaded, images):
    _, model, image_processor, _ = loaded
    pixels = process_images(images, image_processor, model.config)
    with pytest.raises(UserError, match="have 1 image marks .* in 1 rows, but 3 images came"):
        generated(model, torch.tensor([[1, -200, 5]]), images=pixels)
    with pytest.raises(UserError, match="have 1 image marks .* but 0 images came"):
        generated(model, torch.tensor([[1, -200, 5]]), images=None)
    with pytest.raises(UserError, match="hold -200, LLaVA's mark of an image; give the images as `images`"):
        generated(model, torch.tensor([[1, -200, 5]]))


def test_row_without_a_mark_may_have_an_image_of_its_own_as_in_llava():
    features = [torch.full((1, 1), float(value)) for value in range(4)]
    assert [f.item() for f in match_images(features, [1, 0, 2])] == [0, 2, 3]
    assert [f.item() for f in match_images(features[:3], [1, 0, 2])] == [0, 1, 2]


def test_rows_are_expanded_image_by_image_and_padded_on_the_left():
    rows = expand_rows([[1, -200, 2], [-200, -200]], [2, 1, 3], image_token_id=9)
    assert rows == [[1, 9, 9, 2], [9, 9, 9, 9]]
    ids, mask = pad_left([[1, 2], [3]], torch.device("cpu"))
    assert ids.tolist() == [[1, 2], [0, 3]]
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_keyword_ends_the_answer_of_llavas_generate(loaded, images):
    tokenizer, model, image_processor, _ = loaded
    ids = tokenizer_image_token(QUESTION, tokenizer, return_tensors="pt")[None]
    pixels = process_images(images[:1], image_processor, model.config)
    whole = generated(model, ids, images=pixels)[0]
    keyword = tokenizer.decode(whole[2:3])
    criteria = llava_saep.KeywordsStoppingCriteria([keyword], tokenizer, ids)
    stopped = generated(model, ids, images=pixels, stopping_criteria=[criteria])[0]
    assert keyword in tokenizer.decode(stopped)
    assert len(stopped) < len(whole) and stopped.tolist() == whole[: len(stopped)].tolist()


# transformers' ways


def asking_for_colour(image):
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "Colour?"}]
    return [{"role": "user", "content": parts}]


def test_auto_classes_pipeline_and_predictor_answer_alike(own_folder, images):
    """Four ways to the same greedy answer: Auto classes, pipeline, our Predictor, and LLaVA's generate."""
    messages = [
        {"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "Colour?"}]}
    ]
    processor = AutoProcessor.from_pretrained(own_folder, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(own_folder, dtype=torch.float32).eval()
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    batch = processor(images=[images[0]], text=prompt)
    output = generated(model, **batch)[0, batch["input_ids"].shape[1] :]
    answer = processor.decode(output, skip_special_tokens=True).strip()
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    piped = pipe(text=messages, max_new_tokens=8, generate_kwargs={"do_sample": False}, return_full_text=False)
    assert piped[0]["generated_text"].strip() == answer
    predictor = Predictor.from_pretrained(CHECKPOINTS / "llava_tiny_v15", device="cpu")
    assert predictor.generate([messages], GenerationOptions(max_new_tokens=8)) == [answer]
    pixels = process_images(images[:1], processor.image_processor, SimpleNamespace(image_aspect_ratio="pad"))
    ids = tokenizer_image_token(prompt, processor.tokenizer, return_tensors="pt")[None]
    assert generated(model, ids, images=pixels)[0].tolist() == output.tolist()


def test_llava_hf_folder_answers_like_the_llava_folder_that_it_came_from(tmp_path, images):
    convert(Source(folder=CHECKPOINTS / "llava_tiny_v16", dtype=torch.float32), "hf", tmp_path / "hf")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "Colour?"}]}
    ]
    options = GenerationOptions(max_new_tokens=8)
    folders = (CHECKPOINTS / "llava_tiny_v16", tmp_path / "hf")
    first, second = (Predictor.from_pretrained(path, device="cpu").generate([messages], options) for path in folders)
    assert first == second


def test_images_are_marked_as_the_model_was_trained_where_it_knows_im_start_and_im_end(monkeypatch, images):
    """LLaVA's scripts write <im_start><image><im_end> themselves; Predictor does it for its messages."""
    predictor = Predictor.from_pretrained(CHECKPOINTS / "llava_tiny_v15", device="cpu")
    tokenizer = predictor.processor.tokenizer
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    predictor.model.resize_token_embeddings(len(tokenizer))
    seen = []
    own_generate = type(predictor.model).generate

    def recording(*arguments, **kwargs):
        seen.append(kwargs["input_ids"][0].tolist())
        return own_generate(predictor.model, *arguments, **kwargs)

    monkeypatch.setattr(predictor.model, "generate", recording)
    for is_marked in (False, True):
        predictor.model.config.mm_use_im_start_end = is_marked
        predictor.generate([asking_for_colour(images[0])], GenerationOptions(max_new_tokens=1))
    plain, marked = seen
    start, end = tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    placeholder = predictor.model.config.image_token_id
    assert start not in plain and placeholder in plain
    assert marked[marked.index(start) + 1 : marked.index(end)] == [placeholder] * 16
