"""The Jinja form of every template writes what the template renders."""

import pytest

from llava_saep.data.conversation import Turn, segments_text
from llava_saep.data.jinja_form import jinja_form
from llava_saep.data.templates import TEMPLATE_NAMES, conversation_template
from tests.fixtures.chat_templates import make_tokenizer

TURNS = [
    Turn("user", '<image>\nIs it "red"?\\n {{ x }}'),
    Turn("assistant", "Yes: {% it %} is\nred 図."),
    Turn("user", "  Sure? "),
    Turn("assistant", "No."),
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("phi-4")


def _rendered(tokenizer, name, turns, system=None, **options):
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": turn.role, "content": turn.text} for turn in turns]
    tokenizer.chat_template = jinja_form(name)
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("num_turns", [1, 2, 3, 4])
@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_jinja_writes_what_the_template_renders(tokenizer, name, num_turns, system):
    template, turns, is_open = conversation_template(name), TURNS[:num_turns], num_turns % 2 == 1
    expected = segments_text(template.render(turns, add_generation_prompt=is_open, system=system))
    assert _rendered(tokenizer, name, turns, system, add_generation_prompt=is_open) == expected


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_image_parts_become_the_templates_markers(tokenizer, name):
    template = conversation_template(name)
    tokenizer.chat_template = jinja_form(name)
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    text = f"{template.image_marker}\n" * 2 + "Which?"
    assert rendered == segments_text(template.render([Turn("user", text)]))
