"""Free answers rated by a language model behind an OpenAI-compatible endpoint; a service that fails costs no review.

Replies are appended to the review file as they come, so that an interrupted run asks only for what is missing. What the
judge could not answer is asked again by the next run, and counted until then.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from llava_saep.errors import UserError
from llava_saep.evaluation.answer_files import claimed, json_line, rewrite
from llava_saep.evaluation.fingerprints import text_fingerprint
from llava_saep.evaluation.tasks import JudgeRequest, Review
from llava_saep.evaluation.words import encodable

logger = logging.getLogger(__name__)

KEY_VARIABLES = ("LLAVA_SAEP_JUDGE_KEY", "OPENAI_API_KEY")
REQUEST_FIELD = "request"
"""Field of a review line: fingerprint of what was asked, and of whom. A changed answer is reviewed anew."""

_REFUSALS = (401, 403, 404, 405)
"""Answers of a server that will take no request of this kind: wrong key, model or address."""
_FAULTY_REQUESTS = (400, 413, 422)
"""Answers to one request that will never work: too long for the judge, or held back by a filter of contents."""
_MAX_WAIT_SECONDS = 60.0

ReviewLine = Callable[[Review], dict[str, Any]]


class JudgeFailed(Exception):
    """One request got no reply; others may.

    Attributes:
        may_pass: the same request may be answered another time.
    """

    def __init__(self, reason: str, *, may_pass: bool) -> None:
        super().__init__(reason)
        self.may_pass = may_pass


@dataclass(frozen=True)
class Reviews:
    """What became of requests to a judge.

    Attributes:
        lines: one per request, in their order; of failed ones too.
        num_failed: requests that failed in a way that may pass, so that another run may get a reply.
    """

    lines: list[dict[str, Any]]
    num_failed: int


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Where the judge is, and how patiently it is asked.

    Args:
        url: with or without /chat/completions; https://api.openai.com/v1 for OpenAI.
        model: the name that the endpoint knows it by.
        api_key: sent as a bearer token; None: none is sent.
        max_attempts: how often one request is sent before it counts as failed.
        first_wait_seconds: before the second attempt; doubled before each further one, unless the server says how long.
        num_parallel: requests on their way at once.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout_seconds: float = 120.0
    max_attempts: int = 6
    first_wait_seconds: float = 2.0
    num_parallel: int = 4

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(
                f"--judge-url {self.url!r}: expected http:// or https://, such as https://api.openai.com/v1"
            )
        if self.max_attempts < 1 or self.num_parallel < 1:
            raise UserError("a judge is asked at least once, by at least one thread")

    @property
    def endpoint(self) -> str:
        """Where requests are sent."""
        base = self.url.rstrip("/")
        return base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    @property
    def description(self) -> str:
        """Model and address, without the key."""
        return f"{self.model} at {httpx.URL(self.url).host}"

    def ask(self, request: JudgeRequest, client: httpx.Client) -> str:
        """Send one request, again after failures that may pass, and return the reply's text.

        Raises:
            JudgeFailed: no usable reply after all attempts, or the endpoint will not take this very request.
            UserError: the endpoint refuses requests of this kind: wrong address, key or model.
        """
        for attempt in range(1, self.max_attempts + 1):
            try:
                return self._ask_once(request, client)
            except _Retry as retry:
                if attempt == self.max_attempts:
                    raise JudgeFailed(f"{retry.reason} ({attempt} attempts)", may_pass=True) from retry
                time.sleep(self._wait_seconds(attempt, retry.after_seconds))
        raise AssertionError("the last attempt returns or raises")

    def _ask_once(self, request: JudgeRequest, client: httpx.Client) -> str:
        messages = [{"role": "system", "content": request.system}] if request.system else []
        body = {
            "model": self.model,
            "messages": [*messages, {"role": "user", "content": request.user}],
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
        }
        try:
            response = client.post(self.endpoint, json=body)
        except httpx.HTTPError as error:
            raise _Retry(f"{type(error).__name__}: {error}") from error
        except httpx.InvalidURL as error:
            raise UserError(f"--judge-url {self.url!r}: {error}") from error
        if response.status_code in _FAULTY_REQUESTS:
            raise JudgeFailed(f"status {response.status_code}: {response.text[:300].strip()}", may_pass=False)
        if response.status_code in _REFUSALS:
            raise UserError(
                f"the judge at {self.endpoint} refuses (status {response.status_code}): {response.text[:300].strip()}. "
                f"Check --judge-url, --judge-model and the key (--judge-key-file, or {' or '.join(KEY_VARIABLES)})"
            )
        if response.status_code != httpx.codes.OK:
            raise _Retry(f"status {response.status_code}", _seconds_of(response.headers.get("retry-after")))
        return _reply_text(response)

    def _wait_seconds(self, attempt: int, asked_for: float | None) -> float:
        # Threads that were refused together should not come back together.
        own = self.first_wait_seconds * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
        return min(own if asked_for is None else max(asked_for, self.first_wait_seconds), _MAX_WAIT_SECONDS)


class _Retry(Exception):
    def __init__(self, reason: str, after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.after_seconds = reason, after_seconds


def _seconds_of(header: str | None) -> float | None:
    """Read a Retry-After header; one that gives a date is passed over."""
    try:
        return None if header is None else max(0.0, float(header))
    except ValueError:
        return None


def _reply_text(response: httpx.Response) -> str:
    try:
        text = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise _Retry(f"a reply that is none of the protocol: {response.text[:200]!r}") from error
    if not isinstance(text, str) or not text.strip():
        raise _Retry("an empty reply")
    return encodable(text)


def find_api_key(key_file: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key from a file, or from the environment; None where there is none, as for a server of one's own.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    if key_file is None:
        return next((environment[name] for name in KEY_VARIABLES if environment.get(name)), None)
    try:
        key = Path(key_file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--judge-key-file {key_file}: cannot be read ({error})") from error
    if not key:
        raise UserError(f"--judge-key-file {key_file}: is empty")
    return key


def review_answers(
    requests: Sequence[JudgeRequest],
    judge: Judge,
    path: Path,
    review_line: ReviewLine,
    *,
    description: str = "judge",
) -> Reviews:
    """Have answers reviewed; reviews that the file already holds of the same request and judge are kept.

    Reviews of other answers or by another judge are moved to a file beside it, where a later run finds them again.

    Args:
        review_line: makes the line of a reply in the benchmark's published format; `reply` None is a failed request.
    Returns:
        a line per request; those of failed ones are not written, so that they are asked again.
    Raises:
        UserError: the endpoint refuses requests of this kind, there is not one review, or another evaluation is writing
            the file.
    """
    with claimed(path):
        return _review(requests, judge, path, review_line, description)


def _review(
    requests: Sequence[JudgeRequest], judge: Judge, path: Path, review_line: ReviewLine, description: str
) -> Reviews:
    keys = [_request_key(request, judge) for request in requests]
    done = _kept_reviews(path, set(keys))
    rewrite(path, done.values())
    waiting = [position for position, key in enumerate(keys) if key not in done]
    failures: dict[int, JudgeFailed] = {}
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm(total=len(requests), initial=len(requests) - len(waiting), desc=description, unit=" reviews") as progress,
    ):
        for position, reply in _replies(requests, waiting, judge):
            if isinstance(reply, JudgeFailed):
                failures[position] = reply
            else:
                done[keys[position]] = _line(requests[position], reply, review_line, keys[position])
                file.write(json_line(done[keys[position]]))
                file.flush()
            progress.update()
    _report_failures(failures, requests, judge)
    lines = [done.get(key) or _line(each, None, review_line, key) for each, key in zip(requests, keys, strict=True)]
    rewrite(path, [line for key, line in zip(keys, lines, strict=True) if key in done])
    return Reviews(lines, sum(failure.may_pass for failure in failures.values()))


def _replies(
    requests: Sequence[JudgeRequest], positions: Sequence[int], judge: Judge
) -> Iterable[tuple[int, str | JudgeFailed]]:
    """Replies as they come; the first refusal that no patience will change ends them."""
    headers = {} if judge.api_key is None else {"Authorization": f"Bearer {judge.api_key}"}

    def ask(position: int) -> str | JudgeFailed:
        try:
            return judge.ask(requests[position], client)
        except JudgeFailed as failure:
            return failure

    with httpx.Client(headers=headers, timeout=judge.timeout_seconds) as client:
        pool = ThreadPoolExecutor(judge.num_parallel, thread_name_prefix="judge")
        try:
            futures = {pool.submit(ask, position): position for position in positions}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _line(request: JudgeRequest, reply: str | None, review_line: ReviewLine, key: str) -> dict[str, Any]:
    review = Review(question_id=request.question_id, reply=reply, record=request.record)
    return {**review_line(review), REQUEST_FIELD: key}


def _request_key(request: JudgeRequest, judge: Judge) -> str:
    facts = [judge.model, request.question_id, request.system, request.user, request.max_tokens, request.temperature]
    return text_fingerprint(facts)


def _kept_reviews(path: Path, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Reviews of these requests, here or set aside earlier; others are set aside, for somebody has paid for them."""
    aside = path.with_name(f"{path.stem}.others{path.suffix}")
    stored, earlier = _read_reviews(path), _read_reviews(aside)
    others = [record for record in stored if record.get(REQUEST_FIELD) not in wanted and record not in earlier]
    if others:
        rewrite(aside, [*earlier, *others])
        logger.warning("%d reviews of other answers, or by another judge, are kept in %s", len(others), aside)
    return {each[REQUEST_FIELD]: each for each in [*earlier, *stored] if each.get(REQUEST_FIELD) in wanted}


def _read_reviews(path: Path) -> list[dict[str, Any]]:
    """Lines of a review file, without one that was cut short."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _report_failures(failures: Mapping[int, JudgeFailed], requests: Sequence[JudgeRequest], judge: Judge) -> None:
    if not failures:
        return
    first = min(failures)
    words = (
        f"{len(failures)} of {len(requests)} reviews failed, the first one of question "
        f"{requests[first].question_id!r}: {failures[first]}"
    )
    if len(failures) == len(requests):
        raise UserError(f"the judge at {judge.endpoint} answers nothing: {words}")
    logger.warning("%s. The same command asks for them again", words)
