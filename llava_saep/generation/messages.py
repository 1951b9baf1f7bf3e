"""Messages, as chat interfaces have them, to turns with image markers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava_saep.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava_saep.data.conversation import Turn
from llava_saep.errors import UserError

Message = dict[str, Any]
"""`{"role": "system"|"user"|"assistant", "content": str | [{"type": "text", "text"} | {"type": "image", "image"}]}`."""


def parse_messages(messages: Sequence[Message]) -> tuple[list[Turn], list[Image.Image | str | Path], str | None]:
    """Split messages into turns with `<image>` markers, the images in their order, and the system prompt if any.

    Images of a message are put in front of its text, each as `<image>` and a line break, as LLaVA's prompts have them;
    or where its text holds LLaVA's `<image-placeholder>`, one for each image.

    Raises:
        UserError: unknown role or part, missing text or image, placeholders that do not match the images, or a marker
            written into the text by hand.
    """
    turns: list[Turn] = []
    images: list[Image.Image | str | Path] = []
    system = None
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise UserError(f"message {index} has role {role!r}, expected system, user or assistant")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text, own_images = _parse_parts(parts, index)
        if role == "system":
            if index != 0:
                raise UserError(f"message {index} is a system message; only the first may be one")
            system = text
            continue
        turns.append(Turn(role, _with_markers(text, len(own_images), index)))
        images.extend(own_images)
    return turns, images, system


def _with_markers(text: str, num_images: int, index: int) -> str:
    """Mark where a message's images stand."""
    num_places = text.count(IMAGE_PLACEHOLDER)
    if num_places == 0:
        return f"{DEFAULT_IMAGE_TOKEN}\n" * num_images + text
    if num_places != num_images:
        raise UserError(f"message {index} has {num_places} {IMAGE_PLACEHOLDER} and {num_images} images")
    return text.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)


def _parse_parts(parts: Any, index: int) -> tuple[str, list]:
    if not isinstance(parts, (list, tuple)):
        raise UserError(f"message {index} has content of type {type(parts).__name__}, expected text or a list of parts")
    texts, images = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image" and isinstance(part.get("image"), (Image.Image, str, Path)):
            images.append(part["image"])
        else:
            raise UserError(
                f"message {index} has a part {str(part)[:80]!r}; expected {{'type': 'text', 'text': ...}} or "
                "{'type': 'image', 'image': a PIL image or a path}"
            )
    text = "".join(texts)
    if DEFAULT_IMAGE_TOKEN in text:
        raise UserError(f"message {index} contains {DEFAULT_IMAGE_TOKEN!r} in its text; pass images as parts")
    return text, images
