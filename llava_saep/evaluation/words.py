"""Texts as the scoring compares them: words, without case and punctuation."""

import re

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def normalized_words(text: str) -> list[str]:
    """Lower-case words of a text, without punctuation: `"Yes , Top-Left."` -> `["yes", "top-left"]`."""
    return _WORD.findall(text.casefold())
