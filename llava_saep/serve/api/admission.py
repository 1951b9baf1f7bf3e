"""How many questions are in the house, and how many pixels they brought."""

import ctypes
import threading
from collections.abc import Callable

from llava_saep.serve.api.errors import ApiError, overloaded
from llava_saep.serve.limits import Limits

_QUEUE_RETRY_SECONDS = 5
_MANY_PIXELS = 10_000_000
"""From here on a question's freed memory is worth returning to the system, which takes some milliseconds."""


def return_freed_memory() -> None:
    """Let glibc give back what was freed: of images it keeps gigabytes for later. Elsewhere nothing is done."""
    if _libc is not None:
        _libc.malloc_trim(0)


def _load_glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libc.so.6")
        return library if hasattr(library, "malloc_trim") else None
    except OSError:
        return None


_libc = _load_glibc()


class Admission:
    """Counts the questions of each model, of which some are answered and some may wait, and the pixels of all.

    Args:
        limits: `max_queue` per model, `max_pixels_in_memory` for all.
        answers_at_once: questions of one model that do not wait.
        on_queue_change: told a model's name and how many of its questions wait.
    """

    def __init__(self, limits: Limits, answers_at_once: int, on_queue_change: Callable[[str, int], None]):
        self.limits = limits
        self._answers_at_once = answers_at_once
        self._on_queue_change = on_queue_change
        self._lock = threading.Lock()
        self._questions: dict[str, int] = {}
        self._pixels = 0

    def enter(self, model_id: str) -> "Ticket":
        """Let a question in.

        Raises:
            ApiError: 503, as many as may wait are waiting.
        """
        with self._lock:
            count = self._questions.get(model_id, 0)
            if count >= self._answers_at_once + self.limits.max_queue:
                message = f"{self.limits.max_queue} questions are waiting already; try again later"
                raise overloaded(message, seconds=_QUEUE_RETRY_SECONDS)
            self._set_questions(model_id, count + 1)
        return Ticket(self, model_id)

    def take_pixels(self, ticket: "Ticket", count: int) -> None:
        """Count an image of a question; see `Ticket.take_pixels`."""
        most = self.limits.max_pixels_in_memory
        if ticket.pixels + count > most:
            message = f"the conversation's images have more than {most:,} pixels together"
            raise ApiError(400, message, param="messages", code="limit_exceeded")
        with self._lock:
            if self._pixels + count > most:
                message = "the images of other questions fill the memory; try again later"
                raise overloaded(message, seconds=_QUEUE_RETRY_SECONDS)
            self._pixels += count
            ticket.pixels += count

    def leave(self, ticket: "Ticket") -> None:
        """Forget a question."""
        if ticket.pixels >= _MANY_PIXELS:
            return_freed_memory()
        with self._lock:
            self._pixels -= ticket.pixels
            self._set_questions(ticket.model_id, self._questions[ticket.model_id] - 1)

    def _set_questions(self, model_id: str, count: int) -> None:
        self._questions[model_id] = count
        self._on_queue_change(model_id, max(0, count - self._answers_at_once))


class Ticket:
    """A question that was let in. `leave` is called once, when nothing of it is in memory any more."""

    def __init__(self, admission: Admission, model_id: str):
        self.model_id = model_id
        self.pixels = 0
        self._admission = admission

    def take_pixels(self, count: int) -> None:
        """Count an image before it is decoded.

        Raises:
            ApiError: 400, the question alone has too many; 503, all together have.
        """
        self._admission.take_pixels(self, count)

    def leave(self) -> None:
        """Make room for others."""
        self._admission.leave(self)
