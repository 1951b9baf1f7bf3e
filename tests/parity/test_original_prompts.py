"""LLaVA's prompts: every scenario under every name, as `Conversation.get_prompt` of the original rendered it.

Rows are those of the table of LLaVA's surprises (prompts, 1 to 6): what is kept is equal, what is not has its row here.
"""

import pytest

from llava_saep.data.conversation import Turn, segments_text
from llava_saep.data.llava_conversation import conv_templates, default_conversation
from llava_saep.data.templates import TEMPLATE_NAMES, conversation_template

from .llava_reference import read_json

REFERENCE = read_json("prompts.json")
PROMPTS = REFERENCE["prompts"]
SCENARIOS = {scenario["name"]: scenario for scenario in REFERENCE["scenarios"]}


def _expected(name, scenario):
    prompts = PROMPTS[PROMPTS[name].get("alias_of", name)]
    return prompts[scenario]


def _prompt_of(entry):
    return entry["prompt"].replace("{v0_head}", REFERENCE["v0_head"])


def _conversation(name, scenario):
    conversation = conv_templates[name].copy()
    if scenario["system"] is not None:
        conversation.system = scenario["system"]
    for message in scenario["messages"]:
        content = (message["text"], None, "Pad") if message["tuple"] else message["text"]
        conversation.append_message(conversation.roles[message["role"]], content)
    return conversation


def _with_image_in_front(text):
    return "<image>\n" + text.replace("<image>", "").strip()


def _plain_by_hand(scenario):
    """Each text and a line break, an image tuple at the front of the first: what LLaVA's plain style is meant to be."""
    messages = [(message["text"], message["tuple"] and not at) for at, message in enumerate(scenario["messages"])]
    texts = [_with_image_in_front(text) if is_first_image else text for text, is_first_image in messages]
    return (scenario["system"] or "") + "".join(f"{text}\n" for text in texts if text)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_equal_llavas(name, scenario):
    expected = _expected(name, scenario)
    conversation = _conversation(name, SCENARIOS[scenario])
    if "prompt" in expected:
        assert conversation.get_prompt() == _prompt_of(expected)
    elif expected["error"] == "TypeError":  # row 3: LLaVA's plain style fails at any answer
        assert conversation.get_prompt() == _plain_by_hand(SCENARIOS[scenario])
    else:  # row 4
        assert expected["error"] == "AssertionError"
        with pytest.raises(ValueError, match="starts with a text of the user's"):
            conversation.get_prompt()


@pytest.mark.parametrize("name", REFERENCE["templates"])
def test_attributes_equal_llavas(name):
    expected, ours = REFERENCE["templates"][name], conv_templates[name]
    assert (ours.version, list(ours.roles), ours.sep_style.name) == (
        expected["version"],
        expected["roles"],
        expected["sep_style"],
    )
    assert (ours.sep, ours.sep2, ours.offset, ours.system) == tuple(
        expected[field] for field in ("sep", "sep2", "offset", "system")
    )
    assert ours.messages == expected.get("builtin_messages", [])


def test_every_name_is_a_template():
    assert set(PROMPTS) == set(REFERENCE["templates"]) == set(TEMPLATE_NAMES)


def test_default_conversation_is_llavas():
    names = [
        name for name, kept in REFERENCE["templates"].items() if REFERENCE["default_conversation"] in kept["variable"]
    ]
    assert names and all(conv_templates[name] == default_conversation for name in names)


def _renders_alike(name, scenario):
    """Whether templates are to render a scenario as LLaVA does: user and assistant in turn, with text, in a chat."""
    roles = [message["role"] for message in scenario["messages"]]
    texts = [message["text"] for message in scenario["messages"]]
    in_turn = roles == [at % 2 for at in range(len(roles))]  # else LLaVA closes turns by position; we by role
    has_text = "" not in texts and None not in texts[:-1] and (texts[-1:] != [None] or roles[-1] == 1)  # row 1
    # Row 5: only an image of the first message is put in front, which few-shot examples are; mmtag adds two turns.
    shows_images = not any(message["tuple"] for message in scenario["messages"][1:])
    if "mmtag" in name or conv_templates[name].offset:
        shows_images = not any(message["tuple"] for message in scenario["messages"])
    return in_turn and shows_images and has_text and not name.endswith("plain")


def _rendered_cases():
    for name in TEMPLATE_NAMES:
        for scenario in SCENARIOS.values():
            # What a user gives as the system prompt is only the text; LLaVA's attribute holds ChatML's header too.
            has_header = conv_templates[name].system.startswith("<|im_start|>") and scenario["system"] is not None
            if _renders_alike(name, scenario) and not has_header and "prompt" in _expected(name, scenario["name"]):
                yield pytest.param(name, scenario, id=f"{name}-{scenario['name']}")


@pytest.mark.parametrize(("name", "scenario"), list(_rendered_cases()))
def test_templates_render_llavas_prompts(name, scenario):
    is_open = bool(scenario["messages"]) and scenario["messages"][-1]["text"] is None
    messages = scenario["messages"][:-1] if is_open else scenario["messages"]
    texts = [_with_image_in_front(message["text"]) if message["tuple"] else message["text"] for message in messages]
    turns = [Turn(("user", "assistant")[at % 2], text) for at, text in enumerate(texts)]
    segments = conversation_template(name).render(turns, add_generation_prompt=is_open, system=scenario["system"])
    assert segments_text(segments) == _prompt_of(_expected(name, scenario["name"]))


def test_templates_render_most_scenarios():
    names = {case.values[0] for case in _rendered_cases()}
    assert names == {name for name in TEMPLATE_NAMES if not name.endswith("plain")}
