"""Messages, as chat interfaces have them, to turns with image markers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava_saep.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava_saep.data.conversation import Turn
from llava_saep.errors import UserError

Message = dict[str, Any]
"""`{"role": "system"|"user"|"assistant", "content": str | [{"type": "text", "text"} | {"type": "image", "image"}]}`.

Images of a message go in front of its text, as LLaVA's prompts have them; one with `"in_place": True` stays where its
part stands. Text is text, whatever it spells."""

GivenImage = Image.Image | str | Path


def parse_messages(
    messages: Sequence[Message], spell_out: Callable[[str], str]
) -> tuple[list[Turn], list[GivenImage], str | None]:
    """Split messages into turns with `<image>` markers, the images in their order, and the system prompt if any.

    Args:
        spell_out: makes of a text one in which `<image>` is no marker (`llava_saep.data.spelling`).
    Raises:
        UserError: unknown role or part, or missing text or image.
    """
    turns: list[Turn] = []
    images: list[GivenImage] = []
    system = None
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise UserError(f"message {index} has role {role!r}, expected system, user or assistant")
        text, own_images = _parse_content(content, index, spell_out)
        if role == "system":
            if index != 0:
                raise UserError(f"message {index} is a system message; only the first may be one")
            if own_images:
                raise UserError("message 0 is a system message with an image; images belong into the user's messages")
            system = text
            continue
        turns.append(Turn(role, text))
        images.extend(own_images)
    return turns, images, system


def content_with_placeholders(text: str, images: Sequence[GivenImage]) -> list[dict[str, Any]]:
    """The content of a message whose images stand where its text holds LLaVA's `<image-placeholder>`, if it does.

    Raises:
        UserError: there are placeholders, but not as many as images.
    """
    first, *others = text.split(IMAGE_PLACEHOLDER)
    if not others:
        return [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    if len(others) != len(images):
        raise UserError(f"the text has {len(others)} {IMAGE_PLACEHOLDER} and {len(images)} images")
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for image, after in zip(images, others, strict=True):
        parts += [{"type": "image", "image": image, "in_place": True}, {"type": "text", "text": after}]
    return parts


def _parse_content(content: Any, index: int, spell_out: Callable[[str], str]) -> tuple[str, list[GivenImage]]:
    """Return a message's text with its markers, and its images in their order."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise UserError(
            f"message {index} has content of type {type(content).__name__}, expected text or a list of parts"
        )
    text, leading, in_place = "", [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += spell_out(part["text"])
        elif kind == "image" and isinstance(part.get("image"), (Image.Image, str, Path)):
            if part.get("in_place"):
                text += DEFAULT_IMAGE_TOKEN
            (in_place if part.get("in_place") else leading).append(part["image"])
        else:
            raise UserError(
                f"message {index} has a part {str(part)[:80]!r}; expected {{'type': 'text', 'text': ...}} or "
                "{'type': 'image', 'image': a PIL image or a path}"
            )
    return f"{DEFAULT_IMAGE_TOKEN}\n" * len(leading) + text, leading + in_place
