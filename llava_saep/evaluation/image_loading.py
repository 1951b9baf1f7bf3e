"""Images of the next batch are opened while the model answers one; no more than two batches' are in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from PIL import Image

from llava_saep.errors import UserError
from llava_saep.evaluation.tasks import EmbeddedImage, TaskQuestion
from llava_saep.evaluation.tasks._base import ImageSource

NUM_THREADS = 4
"""Decoding lets other threads run, so that several images are decoded at once."""

OpenImage = Callable[[ImageSource], Image.Image]


@dataclass(frozen=True)
class UnreadableImage:
    """Why a question cannot be put."""

    reason: str


def open_image(source: ImageSource) -> Image.Image:
    """Read an image as RGB, from its file or from the question file.

    Raises:
        UserError: it is absent, damaged, or too large.
    """
    from llava_saep.data.images import load_image  # brings transformers' PIL code, which --help shall not wait for

    return source.open() if isinstance(source, EmbeddedImage) else load_image(source)


class ImageLoader:
    """Opens images of questions in threads.

    Args:
        questions: all of them; batches are positions in this list.
        open_image: raises UserError where an image will not open.
    """

    def __init__(self, questions: Sequence[TaskQuestion], open_image: OpenImage) -> None:
        self._questions = questions
        self._open_image = open_image
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="images")
        self._loading: dict[int, Future[list[Image.Image] | UnreadableImage]] = {}

    def __enter__(self) -> ImageLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def start(self, positions: Sequence[int]) -> None:
        """Begin to open the images of some questions; those that have been begun go on."""
        for position in positions:
            if position not in self._loading:
                self._loading[position] = self._pool.submit(self._open, self._questions[position])

    def take(self, positions: Sequence[int]) -> list[list[Image.Image] | UnreadableImage]:
        """Wait for the images of some questions, and forget them here."""
        self.start(positions)
        return [self._loading.pop(position).result() for position in positions]

    def _open(self, question: TaskQuestion) -> list[Image.Image] | UnreadableImage:
        try:
            return [self._open_image(source) for source in question.images]
        except UserError as error:
            return UnreadableImage(str(error))
