"""Likes and dislikes as lines of a JSONL file, which several servers may append to."""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from llava_saep.serve.demo.conversation import Conversation
from llava_saep.serve.demo.pictures import PictureStore, write_privately


class FeedbackFile:
    """Appends what visitors think of answers.

    Args:
        path: the JSONL file; its folder is made.
        image_folder: where the pictures of judged chats are kept under their names; None: they are not.
    """

    def __init__(self, path: Path, image_folder: Path | None = None):
        self.path = path
        self.image_folder = image_folder

    def append(self, conversation: Conversation, index: int, liked: bool | None, pictures: PictureStore) -> None:
        """Write one line: time, model, the chat up to the answer at `index`, and the opinion (None: taken back)."""
        messages = [
            {"role": message.role, "content": message.text, "images": list(message.pictures)}
            for message in conversation.messages[: index + 1]
        ]
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "chat": conversation.chat_id,
            "model": conversation.messages[index].model_id,
            "liked": liked,
            "system": conversation.system,
            "messages": messages,
        }
        self._append(line)
        for name in {name for message in messages for name in message["images"]} if self.image_folder else ():
            path = self.image_folder / name
            if not path.exists():
                write_privately(path, pictures.read(name))

    def _append(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = (json.dumps(line) + "\n").encode()
        number = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(number, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(data)
