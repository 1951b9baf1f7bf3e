"""Which answer is being written for which open page, and whether its chat has been left meanwhile."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from llava_saep.errors import UserError
from llava_saep.serve.demo.conversation import Conversation

_LONGEST_WAIT_SECONDS = 5.0


class Turn:
    """One answer in the making.

    Attributes:
        is_left: another chat is shown meanwhile, so that nothing of this one may be shown any more.
        is_kept: what came of it is saved; not so where its chat was deleted.
        conversation: what came of it, once it has ended; None: nothing.
    """

    def __init__(self) -> None:
        self.is_left = False
        self.is_kept = True
        self.conversation: Conversation | None = None
        self.has_ended = threading.Event()


class Turns:
    """At most one turn for each open page. Thread-safe."""

    def __init__(self) -> None:
        self._turns: dict[str, Turn] = {}
        self._lock = threading.Lock()

    @contextmanager
    def taken(self, session: str) -> Iterator[Turn]:
        """Take the turn of a page inside the block.

        Raises:
            UserError: an answer is being written there.
        """
        turn = Turn()
        with self._lock:
            if session in self._turns:
                raise UserError("An answer is being written; stop it, or wait for its end.")
            self._turns[session] = turn
        try:
            yield turn
        finally:
            with self._lock:
                del self._turns[session]
            turn.has_ended.set()

    def leave(self, session: str, *, is_kept: bool = True) -> Turn | None:
        """Say that the chat of a page is no longer shown; returns its turn, if there is one."""
        with self._lock:
            turn = self._turns.get(session)
        if turn is not None:
            turn.is_kept = is_kept
            turn.is_left = True
        return turn

    @staticmethod
    def wait_for(turn: Turn | None) -> None:
        """Wait for the end of a turn that was left and whose answer was stopped."""
        if turn is not None:
            turn.has_ended.wait(_LONGEST_WAIT_SECONDS)
