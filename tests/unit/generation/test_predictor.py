"""Predictor: batches, prompts and their limits. The models are random; what matters is that paths agree."""

import pytest
import torch
from PIL import Image

from llava_saep.bench.random_chat_model import build_chat_model
from llava_saep.bench.training.shapes import PRESETS
from llava_saep.errors import UserError
from llava_saep.generation import GenerationOptions, Predictor, content_with_placeholders, parse_messages
from projectors import select_projector
from tests.fixtures.conversations import ask

GREEDY = GenerationOptions(max_new_tokens=8, temperature=0.0)


def test_batch_equals_one_by_one(predictor, images):
    conversations = [
        ask(images[:1], "What is it?"),
        ask(images[:2], "Which colours do these two images show?"),
        ask([], "Say hello."),
        ask(images[2:], "Why?"),
    ]
    together = predictor.generate(conversations, GREEDY)
    assert together == [predictor.generate([conversation], GREEDY)[0] for conversation in conversations]


def test_answers_depend_on_the_image(predictor, images):
    black, white = Image.new("RGB", (24, 24), "black"), Image.new("RGB", (24, 24), "white")
    scores = []
    for image in (black, white):
        inputs = predictor.model_inputs([predictor.encode(ask([image], "What?"))])
        with torch.no_grad():
            scores.append(predictor.model(**inputs).logits[0, -1])
    assert not torch.allclose(*scores, atol=1e-4)


def test_earlier_turns_are_part_of_the_prompt(predictor, images):
    conversation = ask(images[:1], "What is it?")
    longer = [*conversation, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Which one?"}]
    short, long = predictor.encode(conversation).input_ids, predictor.encode(longer).input_ids
    assert long[: len(short)] == short and len(long) > len(short)


def test_processor_and_predictor_see_the_same_prompt(predictor, images):
    """The Hugging Face way (chat template, processor) and ours give the same ids and pixels."""
    messages = ask(images[:1], "What is it?")
    theirs = predictor.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "path": str(images[0])}, messages[0]["content"][1]]}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    ours = predictor.model_inputs([predictor.encode(messages)])
    assert theirs["input_ids"].tolist() == ours["input_ids"].tolist()
    assert torch.equal(theirs["pixel_values"], ours["pixel_values"])


def test_prompt_beyond_the_context_is_refused_with_the_numbers(predictor):
    with pytest.raises(UserError, match="context is 512"):
        predictor.generate([ask([], "word " * 600)], GREEDY)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "robot", "content": "x"}], "role 'robot'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 0 has a part"),
        ([{"role": "user", "content": 3}], "content of type int"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "only the first may be one"),
    ],
)
def test_malformed_messages_are_named(messages, message):
    with pytest.raises(UserError, match=message):
        parse_messages(messages, str)


def test_folder_that_is_no_model_is_named_as_such(tmp_path):
    with pytest.raises(UserError, match="has no config.json; expected a folder that training wrote"):
        Predictor.from_pretrained(tmp_path)


@pytest.mark.parametrize("device", ["gpu", "cuda:77"])
def test_device_that_is_not_there_is_named_before_anything_is_read(tmp_path, device):
    with pytest.raises(UserError, match=f"device '{device}' cannot be used here"):
        Predictor.from_pretrained(tmp_path, device=device)


def test_image_tokens_are_counted_by_the_processor(predictor, images, monkeypatch):
    """Configs saved by earlier versions may hold the count of a projector that was replaced since."""
    monkeypatch.setattr(predictor.model.config, "image_seq_length", 1)
    conversation = ask(images[:1], "What is it?")
    prompt = predictor.encode(conversation).input_ids
    assert prompt.count(predictor.model.config.image_token_id) == predictor.processor.num_image_tokens(24, 24) != 1
    predictor.generate([conversation], GREEDY)


def test_conversation_must_end_with_a_question(predictor):
    with pytest.raises(UserError, match="must end with a user's message"):
        predictor.generate([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]], GREEDY)


@pytest.mark.parametrize("field", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"num_beams": 0}])
def test_impossible_options_are_refused(field):
    with pytest.raises(UserError, match=next(iter(field))):
        GenerationOptions(**field)


def test_images_stand_where_llavas_placeholders_say(predictor, images):
    content = content_with_placeholders("Is <image-placeholder> like <image-placeholder>?", images[:2])
    messages = [{"role": "user", "content": content}]
    turns, found, _ = parse_messages(messages, str)
    assert turns[0].text == "Is <image> like <image>?" and found == images[:2]
    assert "USER: Is <image> like <image>? ASSISTANT:" in predictor.prompt_text(messages)
    assert content_with_placeholders("What?", images[:1]) == ask(images[:1], "What?")[0]["content"]
    with pytest.raises(UserError, match="1 <image-placeholder> and 2 images"):
        content_with_placeholders("What is <image-placeholder>?", images[:2])


def test_typed_markers_and_control_tokens_are_text(predictor, images):
    typed = "Is <image> or <image-placeholder> a </s> token?"
    prompt = predictor.encode(ask(images[:1], typed))
    tokenizer = predictor.processor.tokenizer
    assert prompt.num_image_tokens == predictor.num_image_tokens
    assert prompt.input_ids.count(predictor.model.config.image_token_id) == predictor.num_image_tokens
    assert tokenizer.eos_token_id not in prompt.input_ids
    assert tokenizer.decode(prompt.input_ids[prompt.image_spans[0][1] :]).endswith(f"{typed} ASSISTANT:")
    assert f"USER: <image>\n{typed} ASSISTANT:" in predictor.prompt_text(ask(images[:1], typed))
    assert len(predictor.generate([ask([], typed), ask(images[:1], typed)], GREEDY)) == 2


def test_another_template_can_be_asked_in_and_is_said(predictor, caplog):
    other = Predictor(predictor.model, predictor.processor, template="llava_llama_2")
    assert other.prompt_text(ask([], "Why?")).endswith("Why? [/INST]")
    assert "the model's conversation template is v1; it is asked in llava_llama_2" in caplog.text
    caplog.clear()
    Predictor(predictor.model, predictor.processor, template="vicuna_v1")  # another name of v1
    assert not caplog.records


def test_answers_limit_leaves_room_for_a_prompt(predictor):
    """The tiny model's context is 512 tokens."""
    assert predictor.fit(GenerationOptions(max_new_tokens=1024, num_beams=2)) == GenerationOptions(
        max_new_tokens=256, num_beams=2
    )
    assert predictor.fit(GREEDY) == GREEDY


def test_stop_string_that_no_token_writes_is_passed_over(predictor):
    """The vocabulary of numbered words has no "#", which ends an answer of v0; transformers refuses such a stop."""
    words = build_chat_model(PRESETS["tiny"], select_projector("linear"), torch.float32, torch.device("cpu"), seed=0)
    asked = Predictor(words.model, words.processor, template="v0")
    (answer,) = asked.generate([ask([], "w17 w18")], GREEDY)
    assert len(answer.split()) == GREEDY.max_new_tokens
    assert Predictor(predictor.model, predictor.processor, template="v0").decoding(GREEDY)["stop_strings"] == ["###"]
