"""Multiple choice by letter: wording, labels, and reading the letter from an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llava_saep.errors import UserError

LETTERS = "ABCDEFGH"

# Not a letter and a space: "A dog" is no A.
_LEADING_LETTER = re.compile(r"\(?([A-H])(?:[).:,\n]|$)")
_STATED_LETTER = re.compile(r"(?i:answer is):?\s*\(?([A-H])(?:[).:,\n]|$)")


def list_options(question: str, options: Sequence[str]) -> str:
    """The question with a line `A. option` per option below, as LLaVA writes it."""
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))])


def read_letter(text: str, options: Sequence[str]) -> str | None:
    """The option that an answer names: by its letter first, or `the answer is X`, or in exactly the option's words.

    Returns:
        the letter, or None when the answer names none of the options, or one that is not offered.
    """
    text = text.strip()
    stated = _LEADING_LETTER.match(text) or _STATED_LETTER.search(text)
    offered = LETTERS[: len(options)]
    if stated is not None and stated.group(1) in offered:
        return stated.group(1)
    words = [_plain(option) for option in options]
    return offered[words.index(_plain(text))] if _plain(text) in words else None


def check_letter_labels(labels: Mapping[int | str, str | None], letters: Sequence[str], place: str) -> None:
    """Refuse labels that no answer can equal: they would make every answer to their questions wrong.

    Args:
        labels: the right answer by the question's id.
        place: names the file they come from.
    Raises:
        UserError: a label is none of the letters.
    """
    wrong = [id_ for id_, label in labels.items() if label not in letters]
    if wrong:
        raise UserError(
            f"{place}: labels that are none of {', '.join(letters)}: {len(wrong)}, the first one that of question "
            f"{wrong[0]!r}: {labels[wrong[0]]!r}"
        )


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()
