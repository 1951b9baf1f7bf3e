"""What users type stays text: no turn ends, no image appears, and the tokens are those of the characters."""

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava_saep.constants import IGNORE_INDEX
from llava_saep.data.chat_template import ChatTemplate
from llava_saep.data.conversation import Segment, Turn
from llava_saep.data.spelling import as_typed, control_tokens, is_spelled_out, spell_out
from llava_saep.data.templates import conversation_template
from llava_saep.data.tokenization import encode_prompt, encode_segments
from tests.fixtures.chat_templates import FAMILIES, make_tokenizer

from .conftest import GOLDEN, llama_tokenizer

IMAGE_ID = 777_000
TYPED = "see </s> and <s>now</s> <unk> or <image>\n</s>"


def own_ids(text, tokenizer, counts=()):
    return encode_prompt([Segment(spell_out(text, tokenizer), False)], tokenizer, list(counts), IMAGE_ID)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("text", [TYPED, " </s>", "</s>", "a</s>b  </s>"])
def test_control_tokens_of_llama_are_spelled_as_sentencepiece_spells_them(legacy, text):
    """SentencePiece itself never makes a control token of a text."""
    tokenizer = llama_tokenizer(legacy=legacy, add_bos_token=True)
    original = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "tokenizers" / "tokenizer.model"))
    bos, *ids = own_ids(text, tokenizer)
    assert bos == tokenizer.bos_token_id
    assert ids == original.encode(text)


def test_templates_own_control_tokens_stay_what_they_are():
    tokenizer = llama_tokenizer(legacy=False, add_bos_token=True)
    template = conversation_template("v1")
    turns = [Turn("user", "Hi </s> you"), Turn("assistant", "So </s>."), Turn("user", "<image>\nWhat is <s>?")]
    disguised = [turn._replace(text=spell_out(turn.text.removeprefix("<image>"), tokenizer)) for turn in turns]
    disguised[2] = disguised[2]._replace(text="<image>" + disguised[2].text)
    ids = encode_prompt(template.render(disguised, add_generation_prompt=True), tokenizer, [3], IMAGE_ID)
    assert ids.count(tokenizer.eos_token_id) == 1  # the answer's end
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(IMAGE_ID) == 3
    before = ids[: ids.index(tokenizer.eos_token_id)]
    assert tokenizer.decode(before, skip_special_tokens=True).endswith("USER: Hi </s> you ASSISTANT: So </s>.")


def test_targets_are_the_answers_where_users_type_control_tokens():
    tokenizer = llama_tokenizer(legacy=False, add_bos_token=True)
    turns = [
        Turn("user", "Hi </s>"),
        Turn("assistant", "So </s> it is."),
        Turn("user", "<s>"),
        Turn("assistant", "No."),
    ]
    disguised = [turn._replace(text=spell_out(turn.text, tokenizer)) for turn in turns]
    encoded = encode_segments(conversation_template("v1").render(disguised), tokenizer, [], IMAGE_ID)
    targets = [index for index in encoded.labels if index != IGNORE_INDEX]
    assert tokenizer.decode(targets) == "So </s> it is.</s> No.</s>"
    assert targets.count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_nobody_ends_a_turn_of_a_chat_template(family):
    tokenizer = make_tokenizer(family)
    template = ChatTemplate.from_tokenizer(tokenizer)
    special = sorted(control_tokens(tokenizer))
    typed = "a".join(special) + " b"

    def controls(text):
        segments = template.render([Turn("user", text)], add_generation_prompt=True)
        ids = encode_prompt(segments, tokenizer, [], IMAGE_ID, adds_bos=False)
        return [index for index in ids if index in tokenizer.added_tokens_decoder], tokenizer.decode(ids)

    expected, _ = controls("harmless")
    found, text = controls(spell_out(typed, tokenizer))
    assert found == expected
    assert typed.replace(" ", "") in text.replace(" ", "")


def test_text_without_control_tokens_is_left_alone():
    tokenizer = llama_tokenizer(legacy=False, add_bos_token=True)
    for text in ("", "Why?", "<b>a</b>", "< s>", "[[00:11]]"):
        assert spell_out(text, tokenizer) == text
        assert not is_spelled_out(text)


def test_disguise_comes_off():
    tokenizer = llama_tokenizer(legacy=False, add_bos_token=True)
    assert spell_out(TYPED, tokenizer) != TYPED
    assert as_typed(spell_out(TYPED, tokenizer)) == TYPED


def test_full_width_characters_make_no_control_token():
    """Where normalisation turns them into one that the vocabulary itself holds."""
    pieces = {"</s>": 0, "<": 1, "/": 2, "s": 3, ">": 4, "<unk>": 5}
    backend = Tokenizer(models.BPE(pieces, [("<", "/"), ("</", "s"), ("</s", ">")][:0], unk_token="<unk>"))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.add_tokens(["</s>"], special_tokens=True)
    for text in ("\uff1c/s\uff1e", "</s>"):
        assert own_ids(text, tokenizer) == [1, 2, 3, 4]
    assert encode_prompt("</s>", tokenizer, [], IMAGE_ID) == [0]


def test_vocabulary_that_holds_the_token_as_a_piece_spells_it_too():
    """Unigram finds "</s>" among its pieces even where it is no added token any more."""
    pieces = [("<unk>", 0.0), ("</s>", -1.0), ("<", -3.0), ("/", -3.0), ("s", -3.0), (">", -3.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert own_ids("s</s>s", tokenizer) == [4, 2, 3, 4, 5, 4]
