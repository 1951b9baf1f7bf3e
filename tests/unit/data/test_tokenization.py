"""Token ids and labels: the answers, and only they, are targets. tests/parity compares both with LLaVA's."""

import random

import pytest
from transformers import AutoTokenizer

from llava_saep.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_saep.data.conversation import Segment, Turn, segments_text
from llava_saep.data.templates import TEMPLATE_NAMES, conversation_template
from llava_saep.data.tokenization import count_text_tokens, encode_prompt, encode_segments, sentence_targets
from llava_saep.errors import UserError
from tests.fixtures.tiny import write_tokenizer

from .conftest import llama_tokenizer, read_golden

TOKENIZER_IDS = read_golden("tokenizer_ids.json")


def _random_text(rng):
    words = ["cat", "dogs", " ", "  ", "\n", "12", "ü", "図", "<s>", "</s>", "é", ".", "a b", "😀", "USER:", "[/INST]"]
    return "".join(rng.choices(words, k=rng.randint(1, 8)))


def _random_turns(rng):
    """Question and answer pairs; the first shows an image. Answers do not start with white space,
    which a byte-level vocabulary could join with the end of the prompt."""
    turns = []
    for position in range(rng.randint(1, 3)):
        question = ("<image>\n" if position == 0 else "") + _random_text(rng)
        turns += [Turn("user", question), Turn("assistant", "A" + _random_text(rng))]
    return turns


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
@pytest.mark.parametrize("tokenizer_name", ["llama_legacy", "llama_new", "yi_new", "byte_level"])
def test_generation_sees_the_ids_of_training(tokenizers, name, tokenizer_name):
    """The prompt of each answer is a prefix of the training ids, and targets start exactly where it ends."""
    rng = random.Random(f"{name} {tokenizer_name}")
    template, tokenizer = conversation_template(name), tokenizers[tokenizer_name]
    for _ in range(20):
        turns = _random_turns(rng)
        encoded = encode_segments(template.render(turns), tokenizer, [3], IMAGE_TOKEN_INDEX)
        is_target = [label != IGNORE_INDEX for label in encoded.labels]
        for num_turns in range(1, len(turns), 2):
            segments = template.render(turns[:num_turns], add_generation_prompt=True)
            prompt = encode_prompt(segments, tokenizer, [3], IMAGE_TOKEN_INDEX)
            assert encoded.input_ids[: len(prompt)] == prompt, turns
            assert is_target[len(prompt)], turns
            assert not is_target[len(prompt) - 1] or name.endswith("plain"), turns


@pytest.mark.parametrize(
    ("name", "tokenizer_name", "end"), [("v1", "llama_new", "</s>"), ("chatml_direct", "byte_level", "<|im_end|>")]
)
def test_targets_decode_to_the_answer_with_its_end(tokenizers, name, tokenizer_name, end):
    rng = random.Random(0)
    tokenizer = tokenizers[tokenizer_name]
    for _ in range(50):
        answer = "A" + _random_text(rng)
        segments = conversation_template(name).render([Turn("user", _random_text(rng)), Turn("assistant", answer)])
        labels = encode_segments(segments, tokenizer, [], IMAGE_TOKEN_INDEX).labels
        targets = [label for label in labels if label != IGNORE_INDEX]
        assert tokenizer.decode(targets) == f"{answer}{end}"


def test_a_vocabulary_whose_user_is_one_piece_keeps_every_label(tmp_path):
    """LLaVA's arithmetic is right for LLaMA's vocabulary, where it is two, and masks whole conversations for others."""
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path))
    assert "\u2581USER" in tokenizer.get_vocab()
    answers = ["The triangle is yellow.", "hello there", "a red square"]
    turns = [turn for answer in answers for turn in (Turn("user", "Which colour?"), Turn("assistant", answer))]
    labels = encode_segments(conversation_template("v1").render(turns), tokenizer, [], IMAGE_TOKEN_INDEX).labels
    targets = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    assert [text.strip() for text in targets.split("</s>")] == [*answers, ""]


def test_an_image_takes_its_count_of_ignored_positions(tokenizer):
    segments = [Segment("<image>\nHi <image>", False), Segment(" yes <image></s>", True)]
    encoded = encode_segments(segments, tokenizer, [2, 3, 1], 777)
    assert [encoded.input_ids[start:end] for start, end in encoded.image_spans] == [[777] * 2, [777] * 3, [777]]
    assert encoded.input_ids.count(777) == 6
    assert 777 not in encoded.labels


def test_text_tokens_are_counted_without_images(tokenizers):
    texts = [text for text in TOKENIZER_IDS["strings"] if text]
    for tokenizer in tokenizers.values():
        num_images = [text.count("<image>") for text in texts]
        expected = [
            len(encode_prompt(text, tokenizer, [1] * count, IMAGE_TOKEN_INDEX)) - count
            for text, count in zip(texts, num_images, strict=True)
        ]
        assert count_text_tokens(texts, tokenizer) == expected


def test_marker_without_image_is_refused(tokenizer):
    with pytest.raises(UserError, match="the text has 2 <image> markers but 1 images"):
        encode_prompt("<image> and <image>", tokenizer, [4], IMAGE_TOKEN_INDEX)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_marker_without_images_is_spelled_out_though_it_is_a_token(legacy):
    text = " The tag <image> has <im_end> no <image>"
    known = llama_tokenizer(legacy=legacy, add_bos_token=True)
    known.add_tokens(["<image>", "<im_end>"], special_tokens=True)
    unknown = llama_tokenizer(legacy=legacy, add_bos_token=True)
    unknown.add_tokens(["<im_end>"], special_tokens=True)
    encoded = encode_segments([Segment(text, True)], known, None, IMAGE_TOKEN_INDEX)
    expected = encode_prompt(text, unknown, None, IMAGE_TOKEN_INDEX)
    later = known.convert_tokens_to_ids("<im_end>")
    assert encoded.input_ids == [later if at == unknown.convert_tokens_to_ids("<im_end>") else at for at in expected]
    assert encoded.labels[1:] == encoded.input_ids[1:]
    assert encode_prompt(text, known, [1, 1], IMAGE_TOKEN_INDEX).count(IMAGE_TOKEN_INDEX) == 2  # as ever after


def test_bos_is_left_to_a_template_that_writes_it(tokenizer):
    own, *rest = encode_prompt("<s>Hi", tokenizer, [], 777)
    assert own == tokenizer.bos_token_id == rest[0]
    assert encode_prompt("<s>Hi", tokenizer, [], 777, adds_bos=False) == rest
    assert count_text_tokens(["<s>Hi"], tokenizer, adds_bos=False) == [len(rest)]


def test_sentence_targets_are_those_of_a_hand_computation():
    """Header of 3, question of 4, answer of 2, question of 3; the rest is what the closing signal takes."""
    lengths, is_answer = [3, 4, 2, 3], [False, False, True, False]
    marks = "... ##.. aa ##. ss".replace(" ", "")
    assert sentence_targets(lengths, is_answer, 14) == [mark != "." for mark in marks]
    assert sentence_targets(lengths, is_answer, 5) == [mark != "." for mark in marks[:5]]


def test_tokenizer_without_offsets_is_refused(tokenizer):
    class SlowTokenizer:
        is_fast = False
        bos_token_id = None

        def __call__(self, text):
            return tokenizer(text)

    with pytest.raises(UserError, match="SlowTokenizer gives no character offsets"):
        encode_prompt("Hi", SlowTokenizer(), [], IMAGE_TOKEN_INDEX)


def test_segments_text_joins():
    assert segments_text([Segment("a", False), Segment("b", True)]) == "ab"
