"""A chat in a file: its messages as JSON, images by their paths or, where they have none, inside it."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava_saep.errors import UserError
from llava_saep.generation import Message

_DATA_URL = "data:image/png;base64,"


def save_chat(path: str | Path, messages: Sequence[Message]) -> None:
    """Write a chat.

    Raises:
        UserError: the file exists already, or cannot be written.
    """
    document = json.dumps({"messages": [_with_parts(message, _image_out) for message in messages]}, indent=1)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(document + "\n")
    except FileExistsError as error:
        raise UserError(f"{path} exists already; name another file") from error
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def load_chat(path: str | Path) -> list[Message]:
    """Read what `save_chat` wrote.

    Raises:
        UserError: the file cannot be read or is no saved chat, or an image of it is gone.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        messages = [_with_parts(message, _image_in) for message in document["messages"]]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no chat that /save has written") from error
    if any(message["role"] not in ("system", "user", "assistant") for message in messages):
        raise UserError(f"{path} is no chat that /save has written")
    return messages


def _with_parts(message: Message, change_image: Any) -> Message:
    content = message["content"]
    if not isinstance(content, str):
        content = [
            {"type": "image", "image": change_image(part["image"])}
            if part["type"] == "image"
            else {"type": "text", "text": part["text"]}
            for part in content
        ]
    return {"role": message["role"], "content": content}


def _image_out(image: Image.Image | Path | str) -> str:
    if not isinstance(image, Image.Image):
        return str(Path(image).resolve())
    data = io.BytesIO()
    image.save(data, "PNG")
    return _DATA_URL + base64.b64encode(data.getvalue()).decode()


def _image_in(image: str) -> Image.Image | Path:
    if image.startswith(_DATA_URL):
        opened = Image.open(io.BytesIO(base64.b64decode(image.removeprefix(_DATA_URL))), formats=["PNG"])
        opened.load()
        return opened
    if not Path(image).is_file():
        raise UserError(f"the image {image} is gone")
    return Path(image)
