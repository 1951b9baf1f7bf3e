"""How an answer is decoded, and how an engine goes about it: the values that every front end hands on."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from llava_saep.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How an answer is decoded.

    Args:
        max_new_tokens: upper limit of an answer's length, in tokens.
        temperature: 0 decodes greedily; above, tokens are sampled.
        top_p: sample from the smallest set of tokens with this probability mass.
        num_beams: beams of a beam search (1: none).
        seed: makes sampling repeat itself, whatever else the program draws; None: it need not.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise UserError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.num_beams < 1:
            raise UserError(f"num_beams must be at least 1, got {self.num_beams}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed must lie between 0 and 2**63 - 1, got {self.seed}")

    def fitting(self, context_length: int | None) -> "GenerationOptions":
        """Halve the answer's limit until it leaves room for a prompt, for models with a short context (None: none)."""
        limit = self.max_new_tokens
        while context_length is not None and limit > context_length // 2:
            limit //= 2
        return dataclasses.replace(self, max_new_tokens=max(limit, 1))

    def to_generate_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of transformers' `generate`."""
        kwargs: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        if self.temperature > 0:
            return {**kwargs, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {**kwargs, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What an engine keeps between answers, and how its model runs.

    Args:
        max_conversations: key-value caches of so many conversations are kept, to go on from; 0: every question is read
            from its first token. (A static cache holds one, or none with 0.)
        max_cache_bytes: of those caches together.
        max_image_bytes: of the language model's tokens of images seen lately.
        cache: "dynamic" grows with a conversation; "static" has the length of the model's context from the start,
            as compiled code wants it.
        compile: compile the model's decoding step, which takes a minute or so when the engine is made.
        max_length: of a static cache, in tokens; None: the model's context.
    """

    max_conversations: int = 4
    max_cache_bytes: int = 2 * 2**30
    max_image_bytes: int = 2**28
    cache: Literal["dynamic", "static"] = "dynamic"
    compile: bool = False
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_conversations", "max_cache_bytes", "max_image_bytes"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.cache not in ("dynamic", "static"):
            raise UserError(f"cache must be dynamic or static, got {self.cache!r}")
        if self.compile and self.cache != "static":
            raise UserError(
                "compiled decoding needs a cache of a fixed length: it needs --kv-cache static (cache='static')"
            )
        if self.max_length is not None and self.cache != "static":
            raise UserError("max_length is the length of a static cache; a dynamic one grows as it must")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length must be at least 2, got {self.max_length}")
