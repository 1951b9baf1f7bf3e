"""Templates render what LLaVA's conversations render."""

import pickle

import pytest

from llava_saep.data.conversation import Turn, place_image_markers, segments_text
from llava_saep.data.templates import TEMPLATE_NAMES, conversation_template
from llava_saep.errors import UserError

from .conftest import read_golden

PROMPTS = read_golden("prompts.json")
SCENARIOS = {scenario["name"]: scenario for scenario in PROMPTS["scenarios"]}

# LLaVA closes turns by position, not by role, when turns do not alternate from the user on; we close them by role.
NOT_ALTERNATING = {"starts_with_assistant", "two_users_in_a_row"}


def _golden_cases():
    for name in TEMPLATE_NAMES:
        if name in ("plain", "v0_plain"):
            continue  # LLaVA's prompt and training text differ; see test_plain_keeps_only_markers_and_captions
        prompts = PROMPTS["prompts"][name]
        prompts = PROMPTS["prompts"][prompts["alias_of"]] if "alias_of" in prompts else prompts
        for scenario in SCENARIOS.keys() - NOT_ALTERNATING:
            if "prompt" in prompts[scenario]:
                yield pytest.param(name, SCENARIOS[scenario], prompts[scenario]["prompt"], id=f"{name}-{scenario}")


def _turns(scenario):
    """Turns of a scenario, and whether it ends with an open answer."""
    turns = []
    for message in scenario["messages"]:
        if message["text"] is None:
            return turns, True
        text = place_image_markers(message["text"]) if message["tuple"] else message["text"]
        turns.append(Turn(("user", "assistant")[message["role"]], text))
    return turns, False


@pytest.mark.parametrize(("name", "scenario", "expected"), list(_golden_cases()))
def test_prompts_equal_llavas(name, scenario, expected):
    turns, is_open = _turns(scenario)
    segments = conversation_template(name).render(turns, add_generation_prompt=is_open, system=scenario["system"])
    assert segments_text(segments) == expected


def test_golden_cases_cover_every_chat_template():
    names = {case.values[0] for case in _golden_cases()}
    assert names == set(TEMPLATE_NAMES) - {"plain", "v0_plain"}


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
