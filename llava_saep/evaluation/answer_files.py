"""Answer files in LLaVA's format: appended to per batch, read again after an interruption, one part per rank."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from llava_saep.errors import UserError
from llava_saep.evaluation.fingerprints import text_fingerprint
from llava_saep.evaluation.questions import NOT_JSON
from llava_saep.evaluation.tasks import TaskQuestion

logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""One line: question_id, prompt, text, answer_id, model_id, metadata, and what a benchmark adds."""

_PART = ".rank"
_FIRST_CHARACTERS = '{"question_id": '
"""Of every line that `answer_record` makes."""


def answer_record(question: TaskQuestion, text: str, model_id: str, metadata: Mapping[str, Any]) -> Record:
    """The line of one answer."""
    return {
        "question_id": question.question_id,
        "prompt": question.prompt,
        "text": text,
        "answer_id": uuid.uuid4().hex,
        "model_id": model_id,
        "metadata": dict(metadata),
        **question.answer_fields,
    }


def part_of_rank(path: Path, rank: int) -> Path:
    """Where one of several ranks writes its answers, until they are put together."""
    return path.with_name(f"{path.name}{_PART}{rank}")


def find_parts(path: Path) -> list[Path]:
    """Parts that ranks of this run or of an interrupted one have written."""
    named = (file for file in path.parent.glob(f"{path.name}{_PART}*") if file.is_file())
    return sorted(file for file in named if file.name.removeprefix(path.name + _PART).isdecimal())


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold an answer file and the parts of it, which no other evaluation may write meanwhile; rank 0 does it for all.

    A process that is killed holds nothing any more: the file of the lock stays behind, and means nothing alone.

    Raises:
        UserError: another evaluation holds it, or nothing can be written there.
    """
    place = _place_of_lock(path)
    lock = _locked(path, place)
    try:
        yield
    finally:
        place.unlink(missing_ok=True)  # while it is still held: see `_is_at`
        lock.close()


def check_free(paths: Iterable[Path]) -> None:
    """Look whether answers can be written to files, before a model is loaded in vain.

    Raises:
        UserError: another evaluation is writing one, or its folder takes no files.
    """
    for path in paths:
        place = next(folder for folder in path.absolute().parents if folder.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            reason = "takes no files" if place.is_dir() else "is a file"
            raise UserError(f"{path}: cannot be written, since {place} {reason}; choose another place for answers")
        if _place_of_lock(path).is_file():
            with claimed(path):
                pass


def _place_of_lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _locked(path: Path, place: Path) -> TextIO:
    while True:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = place.open("w")
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise UserError(
                f"another evaluation is writing {path}; wait for its end, or name another place for answers"
            ) from error
        except OSError as error:  # some file systems of clusters have no locks
            logger.debug("%s: cannot be locked (%s)", place, error)
        if _is_at(lock, place):
            return lock
        lock.close()


def _is_at(lock: TextIO, place: Path) -> bool:
    """Whether a file is still the one of its name: whoever held it before may have removed it since it was opened."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), place.stat())
    except FileNotFoundError:
        return False


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written ({error}); choose another place for answers")


def refuse_other_files(path: Path) -> None:
    """Raise UserError where the file holds something else than answers, which the first answer would replace."""
    if not path.is_file() or not path.stat().st_size or any(_readable_records([path])):
        return
    # All that a run leaves which was killed while it wrote its first line is the beginning of that line.
    if not path.read_text(encoding="utf-8", errors="replace").startswith(_FIRST_CHARACTERS):
        raise UserError(f"{path}: holds something else than answers, one JSON object per line; name another file")


def set_aside_others(path: Path, metadata: Mapping[str, Any]) -> int:
    """Copy answers that were made otherwise to files beside this one, where a run that is made like them finds them.

    Returns:
        how many there are.
    """
    others: dict[Path, list[Record]] = {}
    for record in _readable_records([path, *find_parts(path)]):
        if record.get("metadata") != metadata:
            others.setdefault(_aside(path, record.get("metadata")), []).append(record)
    for file, records in others.items():
        with file.open("a", encoding="utf-8") as aside:
            aside.write("".join(map(json_line, records)))
    return sum(map(len, others.values()))


def _aside(path: Path, metadata: Any) -> Path:
    return path.with_name(f"{path.stem}.{text_fingerprint(metadata)}{path.suffix}")


@dataclass(frozen=True)
class StoredAnswers:
    """Answers that were made in one way, in a file, its parts, and the file that is beside it for those set aside.

    Attributes:
        kept: per question; None where it has to be answered.
        others: to other questions, or to another wording.
        num_to_set_aside: how many of `others` are not in the file beside it yet.
    """

    kept: list[Record | None]
    others: list[Record]
    num_to_set_aside: int


def stored_answers(path: Path, questions: Sequence[TaskQuestion], metadata: Mapping[str, Any]) -> StoredAnswers:
    """Find what there is for each question. A line that was cut short does not count.

    Args:
        metadata: says how answers were made.
    """
    aside = list(_records_made_like([_aside(path, metadata)], metadata))
    waiting: dict[tuple[str, str, int], list[Record]] = {}
    seen: set[str] = set()
    for record in [*_records_made_like([path, *find_parts(path)], metadata), *aside]:
        # A run that was killed while it put parts together leaves the same answer in two files.
        if record.get("answer_id") not in seen:
            seen.add(record.get("answer_id"))
            waiting.setdefault(_key(record), []).append(record)
    kept = [records.pop(0) if (records := waiting.get(question.key)) else None for question in questions]
    others = [record for records in waiting.values() for record in records]
    set_aside = {record.get("answer_id") for record in aside}
    return StoredAnswers(kept, others, sum(record.get("answer_id") not in set_aside for record in others))


def _records_made_like(paths: Iterable[Path], metadata: Mapping[str, Any]) -> Iterable[Record]:
    return (record for record in _readable_records(paths) if record.get("metadata") == metadata)


def write_together(path: Path, stored: StoredAnswers, metadata: Mapping[str, Any]) -> None:
    """Write the answers that are there, in their order, the others to the file beside it, and remove the parts."""
    kept, aside = [record for record in stored.kept if record is not None], _aside(path, metadata)
    if stored.others:
        rewrite(aside, [*stored.others, *kept])  # a kill leaves answers in two files rather than in none
    rewrite(path, kept)
    for part in find_parts(path):
        part.unlink()
    if stored.others:
        rewrite(aside, stored.others)
    else:
        aside.unlink(missing_ok=True)


def rewrite(path: Path, records: Iterable[Record]) -> None:
    """Replace the file as a whole, or not at all.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("".join(json_line(record) for record in records), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error


def json_line(record: Mapping[str, Any]) -> str:
    """One line of a jsonl file."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def _key(record: Record) -> tuple[str, str, int]:
    """As `TaskQuestion.key`."""
    return str(record["question_id"]), record.get("prompt", ""), int(record.get("round_id", 0))


def _readable_records(paths: Iterable[Path]) -> Iterable[Record]:
    for path in paths:
        if path.is_file():
            # Not splitlines, which also cuts at characters that JSON leaves inside of texts (U+2028).
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            yield from filter(None, map(_parse_record, lines))


def _parse_record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except NOT_JSON:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        return None
    return record if isinstance(record.get("question_id"), str | int) else None
