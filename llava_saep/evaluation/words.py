"""Texts as the scoring compares them: words, without case and punctuation; and texts that files can hold."""

import re

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def encodable(text: str) -> str:
    """A text with U+FFFD for each half of a surrogate pair, which JSON can escape and UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def normalized_words(text: str) -> list[str]:
    """Lower-case words of a text, without punctuation: `"Yes , Top-Left."` -> `["yes", "top-left"]`."""
    return _WORD.findall(text.casefold())
