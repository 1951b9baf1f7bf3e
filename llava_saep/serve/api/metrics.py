"""What an application counts and measures, for Prometheus."""

from collections.abc import Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import Response

from llava_saep.generation import AnswerStatistics

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)


class Metrics:
    """The metrics of one application, in a registry of their own.

    Args:
        paths: that are told apart; all others are counted as "other", so that clients cannot make up series.
    """

    def __init__(self, paths: Iterable[str]):
        self._paths = frozenset(paths)
        self.registry = CollectorRegistry()
        registry = {"registry": self.registry}
        self._requests = Counter(
            "llava_saep_requests", "Requests by path and status (499: the client left).", ("path", "status"), **registry
        )
        self.in_progress = Gauge("llava_saep_requests_in_progress", "Requests being worked on.", **registry)
        self._queue = Gauge("llava_saep_queue_length", "Questions that wait for the model.", ("model",), **registry)
        self._tokens = {
            name: Counter(f"llava_saep_{name}", text, ("model",), **registry)
            for name, text in {
                "prompt_tokens": "Tokens of prompts, images included.",
                "image_tokens": "Tokens of images.",
                "cached_tokens": "Tokens of prompts that were known from earlier turns.",
                "completion_tokens": "Tokens of answers.",
            }.items()
        }
        self._answers = Counter("llava_saep_answers", "Answers by how they ended.", ("model", "reason"), **registry)
        self._seconds = {
            name: Histogram(f"llava_saep_{name}", text, ("model",), buckets=_SECONDS, **registry)
            for name, text in {
                "waiting_seconds": "From a question to the start of work on it.",
                "time_to_first_token_seconds": "From a question to the first token of its answer.",
                "answer_seconds": "From a question to the last token of its answer.",
            }.items()
        }

    def count_request(self, path: str, status: int) -> None:
        """Count a request that has ended."""
        self._requests.labels(path if path in self._paths else "other", str(status)).inc()

    def set_queue(self, model_id: str, length: int) -> None:
        """Note how many questions wait for a model."""
        self._queue.labels(model_id).set(length)

    def record_answer(self, model_id: str, statistics: AnswerStatistics) -> None:
        """Count what an answer took."""
        for name, counter in self._tokens.items():
            counter.labels(model_id).inc(getattr(statistics, name))
        self._answers.labels(model_id, statistics.finish_reason).inc()
        waiting = statistics.waiting_seconds
        self._seconds["waiting_seconds"].labels(model_id).observe(waiting)
        if statistics.completion_tokens:
            first, last = waiting + statistics.first_token_seconds, waiting + statistics.seconds
            self._seconds["time_to_first_token_seconds"].labels(model_id).observe(first)
            self._seconds["answer_seconds"].labels(model_id).observe(last)

    def to_response(self) -> Response:
        """The metrics as Prometheus reads them."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)
