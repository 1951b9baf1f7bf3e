"""What runs inside Ray Serve: a replica, which holds one copy of the model, and the router that chooses among them.

Ray imports this module on every machine of a cluster; nothing else here imports it before Ray is known to be installed.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from ray.serve._private import replica as ray_replica
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from llava_saep.errors import UserError
from llava_saep.generation import (
    AnswerStatistics,
    AnswerStream,
    GenerationOptions,
    LocalEngine,
    Message,
    ModelDescription,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """Why a question was not taken, in words for whoever asked it."""

    message: str


class Accepted:
    """The question is well-formed, and the model will answer it; comes before the first piece of text."""


class ModelReplica:
    """One copy of the model, in a process of its own. Questions wait in it in their order.

    Args:
        folder, model_id, arguments: as for `LocalEngine.from_pretrained`.
        max_ongoing_requests: questions that are answered or wait here at once.
    """

    def __init__(self, folder: str, model_id: str, arguments: dict[str, Any], max_ongoing_requests: int):
        _listen_on_loopback_only()
        self.engine = LocalEngine.from_pretrained(folder, model_id=model_id, **arguments)
        # asyncio's own threads are few, and questions that wait would keep them from the one that is answered.
        self._threads = ThreadPoolExecutor(2 * max_ongoing_requests + 2, thread_name_prefix="llava-saep-reader")

    async def describe(self) -> ModelDescription:
        """What model answers here."""
        return self.engine.description

    async def answer(
        self, messages: Sequence[Message], options: GenerationOptions, max_seconds: float | None
    ) -> AsyncIterator[Accepted | Refusal | str | AnswerStatistics]:
        """Yield `Accepted`, the pieces of the answer and its statistics; or a `Refusal` alone."""
        try:
            stream = await self._in_thread(lambda: self.engine.stream(messages, options, max_seconds=max_seconds))
        except UserError as error:  # as a value: Ray would put its traceback into the message
            yield Refusal(str(error))
            return
        try:
            yield Accepted()
            while (piece := await self._in_thread(lambda: next(stream, None))) is not None:
                yield piece
            yield stream.statistics
        finally:
            self._close_soon(stream)

    async def check_health(self) -> None:
        """Fail where the device fails, after which Ray replaces this replica; a GPU's error stays until then."""
        device = self.engine.description.device
        await self._in_thread(lambda: torch.zeros(1, device=device).item())

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _close_soon(self, stream: AnswerStream) -> None:
        # Not awaited: a generator that is being cancelled is not waited for, and closing ends with the next token.
        self._threads.submit(stream.close)


class ConversationRouter(ConsistentHashRouter):
    """Sends a conversation to the replica that holds the cache of its earlier turns, unless another one is less busy.

    Ray's router hashes the session, which is the conversation's beginning here; of the replicas with the fewest
    answers under way the first in the order of the hash is taken.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Start with nothing under way; arguments as Ray's router."""
        super().initialize_state(**kwargs)
        self._under_way: Counter = Counter()

    async def choose_replicas(self, candidate_replicas: list, pending_request: Any = None) -> list:
        """Rank the replicas: the least busy ones first, among equals in the order of the hash."""
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        return sorted(ranks, key=lambda rank: min(self._under_way[replica.replica_id] for replica in rank))

    def on_send_request(self, replica_id: Any) -> None:
        """Count a request that is sent."""
        super().on_send_request(replica_id)
        self._under_way[replica_id] += 1

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """Count a request that has ended, in whichever way."""
        super().on_request_completed(replica_id, internal_request_id)
        self._under_way[replica_id] -= 1
        if self._under_way[replica_id] <= 0:
            del self._under_way[replica_id]


def _listen_on_loopback_only() -> None:
    """Keep a port of Ray's replicas to this machine: Serve's applications call each other there, and ours is alone.

    It would listen at every address, and what it receives it unpickles.
    """
    add_port = ray_replica.add_port_to_grpc_server
    ray_replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))
