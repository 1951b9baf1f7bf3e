"""How a conversation is shown: which numbers, and how texts and paths are made harmless."""

import html
import re

import pytest

from llava_saep.serve.demo.rows import for_chatbot, statistics_line
from llava_saep.serve.demo.text import without_paths

STATISTICS = {
    "prompt_tokens": 1200,
    "image_tokens": 576,
    "cached_tokens": 0,
    "completion_tokens": 10,
    "finish_reason": "stop",
    "waiting_seconds": 0.0,
    "first_token_seconds": 0.25,
    "seconds": 1.15,
    "tokens_per_second": 10.0,
}


def test_numbers_that_are_unknown_or_nothing_are_left_out():
    line = "576 image tokens of 1,200 · 10 written · first after 0.25 s · 10.0 tokens/s"
    assert statistics_line(STATISTICS) == line
    without_counts = STATISTICS | {"prompt_tokens": 0, "image_tokens": 0, "finish_reason": "cancelled"}
    assert statistics_line(without_counts) == "10 written · first after 0.25 s · 10.0 tokens/s · stopped"


@pytest.mark.parametrize(
    "text", ["<b>", "a<b", "</p>", "<!--", "<?php", "&lt;", "&amp;lt;", "&#60;b&#62;", "&ltb", "3 < 4"]
)
def test_a_browser_shows_an_escaped_text_as_it_was(text):
    escaped = for_chatbot(text)
    assert not re.search(r"<[a-zA-Z/!?]", escaped)
    assert html.unescape(escaped) == text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/srv/models/a/config.json lacks 'x'", "config.json lacks 'x'"),
        ("'/srv/my models/a' is none", "'my models/a' is none"),
        ("weights in /srv/models/one cannot be read", "weights in one cannot be read"),
        ("and/or 3/4, http://host/path/x", "and/or 3/4, http://host/path/x"),
    ],
)
def test_of_a_path_its_last_part_is_told(text, left):
    assert without_paths(text) == left
