"""LLaVA's conversation files: JSON lists (or one JSON object per line) of records, read and checked.

A record is {"id", "image"?: file or list of files, "conversations": [{"from": "human"|"gpt", "value"}]}. What is wrong
with a record is a BadSampleError that names file, index and id, so that a data set can stop at it or leave it out.
"""

import json
import os
from collections.abc import Callable
from typing import NamedTuple

from llava_saep.constants import DEFAULT_IMAGE_TOKEN
from llava_saep.data.conversation import Role, Turn, count_image_markers, place_image_markers
from llava_saep.errors import UserError

ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}

MALFORMED = "malformed record"
BAD_TURN_ORDER = "bad order of turns"
EMPTY_ANSWER = "empty answer"
MARKER_MISMATCH = "image markers do not match images"
NOT_A_CAPTION = "not a caption"
MISSING_IMAGE = "missing image"
UNREADABLE_IMAGE = "unreadable image"
IMAGE_CUT = "image cut by max_length"
NO_SUPERVISED_TOKEN = "no supervised token"

CAUSES = (
    MALFORMED,
    BAD_TURN_ORDER,
    EMPTY_ANSWER,
    MARKER_MISMATCH,
    NOT_A_CAPTION,
    MISSING_IMAGE,
    UNREADABLE_IMAGE,
    IMAGE_CUT,
    NO_SUPERVISED_TOKEN,
)
"""Why a sample cannot be used; skipped samples are counted under these names."""


class SampleSource(NamedTuple):
    """Where a record stands: what messages name it by."""

    path: str
    index: int
    id: object = None

    def __str__(self) -> str:
        identity = "without id" if self.id is None else f"id {self.id!r}"
        return f"{self.path}: sample {self.index} ({identity})"


class BadSampleError(UserError):
    """A sample cannot be used.

    Attributes:
        source: file, index and id of the record; None after a data loader has carried the error out of a worker.
        cause: one of CAUSES.
    """

    def __init__(self, message: str, source: SampleSource | None = None, cause: str = MALFORMED) -> None:
        # A data loader re-raises what a worker raised with the worker's traceback as the only argument; the message
        # is its last part.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())
        self.source = source
        self.cause = cause


def bad_sample(source: SampleSource, cause: str, problem: str) -> BadSampleError:
    """Make the error for a sample; `problem` continues "FILE: sample INDEX (id ID): "."""
    return BadSampleError(f"{source}: {problem}", source, cause)


class Record(NamedTuple):
    """One usable conversation: a user turn first, roles alternating, no empty answer.

    Attributes:
        turns: with each turn's lone image marker at its front.
        images: paths relative to the image folder, in the order of the markers.
    """

    source: SampleSource
    turns: tuple[Turn, ...]
    images: tuple[str, ...]


def read_records(
    path: str | os.PathLike[str],
    *,
    use_im_start_end: bool = False,
    on_bad_record: Callable[[BadSampleError], None] | None = None,
) -> list[Record]:
    """Read and check a conversation file.

    Args:
        path: a JSON list, or with suffix .jsonl one JSON object per line.
        use_im_start_end: wrap image markers in "<im_start>" and "<im_end>".
        on_bad_record: called with what is wrong with a record, which is then left out; without it that is raised.
    Raises:
        UserError: the file is missing, not JSON (with line and column), not a list, or empty.
        BadSampleError: the first record that cannot be used.
    """
    path = os.fspath(path)
    raw_records = _read_json_lines(path) if path.endswith(".jsonl") else _read_json_list(path)
    if not raw_records:
        raise UserError(f"{path}: holds no records")
    records = []
    for index, raw in enumerate(raw_records):
        try:
            records.append(parse_record(raw, path, index, use_im_start_end=use_im_start_end))
        except BadSampleError as error:
            if on_bad_record is None:
                raise
            on_bad_record(error)
    return records


def parse_record(raw: object, path: str, index: int, *, use_im_start_end: bool = False) -> Record:
    """Check one record of a conversation file and bring it into the form that templates take.

    An answer before the first question is left out, as LLaVA does.

    Raises:
        BadSampleError: a field is missing or of the wrong type, a role is unknown, turns do not alternate, an answer
            is empty, or the number of image markers is not the number of images.
    """
    source = SampleSource(path, index, raw.get("id") if isinstance(raw, dict) else None)
    if not isinstance(raw, dict):
        raise bad_sample(source, MALFORMED, f"is a {type(raw).__name__}, expected an object")
    images = _parse_images(raw.get("image"), source)
    turns = _parse_turns(raw.get("conversations"), source)
    if turns[0].role == "assistant":
        turns = turns[1:]
    _check_turn_order(turns, source)
    _check_markers(turns, images, source)
    if images:
        turns = [Turn(turn.role, place_image_markers(turn.text, use_im_start_end)) for turn in turns]
    return Record(source, tuple(turns), images)


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"{path}: no such data file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _read_json_list(path: str) -> list[object]:
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        hint = " (one object per line? then name the file .jsonl)" if error.msg == "Extra data" else ""
        raise UserError(
            f"{path}: is not JSON: {error.msg} at line {error.lineno} column {error.colno}{hint}"
        ) from error
    if not isinstance(content, list):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}, expected a list of LLaVA records")
    return content


def _read_json_lines(path: str) -> list[object]:
    records = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: is not JSON: {error.msg} at line {number} column {error.colno}") from error
    return records


def _parse_images(value: object, source: SampleSource) -> tuple[str, ...]:
    if value is None:
        return ()
    images = value if isinstance(value, list) else [value]
    if not all(isinstance(image, str) and image for image in images):
        raise bad_sample(source, MALFORMED, f"'image' is {value!r}, expected a file name or a list of them")
    return tuple(images)


def _parse_turns(value: object, source: SampleSource) -> list[Turn]:
    if not isinstance(value, list) or not value:
        found = "is missing" if value is None else f"is {_shortened(value)}"
        raise bad_sample(
            source,
            MALFORMED,
            f"'conversations' {found}, expected a list of {{'from': 'human' or 'gpt', 'value': text}}",
        )
    return [_parse_turn(turn, position, source) for position, turn in enumerate(value)]


def _parse_turn(turn: object, position: int, source: SampleSource) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
        raise bad_sample(
            source, MALFORMED, f"turn {position} is {_shortened(turn)}, expected {{'from': ..., 'value': text}}"
        )
    speaker = turn["from"]
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise bad_sample(
            source, MALFORMED, f"turn {position} is from {speaker!r}, expected one of {', '.join(map(repr, ROLES))}"
        )
    return Turn(role, turn["value"])


def _check_turn_order(turns: list[Turn], source: SampleSource) -> None:
    for position, turn in enumerate(turns):
        expected = "user" if position % 2 == 0 else "assistant"
        if turn.role != expected:
            raise bad_sample(
                source, BAD_TURN_ORDER, "two turns in a row are from the same side; 'human' and 'gpt' must alternate"
            )
        if turn.role == "assistant" and not turn.text.strip():
            raise bad_sample(
                source, EMPTY_ANSWER, f"its answer {position // 2 + 1} is empty; there is nothing to learn"
            )
    if len(turns) < 2:
        raise bad_sample(source, NO_SUPERVISED_TOKEN, "has no question with an answer; there is nothing to learn")


def _check_markers(turns: list[Turn], images: tuple[str, ...], source: SampleSource) -> None:
    num_markers = count_image_markers(turns)
    if num_markers != len(images):
        raise bad_sample(
            source,
            MARKER_MISMATCH,
            f"its turns hold {num_markers} {DEFAULT_IMAGE_TOKEN} markers, but 'image' names {len(images)} images; "
            "there must be one marker per image",
        )


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
