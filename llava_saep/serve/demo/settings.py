"""What the page was started with."""

from dataclasses import dataclass, field
from pathlib import Path

from llava_saep.generation import GenerationOptions
from llava_saep.serve.limits import Limits

MAX_HISTORY_BYTES = 2 * 10**9
MAX_UPLOADS_BYTES = 2 * 10**9


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """How the page works.

    Args:
        working_folder: temporary, private, inside the system's folder for temporary files; goes with the server.
        options: what the sliders show at first.
        history_folder: where chats are kept; None: in the working folder, until the server ends.
        max_history_bytes: of all visitors' chats and pictures together.
        max_uploads_bytes: of what the page has received and made within the last hours; above it uploads are refused.
        feedback_file: where likes and dislikes go; None: nobody is asked.
        feedback_image_folder: where the pictures of judged chats go; None: they are named by their hash alone.
    """

    working_folder: Path
    limits: Limits = field(default_factory=Limits)
    options: GenerationOptions = field(default_factory=lambda: GenerationOptions(temperature=0.2))
    history_folder: Path | None = None
    max_history_bytes: int = MAX_HISTORY_BYTES
    max_uploads_bytes: int = MAX_UPLOADS_BYTES
    feedback_file: Path | None = None
    feedback_image_folder: Path | None = None
