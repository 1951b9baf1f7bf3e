"""What a client may ask for: one set of limits for the web page and the HTTP interface, each of them a flag.

Whoever reaches a server may send it anything; each limit bounds memory, time or the model's attention that one of them
can take. Messages of what is refused name the limit and never a path.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from llava_saep.errors import UserError
from llava_saep.program import AbbreviatingParser


def _limit(default: float, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper limits of images, prompts, requests and answers. Sizes in bytes count 10**6 to the megabyte."""

    max_image_bytes: int = _limit(20_000_000, "bytes of an image file")
    max_image_pixels: int = _limit(50_000_000, "pixels of an image, known before it is decoded")
    max_pixels_in_memory: int = _limit(400_000_000, "pixels of all images of questions that wait or are answered")
    max_images_per_message: int = _limit(8, "images that one message may show")
    max_images: int = _limit(16, "images of a whole conversation")
    max_prompt_characters: int = _limit(32_000, "characters of all messages of a conversation together")
    max_messages: int = _limit(100, "messages of a conversation")
    max_request_bytes: int = _limit(64_000_000, "bytes of a request's body, images included")
    max_queue: int = _limit(16, "questions that may wait for the model; more are refused")
    max_requests_per_minute: int = _limit(60, "questions of one client within a minute")
    max_new_tokens: int = _limit(2048, "tokens of an answer")
    max_generation_seconds: float = _limit(120.0, "seconds that the model may work on an answer; it is cut off then")

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            least = 0 if limit.name == "max_queue" else 1
            # Not `value < least`: that is false of a NaN.
            if not value >= least:
                raise UserError(f"{_flag(limit.name)} must be at least {least}, got {value}")


def add_limit_flags(parser: AbbreviatingParser) -> None:
    """Give a parser one flag per limit."""
    group = parser.add_argument_group("limits of what a client may ask for")
    for limit in fields(Limits):
        spellings = dict.fromkeys((_flag(limit.name), f"--{limit.name}"))
        text = f"{limit.metadata['help']} (default: {limit.default:,})"
        group.add_argument(*spellings, type=type(limit.default), default=limit.default, help=text)


def limits_from(args: argparse.Namespace) -> Limits:
    """Read what `add_limit_flags` has added.

    Raises:
        UserError: a limit is zero or below.
    """
    return Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})


def check_conversation(messages: Sequence[Mapping[str, Any]], limits: Limits) -> None:
    """Check the sizes of a conversation whose messages are well-formed.

    Args:
        messages: with content that is text or a list of parts; a part that has no "text" is an image.
    Raises:
        UserError: too many messages, images or characters.
    """
    if len(messages) > limits.max_messages:
        raise UserError(f"the conversation has {len(messages)} messages, at most {limits.max_messages} are allowed")
    images = [_count_images(message["content"]) for message in messages]
    for index, count in enumerate(images):
        if count > limits.max_images_per_message:
            raise UserError(
                f"message {index} has {count} images, at most {limits.max_images_per_message} are allowed in a message"
            )
    if sum(images) > limits.max_images:
        raise UserError(f"the conversation has {sum(images)} images, at most {limits.max_images} are allowed")
    characters = sum(_count_characters(message["content"]) for message in messages)
    if characters > limits.max_prompt_characters:
        raise UserError(
            f"the conversation has {characters:,} characters, at most {limits.max_prompt_characters:,} are allowed"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _count_images(content: str | Sequence[Mapping[str, Any]]) -> int:
    return 0 if isinstance(content, str) else sum("text" not in part for part in content)


def _count_characters(content: str | Sequence[Mapping[str, Any]]) -> int:
    return len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)
