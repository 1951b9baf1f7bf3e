"""A conversation as rows of Gradio's chatbot, which shows text as it stands (see `page.py` for how that is ensured)."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from llava_saep.errors import UserError
from llava_saep.serve.demo.conversation import ChatMessage, Conversation
from llava_saep.serve.demo.pictures import PictureStore

_BEGINS_ENTITY = re.compile(r"&(?=[#A-Za-z])")
_BEGINS_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_OPINIONS = {None: None, True: "Like", False: "Dislike"}
_REASONS = {
    "length": "cut off at the length that was asked for",
    "cancelled": "stopped",
    "time_limit": "cut off at the time limit",
}


class ChatRows(NamedTuple):
    """Rows of the chatbot, and for each the place of its message in the conversation."""

    rows: list[dict[str, Any]]
    places: list[int]
    opinions: list[str | None]


def chat_rows(conversation: Conversation, pictures: PictureStore, unfinished: str | None = None) -> ChatRows:
    """Show a conversation.

    Args:
        unfinished: an answer that is being written, as far as it has come ("": it has not begun).
    """
    rows: list[dict[str, Any]] = []
    places: list[int] = []
    opinions: list[str | None] = []
    for index, message in enumerate(conversation.messages):
        own = _question_rows(message, pictures) if message.role == "user" else _answer_rows(message)
        rows += own
        places += [index] * len(own)
        if message.role == "assistant":
            opinions += [_OPINIONS[message.liked]] * len(own)
    if unfinished is not None:
        rows.append({"role": "assistant", "content": [_text(unfinished or "…")]})
        places.append(len(conversation.messages))
        opinions.append(None)
    return ChatRows(rows, places, opinions)


def statistics_line(statistics: Mapping[str, Any]) -> str:
    """The numbers under an answer, on one line."""
    parts = []
    if statistics["image_tokens"]:
        parts.append(f"{statistics['image_tokens']:,} image tokens of {statistics['prompt_tokens']:,}")
    elif statistics["prompt_tokens"]:  # 0: a server's count of them did not come
        parts.append(f"{statistics['prompt_tokens']:,} prompt tokens")
    if statistics["cached_tokens"]:
        parts.append(f"{statistics['cached_tokens']:,} re-used")
    parts.append(f"{statistics['completion_tokens']:,} written")
    parts.append(f"first after {statistics['first_token_seconds']:.2f} s")
    if statistics["completion_tokens"] > 1 and statistics["tokens_per_second"]:
        parts.append(f"{statistics['tokens_per_second']:.1f} tokens/s")
    if statistics["waiting_seconds"] >= 0.1:
        parts.append(f"waited {statistics['waiting_seconds']:.1f} s")
    if statistics["finish_reason"] in _REASONS:
        parts.append(_REASONS[statistics["finish_reason"]])
    return " · ".join(parts)


def _question_rows(message: ChatMessage, pictures: PictureStore) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for name in message.pictures:
        try:
            parts.append({"path": str(pictures.preview(name)), "alt_text": "picture of the question"})
        except UserError:
            parts.append(_text("[this picture cannot be shown any more]"))
    if message.text:
        parts.append(_text(message.text))
    return [{"role": "user", "content": parts}]


def _answer_rows(message: ChatMessage) -> list[dict[str, Any]]:
    rows = [{"role": "assistant", "content": [_text(message.text or "(no text)")]}]
    if message.statistics:
        line = statistics_line(message.statistics)
        rows.append({"role": "assistant", "content": [_text(line)]})
    return rows


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": for_chatbot(text)}


def for_chatbot(text: str) -> str:
    """Escape what the chatbot would take for a tag or an entity; it renders HTML even where it renders no Markdown.

    Nothing else is escaped, since copying shows the text as it is here.
    """
    return _BEGINS_TAG.sub("&lt;", _BEGINS_ENTITY.sub("&amp;", text))
