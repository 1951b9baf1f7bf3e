"""How the page's events run that bring no answer: at once, or in the queue where they may have to tell something."""

from typing import Any

QUIET: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
"""For what says nothing: outside of the queue, Gradio shows no message."""

TELLING: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": 8}
"""For what may show a message."""
