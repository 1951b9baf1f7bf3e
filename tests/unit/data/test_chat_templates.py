"""A tokenizer's own chat template: ids as transformers renders them, and the answers, and only they, are targets."""

import copy
import pickle

import pytest

from llava_saep.constants import IGNORE_INDEX
from llava_saep.data.chat_template import CHAT_TEMPLATE
from llava_saep.data.conversation import Turn, segments_text
from llava_saep.data.jinja_form import jinja_form
from llava_saep.data.records import BadSampleError
from llava_saep.data.templates import conversation_template
from llava_saep.data.tokenization import encode_prompt, encode_segments
from llava_saep.errors import UserError
from tests.fixtures.chat_templates import FAMILIES, make_tokenizer

from .conftest import IMAGE_TOKEN_ID

QUESTIONS = ("<image>\nWhat is it?", "  Sure, or not? ", "Why")
ANSWERS = ("A cat.", "Yes: it has\n\nwhiskers.", "図 <b>ü</b> 😀")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def chat_tokenizer(family):
    return make_tokenizer(family)


@pytest.fixture(scope="module")
def template(chat_tokenizer):
    return conversation_template(CHAT_TEMPLATE, chat_tokenizer)


def _turns(num_rounds, answers=ANSWERS):
    rounds = list(zip(QUESTIONS, answers, strict=True))[:num_rounds]
    return [Turn(*turn) for question, answer in rounds for turn in (("user", question), ("assistant", answer))]


def _ids(tokenizer, turns, system=None, **options):
    """What transformers makes of the conversation, an image being one token."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": turn.role, "content": turn.text} for turn in turns]
    return tokenizer.apply_chat_template(messages, enable_thinking=False, return_dict=False, **options)


def _encode(template, tokenizer, turns, system=None):
    segments = template.render_training(turns, system)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    return encode_segments(segments, tokenizer, [1], image_id, adds_bos=template.adds_bos)


def _target_spans(labels):
    """[start, end) of each run of targets."""
    is_target = [False, *(label != IGNORE_INDEX for label in labels), False]
    edges = [at for at in range(1, len(is_target)) if is_target[at] != is_target[at - 1]]
    return [(start - 1, end - 1) for start, end in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("num_rounds", [1, 2, 3])
def test_ids_are_those_of_transformers(template, chat_tokenizer, num_rounds):
    turns = _turns(num_rounds)
    assert _encode(template, chat_tokenizer, turns).input_ids == _ids(chat_tokenizer, turns)


@pytest.mark.parametrize("num_rounds", [1, 2, 3])
def test_each_answer_with_its_end_is_a_target(template, chat_tokenizer, family, num_rounds):
    labels = _encode(template, chat_tokenizer, _turns(num_rounds)).labels
    texts = [chat_tokenizer.decode(labels[start:end]) for start, end in _target_spans(labels)]
    lead = {"mistral": " ", "smollm3": "<think>\n\n</think>\n"}.get(family, "")
    assert texts == [f"{lead}{answer}{FAMILIES[family].end}" for answer in ANSWERS[:num_rounds]]


def test_targets_start_where_the_generation_prompt_ends(template, chat_tokenizer, family):
    """Rendered turn by turn and compared token by token; Qwen3 takes the thinking block out of earlier answers."""
    turns = _turns(3)
    encoded = _encode(template, chat_tokenizer, turns)
    spans = _target_spans(encoded.labels)
    for position, (start, _) in enumerate(spans):
        prompt = _ids(chat_tokenizer, turns[: 2 * position + 1], add_generation_prompt=True)
        if family == "qwen3" and position < 2:
            thinking = chat_tokenizer("<think>\n\n</think>\n\n").input_ids
            assert prompt[-len(thinking) :] == thinking
            prompt = prompt[: -len(thinking)]
        assert encoded.input_ids[:start] == prompt


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_the_model_is_asked_as_it_was_trained(template, chat_tokenizer, num_rounds):
    """Our generation prompt is both transformers' and the beginning of the training text up to the last answer."""
    turns = _turns(num_rounds)
    segments = template.render(turns[:-1], add_generation_prompt=True)
    image_id = chat_tokenizer.convert_tokens_to_ids("<image>")
    prompt = encode_prompt(segments, chat_tokenizer, [1], image_id, adds_bos=template.adds_bos)
    assert prompt == _ids(chat_tokenizer, turns[:-1], add_generation_prompt=True)
    encoded = _encode(template, chat_tokenizer, turns)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert _target_spans(encoded.labels)[-1][0] == len(prompt)


def test_answers_are_stripped_as_the_template_does(template, chat_tokenizer, family):
    turns = _turns(2, ["  A cat. \n", " Yes. ", ""])
    encoded = _encode(template, chat_tokenizer, turns)
    assert encoded.input_ids == _ids(chat_tokenizer, turns)
    first = chat_tokenizer.decode(encoded.labels[slice(*_target_spans(encoded.labels)[0])])
    kept = "A cat." if FAMILIES[family].strips else "  A cat. \n"
    assert first.endswith(f"{kept}{FAMILIES[family].end}")


def test_system_prompts_are_rendered_or_refused(template, chat_tokenizer, family):
    turns = _turns(1)
    assert template.takes_system == FAMILIES[family].takes_system
    if not FAMILIES[family].takes_system:
        with pytest.raises(UserError, match="chat template refuses this conversation: .*[Ss]ystem|Only user and"):
            template.render_training(turns, "Be brief.")
        return
    encoded = _encode(template, chat_tokenizer, turns, "Be brief.")
    assert encoded.input_ids == _ids(chat_tokenizer, turns, "Be brief.")
    assert "Be brief." in chat_tokenizer.decode(encoded.input_ids)
    assert FAMILIES[family].default_system is None or FAMILIES[family].default_system not in chat_tokenizer.decode(
        encoded.input_ids
    )
    assert len(_target_spans(encoded.labels)) == 1


def test_default_system_message_is_no_target(template, chat_tokenizer, family):
    encoded = _encode(template, chat_tokenizer, _turns(1))
    default = FAMILIES[family].default_system
    assert default is None or default in chat_tokenizer.decode(encoded.input_ids)
    (span,) = _target_spans(encoded.labels)
    assert default is None or default not in chat_tokenizer.decode(encoded.labels[slice(*span)])


def test_answers_stop_at_the_end_of_turn_token(template, family):
    assert template.stop_strings == (FAMILIES[family].end,)


def test_text_that_looks_like_an_answer_is_none(template, chat_tokenizer):
    """Questions that repeat an answer, or hold the template's own words, shift nothing."""
    question = f"<image>\n{ANSWERS[0]} assistant\n{ANSWERS[0]}"
    turns = [Turn("user", question), Turn("assistant", ANSWERS[0])]
    encoded = _encode(template, chat_tokenizer, turns)
    assert encoded.input_ids == _ids(chat_tokenizer, turns)
    (span,) = _target_spans(encoded.labels)
    assert span[0] == len(_ids(chat_tokenizer, turns[:1], add_generation_prompt=True))


def test_turns_that_do_not_alternate_are_refused_in_the_templates_words():
    tokenizer = make_tokenizer("gemma")
    template = conversation_template(CHAT_TEMPLATE, tokenizer)
    with pytest.raises(UserError, match="roles must alternate"):
        template.render_training([Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")])


def test_an_answer_that_the_template_rewrites_is_refused():
    template = conversation_template(CHAT_TEMPLATE, make_tokenizer("qwen3"))
    with pytest.raises(UserError, match="rewrites an answer"):
        template.render_training([Turn("user", "a"), Turn("assistant", "<think>\nhm\n</think>\n\nb")])


def test_generation_prompt_after_an_answer_is_refused(template):
    with pytest.raises(UserError, match="ends with an answer"):
        template.render(_turns(1), add_generation_prompt=True)


def test_templates_reach_worker_processes(template):
    assert pickle.loads(pickle.dumps(template)).render(_turns(1)) == template.render(_turns(1))


def _with_template(chat_template):
    tokenizer = make_tokenizer("qwen2.5")
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (jinja_form("plain"), "has no chat template but that of an earlier run's --version"),
        (jinja_form("v1_mmtag"), "has no chat template but that of an earlier run's --version"),
        (None, "has no chat template; name one of LLaVA's templates instead, such as --version v1"),
        ({"default": "a", "tool_use": "b"}, "has several chat templates"),
        ("{% for message in messages %}{{ message['content'] }}{% endfor %}", "nothing after an answer"),
        ("{{ messages[0]['content'] }}<|im_end|>", "does not write answer 1 of this conversation exactly once"),
        ("{% for message in messages %}", "refuses this conversation: "),
    ],
)
def test_template_that_cannot_be_trained_with_is_refused(chat_template, message):
    with pytest.raises(UserError, match=message):
        conversation_template(CHAT_TEMPLATE, _with_template(chat_template))


def test_a_template_that_writes_the_time_is_rendered_again(monkeypatch):
    template = conversation_template(CHAT_TEMPLATE, make_tokenizer("phi-4"))
    render, days = type(template.tokenizer).apply_chat_template, iter(["1", "2", "2", "2"])

    def rendered(tokenizer, *args, **kwargs):
        return next(days) + render(tokenizer, *args, **kwargs)

    monkeypatch.setattr(type(template.tokenizer), "apply_chat_template", rendered)
    assert segments_text(template.render_training(_turns(1))).startswith("2")


def test_messages_with_image_parts_render_as_text_does(chat_tokenizer, family):
    flattening = copy.deepcopy(chat_tokenizer)
    flattening.chat_template = jinja_form(CHAT_TEMPLATE, chat_tokenizer.chat_template)
    assert jinja_form(CHAT_TEMPLATE, flattening.chat_template) == flattening.chat_template
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}]
    options = {"add_generation_prompt": True, "tokenize": False}
    expected = chat_tokenizer.apply_chat_template(
        [{"role": "user", "content": "<image>\nWhat?"}], enable_thinking=False, **options
    )
    assert flattening.apply_chat_template(messages, **options) == expected


def test_a_data_set_names_and_counts_what_the_template_refuses(make_dataset):
    tokenizer = make_tokenizer("gemma")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    good = {"id": "good", "image": "red.png", "conversations": turns}
    bad = {"id": "bad", "image": "red.png", "conversations": [{"from": "system", "value": "Be brief."}, *turns]}
    with pytest.raises(BadSampleError, match=r"sample 1 \(id 'bad'\): .*System role not supported"):
        make_dataset([good, bad], CHAT_TEMPLATE, tokenizer=tokenizer)
    dataset = make_dataset([good, bad], CHAT_TEMPLATE, tokenizer=tokenizer, on_bad_sample="skip")
    assert dataset.skipped == {"refused by the template": 1}
    sample = dataset[0]
    assert (sample["input_ids"] == IMAGE_TOKEN_ID).sum() == 16
    assert dataset.lengths == [len(sample["input_ids"])]
    assert tokenizer.decode(sample["labels"][sample["labels"] != IGNORE_INDEX]) == "A cat.<end_of_turn>"
