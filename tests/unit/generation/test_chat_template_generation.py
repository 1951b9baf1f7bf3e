"""What was trained with a tokenizer's chat template is saved with the model, and the model is asked with it."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llava_saep.constants import IGNORE_INDEX
from llava_saep.data.collator import ConversationCollator
from llava_saep.data.dataset import ConversationDataset
from llava_saep.data.templates import TEMPLATE_NAMES, conversation_template
from llava_saep.errors import UserError
from llava_saep.generation import GenerationOptions, LocalEngine, Predictor
from llava_saep.model.loading import build_model, build_processor, build_tokenizer
from llava_saep.model.processing_llava_saep import LlavaSaepProcessor
from projectors import select_projector
from tests.fixtures.chat_templates import FAMILIES, make_tokenizer
from tests.fixtures.tiny import write_image, write_language_model, write_vision_tower

ANSWERS = ("A red cat.", "Yes.")


def _write_chat_model(folder, family):
    tokenizer = make_tokenizer(family)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _parts(folder, family):
    tower, language_model = write_vision_tower(folder / "tower"), _write_chat_model(folder / "lm", family)
    tokenizer = build_tokenizer(str(language_model))
    model = build_model(
        language_model=str(language_model),
        vision_tower=str(tower),
        projector=select_projector("linear"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = build_processor(
        language_model=str(language_model),
        vision_tower=str(tower),
        model_config=model.config,
        tokenizer=tokenizer,
        conversation_template="chat_template",
    )
    return model, processor


def _dataset(folder, model, processor):
    write_image(folder / "a.png")
    texts = ("<image>\nWhat is it?", ANSWERS[0], "Sure?", ANSWERS[1])
    turns = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]
    (folder / "data.json").write_text(json.dumps([{"id": 1, "image": "a.png", "conversations": turns}]))
    return ConversationDataset(
        folder / "data.json",
        folder,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        image_aspect_ratio=processor.image_aspect_ratio,
        template=conversation_template(processor.conversation_template, processor.tokenizer),
        num_image_tokens=model.config.num_image_tokens,
        patch_size=processor.patch_size,
        image_token_id=model.config.image_token_id,
        max_length=256,
    )


def _questions(folder, num_answers):
    first = [{"type": "image", "image": str(folder / "a.png")}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": first}]
    if num_answers:
        messages += [{"role": "assistant", "content": ANSWERS[0]}, {"role": "user", "content": "Sure?"}]
    return messages


def _learn_by_heart(model, sample):
    batch = ConversationCollator(0, tuple(sample["pixel_values"].shape[-2:]), 256)([sample])
    optimizer = torch.optim.AdamW([at for at in model.parameters() if at.requires_grad], lr=1e-2)
    for _ in range(60):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05


@pytest.mark.parametrize("family", ["qwen2.5", "gemma", "mistral"])  # gemma's answers do not end with its eos token
def test_a_saved_model_answers_as_it_was_trained(tmp_path, family):
    model, processor = _parts(tmp_path, family)
    sample = _dataset(tmp_path, model, processor)[0]
    _learn_by_heart(model, sample)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    engine = LocalEngine.from_pretrained(tmp_path / "saved", device="cpu")
    options = GenerationOptions(max_new_tokens=30)
    for position, answer in enumerate(ANSWERS):
        assert engine.predictor.generate([_questions(tmp_path, position)], options) == [answer]
        stream = engine.stream(_questions(tmp_path, position), options)
        assert "".join(stream) == answer
        assert stream.statistics.finish_reason == "stop"


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_a_saved_processor_begin_the_training_text(tmp_path, family):
    model, processor = _parts(tmp_path, family)
    sample = _dataset(tmp_path, model, processor)[0]
    processor.save_pretrained(tmp_path / "saved")
    predictor = Predictor(model, type(processor).from_pretrained(tmp_path / "saved"))
    ids = predictor.encode(_questions(tmp_path, 1)).input_ids
    assert sample["input_ids"].tolist()[: len(ids)] == ids
    assert sample["labels"][len(ids)] != IGNORE_INDEX
    text = predictor.processor.apply_chat_template(_questions(tmp_path, 1), add_generation_prompt=True, tokenize=False)
    inputs = predictor.processor(images=[str(tmp_path / "a.png")], text=text)
    assert inputs["input_ids"][0].tolist() == ids


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_processor_and_predictor_ask_alike(tmp_path, name):
    model, processor = _parts(tmp_path, "phi-4")
    processor.save_pretrained(tmp_path / "saved")  # with the tokenizer's own template, which must not be used then
    processor = LlavaSaepProcessor.from_model_config(
        model.config,
        image_processor=processor.image_processor,
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "saved"),
        conversation_template=name,
    )
    processor.save_pretrained(tmp_path / "again")
    predictor = Predictor(model, LlavaSaepProcessor.from_pretrained(tmp_path / "again"))
    write_image(tmp_path / "a.png")
    messages = _questions(tmp_path, 1)
    text = predictor.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = predictor.processor(images=[str(tmp_path / "a.png")], text=text)
    assert inputs["input_ids"][0].tolist() == predictor.encode(messages).input_ids


def test_a_tokenizer_without_a_chat_template_is_refused_before_the_model_is_made(tmp_path):
    model, processor = _parts(tmp_path, "phi-3")
    language_model = write_language_model(tmp_path / "llama")
    with pytest.raises(UserError, match="--version chat_template: the tokenizer .* has no chat template"):
        build_processor(
            language_model=str(language_model),
            vision_tower=str(tmp_path / "tower"),
            model_config=model.config,
            conversation_template="chat_template",
        )
