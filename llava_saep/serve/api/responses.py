"""Answers in OpenAI's forms: a whole completion, or chunks as server-sent events."""

import dataclasses
import json
import secrets
import time
from typing import Any

from llava_saep.generation import AnswerStatistics, ModelDescription

_FINISH_REASONS = {"stop": "stop", "length": "length"}
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": waiting\n\n"
"""A comment, which clients skip."""


class CompletionForm:
    """The fields that all parts of one answer share."""

    def __init__(self, model_id: str):
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model_id = model_id

    def completion(self, text: str, statistics: AnswerStatistics, reason: str) -> dict[str, Any]:
        """The whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, **_ending(reason)}
        return self._common("chat.completion", [choice]) | {"usage": usage(statistics)}

    def chunk(self, delta: dict[str, str], *, reason: str | None = None) -> dict[str, Any]:
        """A piece of it, the last of which carries the reason of its end."""
        ending = {"finish_reason": None} if reason is None else _ending(reason)
        return self._common("chat.completion.chunk", [{"index": 0, "delta": delta, "logprobs": None, **ending}])

    def usage_chunk(self, statistics: AnswerStatistics) -> dict[str, Any]:
        """The chunk after the last, where usage is asked for."""
        return self._common("chat.completion.chunk", []) | {"usage": usage(statistics)}

    def _common(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model_id,
            "system_fingerprint": None,
            "choices": choices,
        }


def _ending(reason: str) -> dict[str, str]:
    """OpenAI's reason; one that it does not have is "length", and finish_details says which it is."""
    if reason in _FINISH_REASONS:
        return {"finish_reason": _FINISH_REASONS[reason]}
    return {"finish_reason": "length", "finish_details": reason}


def usage(statistics: AnswerStatistics) -> dict[str, Any]:
    """Tokens of prompt and answer."""
    return {
        "prompt_tokens": statistics.prompt_tokens,
        "completion_tokens": statistics.completion_tokens,
        "total_tokens": statistics.prompt_tokens + statistics.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": statistics.cached_tokens,
            "image_tokens": statistics.image_tokens,
        },
    }


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event, on one line: in ASCII there is nothing that any client takes for a line's end."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def model_card(description: ModelDescription, created: int) -> dict[str, Any]:
    """A model as /v1/models lists it."""
    return {
        "id": description.model_id,
        "object": "model",
        "created": created,
        "owned_by": "llava-saep",
        **{name: value for name, value in dataclasses.asdict(description).items() if name != "model_id"},
    }
