"""`llava-saep chat`: talk in the terminal with a saved model."""

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Hand over to the terminal chat, which has its own flags."""
    from llava_saep.serve import chat

    return chat.main(list(argv)) or 0
