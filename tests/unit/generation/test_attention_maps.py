"""Where an answer looked: compared with the weights that transformers' own eager attention returns."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from llava_saep.data.templates import TEMPLATE_NAMES
from llava_saep.errors import UserError
from llava_saep.generation import GenerationOptions, LocalEngine, Predictor
from llava_saep.generation.attention_maps import (
    AttentionRecorder,
    answer_pieces,
    attention_maps,
    attention_recorded,
)
from llava_saep.model.loading import build_model, build_processor, build_tokenizer
from projectors import select_projector
from tests.fixtures.conversations import ask
from tests.fixtures.text_models import HIDDEN_SIZE, TEXT_MODELS, tiny_text_model
from tests.fixtures.tiny import write_bases

GREEDY = GenerationOptions(max_new_tokens=12)
ANSWER = "The triangle is yellow."
PROJECTORS = {"saep": 9, "mlp2x_gelu": 36, "qformer": 5, "avg_pool": 4}
OPTIONS = {
    "qformer": {"num_queries": 5, "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2},
    "avg_pool": {"num_queries": 4},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


def build(bases, projector, aspect_ratio="square", **kwargs):
    tokenizer = build_tokenizer(str(bases.language_model))
    torch.manual_seed(0)
    model = build_model(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        projector=select_projector(projector, OPTIONS.get(projector, {})),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **kwargs,
    )
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(20)
        for parameter in model.model.language_model.parameters():
            parameter.mul_(4)  # a fresh model attends to everything alike, and any mistake would go unnoticed
    processor = build_processor(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        model_config=model.config,
        tokenizer=tokenizer,
        image_aspect_ratio=aspect_ratio,
    )
    return Predictor(model, processor)


def picture(seed, width=24, height=24):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def weights_while_generating(predictor, prompt, answer_ids):
    """Eager attention while `generate` is made to write the answer -> (layers, answer tokens, keys of the prompt)."""
    length = len(prompt.input_ids)
    predictor.model.set_attn_implementation("eager")
    with torch.inference_mode():
        output = predictor.model.generate(
            **predictor.model_inputs([prompt]),
            max_new_tokens=len(answer_ids),
            do_sample=False,
            prefix_allowed_tokens_fn=lambda _, ids: [answer_ids[len(ids) - length]],
            output_attentions=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    assert output.sequences[0, length:].tolist() == answer_ids
    steps = [torch.stack(step)[:, 0, :, -1, :length].mean(dim=1) for step in output.attentions]
    return torch.stack(steps, dim=1).numpy()


@pytest.mark.parametrize("projector", PROJECTORS)
def test_weights_are_those_of_eager_attention_while_the_answer_is_written(bases, projector):
    predictor = build(bases, projector)
    conversation = [
        *ask([picture(0)], "Which colour is the triangle?"),
        {"role": "assistant", "content": "It is red."},
        *ask([picture(1)], "And here?"),
    ]
    maps = attention_maps(predictor, conversation, ANSWER)
    prompt, answer_ids = predictor.encode_answered(conversation, ANSWER)
    answer_ids = answer_ids[: maps.pieces[-1].end]
    expected = weights_while_generating(predictor, prompt, answer_ids)
    assert len(maps.images) == 2
    for image, (start, end) in zip(maps.images, prompt.image_spans, strict=True):
        assert image.weights.shape == (2, len(answer_ids), PROJECTORS[projector])
        # Half precision keeps three digits, and below 6e-5 steps of 6e-8.
        np.testing.assert_allclose(image.weights, expected[..., start:end], rtol=2e-3, atol=1e-6)
        np.testing.assert_allclose(image.mean(range(1, 2)), expected[1, :, start:end], rtol=2e-3, atol=1e-6)
        assert image.weights.std(axis=-1).max() > 1e-3


@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_recorded_rows_are_those_of_eager_attention_in_every_family(model_type):
    model = tiny_text_model(model_type, attn_implementation="eager").eval()
    embeddings = 3 * torch.randn(1, 20, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    recorder = AttentionRecorder(5, [(1, 4), (4, 20)])
    with torch.inference_mode():
        expected = model(inputs_embeds=embeddings, output_attentions=True)
        with attention_recorded(model):
            output = model(inputs_embeds=embeddings, attention_recorder=recorder)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    rows = torch.stack(expected.attentions)[:, 0, :, -5:].mean(dim=1).numpy()
    first, second = recorder.weights()
    np.testing.assert_allclose(first, rows[..., 1:4], rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(second, rows[..., 4:20], rtol=2e-3, atol=1e-6)
    assert model.config._attn_implementation == "eager"


def test_crops_of_an_image_have_their_places_and_their_weights(bases):
    predictor = build(
        bases,
        "saep",
        "anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=((48, 48), (24, 48), (48, 24)),
    )
    (image,) = attention_maps(predictor, ask([picture(0, 60, 40)], "What?"), ANSWER).images
    assert image.weights.shape[-1] == image.layout.num_tokens
    whole, tiles = (token_map.arrange(image.mean(range(2))) for token_map in image.layout.maps)
    assert whole.shape[1:] == (3, 3)
    newlines = image.weights.shape[-1] - whole[0].size - tiles[0].size
    assert newlines == tiles.shape[1]


def test_answers_written_meanwhile_and_later_are_the_same(bases):
    predictor = build(bases, "saep")
    conversation = ask([picture(0)], "What?")
    engine = LocalEngine(predictor, model_id="tiny")
    before = "".join(engine.stream(conversation, GREEDY))
    waiting = engine.stream(conversation, GREEDY)
    maps = engine.use_model(lambda used: attention_maps(used, conversation, ANSWER))
    assert maps.num_layers == 2
    assert "".join(waiting) == before
    assert "".join(engine.stream(conversation, GREEDY)) == before
    engine.close()
    with pytest.raises(UserError, match="was unloaded"):
        engine.use_model(lambda used: None)


def test_attention_is_put_back_after_an_error(bases):
    model = tiny_text_model("llama", attn_implementation="sdpa")
    with pytest.raises(ZeroDivisionError), attention_recorded(model):
        1 / 0  # noqa: B018
    assert model.config._attn_implementation == "sdpa"


def test_pieces_are_the_answer_and_bytes_of_a_character_stay_together(bases):
    predictor = build(bases, "saep")
    answer = "The cat 😀 is naïve."
    _, ids = predictor.encode_answered(ask([], "Well?"), answer)
    pieces = answer_pieces(predictor.processor.tokenizer, ids, answer)
    assert "".join(piece.text for piece in pieces) == answer
    assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
    (smile,) = [piece for piece in pieces if "😀" in piece.text]
    assert smile.end - smile.start >= 4  # the tiny vocabulary spells it in bytes
    assert pieces[-1].end == len(ids) - 1  # the token that ends an answer has no text


def test_an_empty_thinking_block_before_the_answer_is_left_out(bases):
    tokenizer = build(bases, "saep").processor.tokenizer
    lead, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in ("<think> </think>", ANSWER))
    pieces = answer_pieces(tokenizer, [*lead, *answer], ANSWER)
    assert "".join(piece.text for piece in pieces) == ANSWER
    assert (pieces[0].start, pieces[-1].end) == (len(lead), len(lead) + len(answer))


@pytest.mark.parametrize(
    ("images", "answer", "message"), [([], ANSWER, "no image"), ([picture(0)], "", "the answer is empty")]
)
def test_what_cannot_be_looked_into_is_refused(bases, images, answer, message):
    with pytest.raises(UserError, match=message):
        attention_maps(build(bases, "saep"), ask(images, "What?"), answer)


def test_a_language_model_that_hides_its_attention_is_named(bases, monkeypatch):
    predictor = build(bases, "saep")
    monkeypatch.setattr(type(predictor.model.model.language_model), "_supports_attention_backend", False)
    with pytest.raises(UserError, match="llama is hidden: its attention cannot be exchanged"):
        attention_maps(predictor, ask([picture(0)], "What?"), ANSWER)


def test_conversation_that_does_not_wait_for_an_answer_is_refused(bases):
    predictor = build(bases, "saep")
    conversation = [*ask([picture(0)], "What?"), {"role": "assistant", "content": "Nothing."}]
    with pytest.raises(UserError, match="must end with a user's message"):
        attention_maps(predictor, conversation, ANSWER)


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_prompt_is_the_one_that_is_answered_and_the_rest_is_the_answer(bases, template):
    """Teacher forcing on other tokens than those of the chat would show another model's attention."""
    built = build(bases, "saep")
    predictor = Predictor(built.model, built.processor, template=template)
    conversation = ask([picture(0)], "Which colour is the triangle?")
    prompt, answer_ids = predictor.encode_answered(conversation, ANSWER)
    asked = predictor.encode(conversation)
    assert dataclasses.replace(prompt, images=[]) == dataclasses.replace(asked, images=[])
    pieces = answer_pieces(predictor.processor.tokenizer, answer_ids, ANSWER)
    assert "".join(piece.text for piece in pieces) == ANSWER
