"""Templates render what LLaVA's conversations render."""

import pickle

import pytest

from llava_saep.data.conversation import Turn, place_image_markers, segments_text
from llava_saep.data.templates import TEMPLATE_NAMES, conversation_template
from llava_saep.errors import UserError


def test_plain_keeps_only_markers_and_captions():
    segments = conversation_template("plain").render([Turn("user", "What? <image>"), Turn("assistant", "A cat.")])
    assert segments == [("<image>", False), ("A cat.\n", True)]


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_generation_prompt_is_what_training_shows_before_the_answer(name):
    turns = [Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."), Turn("user", "Sure?")]
    template = conversation_template(name)
    prompt = segments_text(template.render(turns, add_generation_prompt=True))
    training = template.render([*turns, Turn("assistant", "Yes.")])
    assert training[-1].is_target
    assert prompt == segments_text(training[:-1])
    assert not any(segment.is_target for segment in template.render(turns[:1], add_generation_prompt=True))


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_answers_end_with_a_stop_string(name):
    template = conversation_template(name)
    answer = template.render([Turn("user", "<image>"), Turn("assistant", "Yes.")])[-1].text
    assert answer.endswith(template.stop_strings)


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_templates_reach_worker_processes(name):
    template = conversation_template(name)
    turns = [Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat.")]
    assert pickle.loads(pickle.dumps(template)).render(turns) == template.render(turns)


def test_v0_trains_on_its_signals_and_prompts_without():
    """LLaVA's preprocess_v0 and its get_prompt write different texts; released models saw both."""
    turns = [Turn("user", "What?"), Turn("assistant", "A cat.")]
    template = conversation_template("llava_v0")
    training = segments_text(template.render_training(turns, system="Be kind."))
    assert training == "Be kind.\n\n### Human: What?\n### Assistant: A cat.\n### "
    prompt = segments_text(template.render(turns[:1], add_generation_prompt=True, system="Be kind."))
    assert prompt == "Be kind.###Human: What?###Assistant:"


def test_chatml_wraps_a_system_prompt():
    segments = conversation_template("mpt").render([Turn("user", "Hi")], system="Be kind.")
    assert segments_text(segments) == "<|im_start|>system\nBe kind.<|im_end|><|im_start|>user\nHi<|im_end|>"


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="unknown conversation template 'vicuna-v1'. Did you mean 'vicuna_v1'.*llama_2"):
        conversation_template("vicuna-v1")


def test_llama_2_refuses_turns_that_do_not_alternate():
    with pytest.raises(UserError, match="turn 2 is the user's, but this template needs the assistant's"):
        conversation_template("llama_2").render([Turn("user", "a"), Turn("user", "b")])


def test_generation_prompt_after_an_answer_is_refused():
    with pytest.raises(UserError, match="ends with an answer"):
        conversation_template("v1").render([Turn("user", "a"), Turn("assistant", "b")], add_generation_prompt=True)


@pytest.mark.parametrize(
    ("text", "placed"),
    [
        ("no marker ", "no marker "),
        ("What is it?\n<image>", "<image>\nWhat is it?"),
        ("  <image>  \n What? ", "<image>\nWhat?"),
        ("<image>", "<image>"),
        ("<image>\n<image>\nCompare.", "<image>\n<image>\nCompare."),
    ],
)
def test_a_lone_marker_moves_to_the_front(text, placed):
    assert place_image_markers(text) == placed


def test_markers_can_be_wrapped():
    assert place_image_markers("Hi <image>", use_im_start_end=True) == "<im_start><image><im_end>\nHi"
