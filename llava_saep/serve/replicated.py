"""ReplicatedEngine: a model whose replicas Ray Serve runs, as an engine of this process."""

import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava_saep.errors import OverloadedError, UserError
from llava_saep.generation import (
    AnswerStatistics,
    AnswerStream,
    Engine,
    GenerationOptions,
    Message,
    ModelDescription,
)
from llava_saep.generation.streams import NOT_AT_ITS_END, PieceTimes

logger = logging.getLogger(__name__)

_RETRY_AFTER_SECONDS = 5
_MAX_ATTEMPTS = 4
"""How often a question is asked whose replica died before the first word."""


class ReplicatedEngine(Engine):
    """A model with several replicas. `deployed` makes one.

    Args:
        handle: Ray Serve's, of the replicas.
    """

    def __init__(self, handle: Any, description: ModelDescription):
        self._handle = handle
        self._description = description

    @property
    def description(self) -> ModelDescription:
        """What a replica says of the model."""
        return self._description

    def stream(
        self,
        messages: Sequence[Message],
        options: GenerationOptions | None = None,
        *,
        max_seconds: float | None = None,
    ) -> AnswerStream:
        """See `Engine.stream`; returns when a replica has taken the question, which may wait there.

        Raises:
            OverloadedError: all replicas are busy, and as many questions as may wait for them.
        """
        messages = [_with_loaded_images(message) for message in messages]
        ask = self._handle.options(stream=True, method_name="answer", session_id=conversation_key(messages))
        return ReplicatedAnswerStream(lambda: ask.remote(messages, options or GenerationOptions(), max_seconds))

    def close(self) -> None:
        """Do nothing: the replicas belong to `deployed`."""


class ReplicatedAnswerStream(AnswerStream):
    """An answer from a replica. Where that dies before the first word, another one is asked.

    Args:
        ask: puts the question to some replica and returns what comes back, as `ModelReplica.answer` yields it.
    Raises:
        UserError: the replica refuses the question.
        OverloadedError: no replica can take it.
    """

    def __init__(self, ask: Callable[[], Any]):
        self._ask = ask
        self._num_attempts = 0
        self._has_ended = False
        self._statistics: AnswerStatistics | None = None
        asked = time.monotonic()
        self._times = PieceTimes(asked)
        self._begin()
        self._waited = time.monotonic() - asked

    def _begin(self) -> None:
        from llava_saep.serve.replica import Refusal

        self._num_attempts += 1
        self._responses = self._ask()
        with self._replaced_replica():
            first = next(self._responses)
            if isinstance(first, Refusal):
                self._has_ended = True
                raise UserError(first.message)

    def __next__(self) -> str:
        """Wait for the next piece of text.

        Raises:
            RuntimeError: the replica died in the middle of the answer.
        """
        while not self._has_ended:
            received = None
            with self._replaced_replica():
                received = next(self._responses)
            if isinstance(received, str):
                self._times.note_piece()
                return received
            if isinstance(received, AnswerStatistics):
                waited = received.waiting_seconds + self._waited
                self._statistics = dataclasses.replace(received, waiting_seconds=waited)
                self._has_ended = True
        raise StopIteration

    @contextlib.contextmanager
    def _replaced_replica(self) -> Iterator[None]:
        """Ask again where the replica is gone and nothing was read yet; Ray's errors become ours."""
        import ray
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

        try:
            yield
        except (RequestCancelledError, ray.exceptions.TaskCancelledError, StopIteration):
            self._has_ended = True
        except (BackPressureError, DeploymentUnavailableError) as error:
            self._has_ended = True
            message = "all replicas of the model are busy, and as many questions wait as may"
            raise OverloadedError(message, retry_after_seconds=_RETRY_AFTER_SECONDS) from error
        except ray.exceptions.RayActorError as error:
            if self._times.num_pieces or self._num_attempts >= _MAX_ATTEMPTS:
                self._has_ended = True
                raise RuntimeError("the replica that wrote this answer is gone") from error
            logger.warning("a replica is gone; its question is put to another one")
            self._begin()

    def close(self) -> None:
        """Cancel the answer; the replica stops at its next token."""
        if not self._has_ended:
            self._has_ended = True
            self._responses.cancel()

    @property
    def statistics(self) -> AnswerStatistics:
        """What the answer took, as the replica counted; of an answer that was cut short only the pieces are known."""
        if not self._has_ended:
            raise RuntimeError(NOT_AT_ITS_END)
        if self._statistics is not None:
            return self._statistics
        return AnswerStatistics(
            prompt_tokens=0,
            image_tokens=0,
            cached_tokens=0,
            completion_tokens=self._times.num_pieces,
            finish_reason="cancelled",
            waiting_seconds=self._waited,
            first_token_seconds=self._times.first_piece_seconds,
            seconds=self._times.seconds,
        )

    def __del__(self) -> None:
        if not self._has_ended:
            self.close()


def conversation_key(messages: Sequence[Message]) -> str:
    """A digest of a conversation's beginning, up to the first question: equal for all its turns."""
    digest = hashlib.blake2b(digest_size=16)
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            value = part.get("text", "").encode() if part["type"] == "text" else part["image"].tobytes()
            digest.update(f"{message['role']} {part['type']} {len(value)} ".encode() + value)
        if message["role"] == "user":
            break
    return digest.hexdigest()


def _with_loaded_images(message: Message) -> Message:
    """Read images that are files of this machine, which a replica elsewhere could not."""
    content = message["content"]
    if isinstance(content, str):
        return message
    return {**message, "content": [_with_loaded_image(part) for part in content]}


def _with_loaded_image(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image" or isinstance(part["image"], Image.Image):
        return part
    try:
        with Image.open(part["image"]) as opened:
            return {**part, "image": opened.copy()}
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{Path(part['image']).name}: the file cannot be read as an image") from error
