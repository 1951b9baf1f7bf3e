"""How the page's events run: at once, in the queue where they may have to tell something, or as answers."""

from typing import Any

from llava_saep.serve.limits import Limits

QUIET: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
"""For what says nothing: outside of the queue, Gradio shows no message."""

TELLING: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": 8}
"""For what may show a message."""


def answering(limits: Limits) -> dict[str, Any]:
    """For what lets a model write, in all sections together.

    As many at once as may wait, so that each of them can be stopped; the engine takes them in order.
    """
    return {
        "api_visibility": "private",
        "show_progress": "hidden",
        "concurrency_limit": limits.max_queue + 1,
        "concurrency_id": "answers",
    }
