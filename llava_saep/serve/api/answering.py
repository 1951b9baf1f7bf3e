"""One question's way through an engine, for code that must not block: engines are read in threads.

Whatever happens to the question, `close` is called once; it stops the model and makes room for others when the model
has stopped, whether anybody waits for that or not.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor

from llava_saep.generation import AnswerStatistics, AnswerStream
from llava_saep.generation.streams import StopStringFilter
from llava_saep.serve.api.admission import Ticket
from llava_saep.serve.api.metrics import Metrics

KEEP_ALIVE_SECONDS = 15.0
"""A stream that is silent for that long tells proxies and clients that it is alive."""


class Answering:
    """An answer in the making.

    Args:
        ask: opens the engine's stream; called in a thread of `readers`.
        ticket: given back when the model has stopped.
        readers: as many threads as there may be questions; each is held while its question waits.
        closers: as many again, so that an answer can be closed while all readers are held.
    """

    def __init__(
        self,
        ask: Callable[[], AnswerStream],
        *,
        stop_strings: tuple[str, ...],
        ticket: Ticket,
        metrics: Metrics,
        readers: ThreadPoolExecutor,
        closers: ThreadPoolExecutor,
    ):
        self._ticket = ticket
        self._metrics = metrics
        self._readers = readers
        self._closers = closers
        self._closing: Future[AnswerStatistics | None] | None = None
        self._filter = StopStringFilter(stop_strings)
        self._opening: Future[AnswerStream] = readers.submit(ask)

    async def open(self) -> None:
        """Wait until the engine has taken the question; errors as the engine's."""
        await asyncio.shield(asyncio.wrap_future(self._opening))

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the answer's text up to a stop string; "" when nothing came for KEEP_ALIVE_SECONDS."""
        stream = self._opening.result()
        while not self._filter.has_stopped:
            reading = asyncio.wrap_future(self._readers.submit(next, stream, None))
            while not (await asyncio.wait([reading], timeout=KEEP_ALIVE_SECONDS))[0]:
                yield ""
            piece = reading.result()
            text = self._filter.flush() if piece is None else self._filter.feed(piece)
            if text:
                yield text
            if piece is None:
                return

    async def finish(self) -> tuple[AnswerStatistics, str]:
        """Wait until the model has stopped; return what the answer took and why it ended."""
        statistics = await asyncio.shield(asyncio.wrap_future(self.close()))
        assert statistics is not None, "only an answer that was opened can be finished"
        return statistics, "stop" if self._filter.has_stopped else statistics.finish_reason

    def close(self) -> Future[AnswerStatistics | None]:
        """Stop the model, without waiting for that. Calling it again is harmless."""
        if self._closing is None:
            self._closing = self._closers.submit(self._close)
        return self._closing

    def _close(self) -> AnswerStatistics | None:
        try:
            if self._opening.exception() is not None:
                return None
            stream = self._opening.result()
            stream.close()
            self._metrics.record_answer(self._ticket.model_id, stream.statistics)
            return stream.statistics
        finally:
            self._ticket.leave()
