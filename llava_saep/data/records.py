"""LLaVA's conversation files: JSON lists (or one JSON object per line) of records, read and checked.

A record is {"id", "image"?: file or list of files, "conversations": [{"from": "human"|"gpt", "value"}]}; the first turn
may be from "system". What is wrong with a record is a BadSampleError that names file, index and id, so that a data set
can stop at it or leave it out.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llava_saep.constants import DEFAULT_IMAGE_TOKEN
from llava_saep.data.conversation import Role, Turn, count_image_markers, place_image_markers
from llava_saep.errors import UserError

logger = logging.getLogger(__name__)

ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}
SYSTEM_ROLE = "system"

MALFORMED = "malformed record"
BAD_TURN_ORDER = "bad order of turns"
EMPTY_ANSWER = "empty answer"
MARKER_MISMATCH = "image markers do not match images"
NOT_A_CAPTION = "not a caption"
REFUSED_BY_TEMPLATE = "refused by the template"
MISSING_IMAGE = "missing image"
UNREADABLE_IMAGE = "unreadable image"
TOO_LONG = "longer than max_length"
IMAGE_CUT = "image cut by max_length"
NO_SUPERVISED_TOKEN = "no supervised token"
UNKNOWN_TOKEN = "token without an embedding"

CAUSES = (
    MALFORMED,
    BAD_TURN_ORDER,
    EMPTY_ANSWER,
    MARKER_MISMATCH,
    NOT_A_CAPTION,
    REFUSED_BY_TEMPLATE,
    MISSING_IMAGE,
    UNREADABLE_IMAGE,
    TOO_LONG,
    IMAGE_CUT,
    NO_SUPERVISED_TOKEN,
    UNKNOWN_TOKEN,
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
        super().__init__(message)
        self.source = source
        self.cause = cause


def bad_sample(source: SampleSource, cause: str, problem: str) -> BadSampleError:
    """Make the error for a sample; `problem` continues "FILE: sample INDEX (id ID): "."""
    return BadSampleError(f"{source}: {problem}", source, cause)


class Record(NamedTuple):
    """One usable conversation: no empty answer, and unless the template takes any order, alternating from the user on.

    Attributes:
        turns: with each turn's lone image marker at its front.
        images: paths relative to the image folder, in the order of the markers. Without any, "<image>" in a turn is
            text like any other, as in LLaVA.
        system: what stands in place of the template's own system prompt.
        lost_greeting: an answer before the first question was left out.
    """

    source: SampleSource
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    system: str | None = None
    lost_greeting: bool = False


def read_records(
    path: str | os.PathLike[str],
    *,
    use_im_start_end: bool = False,
    image_marker: str = DEFAULT_IMAGE_TOKEN,
    any_order: bool = False,
    on_bad_record: Callable[[BadSampleError], None] | None = None,
) -> list[Record]:
    """Read and check a conversation file; what LLaVA leaves out or takes for text is counted in a warning.

    Args:
        path: a JSON list, or with suffix .jsonl one JSON object per line.
        use_im_start_end: wrap image markers in "<im_start>" and "<im_end>".
        image_marker, any_order: the template's.
        on_bad_record: called with what is wrong with a record, which is then left out; without it that is raised.
    Raises:
        UserError: the file is missing, not JSON (with line and column), not a list, or empty.
        BadSampleError: the first record that cannot be used, in a .jsonl file also a line that is not JSON.
    """
    path = os.fspath(path)
    raw_records = _read_json_lines(path) if path.endswith(".jsonl") else _read_json_list(path)
    if not raw_records:
        raise UserError(f"{path}: holds no records")
    options = {"use_im_start_end": use_im_start_end, "image_marker": image_marker, "any_order": any_order}
    records = []
    for index, raw in enumerate(raw_records):
        try:
            if isinstance(raw, BadSampleError):
                raise raw
            records.append(parse_record(raw, path, index, **options))
        except BadSampleError as error:
            if on_bad_record is None:
                raise
            on_bad_record(error)
    _warn_about(
        [record for record in records if record.lost_greeting],
        f"%s: %d samples start with an answer, which is left out as in LLaVA; the first: {_SOURCE}",
    )
    _warn_about(
        [record for record in records if not record.images and count_image_markers(record.turns)],
        f"%s: %d samples have {DEFAULT_IMAGE_TOKEN} in their text but no 'image'; it is taken for text, as in LLaVA. "
        f"Should an image be shown there, its file is missing from the record; the first: {_SOURCE}",
    )
    return records


_SOURCE = "sample %d (id %r)"


def _warn_about(records: Sequence[Record], message: str) -> None:
    if records:
        first = records[0].source
        logger.warning(message, first.path, len(records), first.index, first.id)


def parse_record(
    raw: object,
    path: str,
    index: int,
    *,
    use_im_start_end: bool = False,
    image_marker: str = DEFAULT_IMAGE_TOKEN,
    any_order: bool = False,
) -> Record:
    """Check one record of a conversation file and bring it into the form that templates take.

    An answer before the first question is left out, as LLaVA does, unless the template takes any order.

    Raises:
        BadSampleError: a field is missing or of the wrong type, a role is unknown, turns do not alternate, an answer
            is empty, or the number of image markers is not the number of images.
    """
    source = SampleSource(path, index, raw.get("id") if isinstance(raw, dict) else None)
    if not isinstance(raw, dict):
        raise bad_sample(source, MALFORMED, f"is a {type(raw).__name__}, expected an object")
    images = _parse_images(raw.get("image"), source)
    system, turns = _parse_turns(raw.get("conversations"), source)
    lost_greeting = not any_order and bool(turns) and turns[0].role == "assistant"
    turns = turns[lost_greeting:]
    _check_answers(turns, source)
    if not any_order:
        _check_turn_order(turns, source)
    if images:
        _check_markers(turns, images, source)
        turns = [Turn(turn.role, place_image_markers(turn.text, use_im_start_end, image_marker)) for turn in turns]
    return Record(source, tuple(turns), images, system, lost_greeting)


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
    text = _read_text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: is not JSON: {error.msg} at line {error.lineno} column {error.colno}{_hint(error)}"
        ) from error
    if not isinstance(content, list):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}, expected a list of LLaVA records")
    return content


def _hint(error: json.JSONDecodeError) -> str:
    if error.msg == "Extra data":
        return " (one object per line? then name the file .jsonl)"
    return _CUT_OFF if _ends_too_soon(error) else ""


_CUT_OFF = "; it ends in the middle of a record, so it was cut off when it was written or copied: get it again"


def _ends_too_soon(error: json.JSONDecodeError) -> bool:
    """Whether the text stops where more must follow."""
    text = error.doc.rstrip()
    return bool(text) and (error.msg.startswith("Unterminated string") or error.pos >= len(text))


def _read_json_lines(path: str) -> list[object]:
    """Return the objects, and for a line that is none the error that says so."""
    lines = [(number, line) for number, line in enumerate(_read_text(path).split("\n"), start=1) if line.strip()]
    return [_parse_line(line, number, SampleSource(path, index)) for index, (number, line) in enumerate(lines)]


def _parse_line(line: str, number: int, source: SampleSource) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        hint = _CUT_OFF if _ends_too_soon(error) else ""
        return bad_sample(source, MALFORMED, f"line {number} is not JSON: {error.msg} at column {error.colno}{hint}")


def _parse_images(value: object, source: SampleSource) -> tuple[str, ...]:
    if value is None:
        return ()
    images = value if isinstance(value, list) else [value]
    if not all(isinstance(image, str) and image for image in images):
        raise bad_sample(source, MALFORMED, f"'image' is {value!r}, expected a file name or a list of them")
    return tuple(images)


def _parse_turns(value: object, source: SampleSource) -> tuple[str | None, list[Turn]]:
    """Return the text of a first turn from "system", if there is one, and the other turns."""
    if not isinstance(value, list) or not value:
        found = "is missing" if value is None else f"is {_shortened(value)}"
        raise bad_sample(
            source,
            MALFORMED,
            f"'conversations' {found}, expected a list of {{'from': 'human' or 'gpt', 'value': text}}",
        )
    for position, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            raise bad_sample(
                source, MALFORMED, f"turn {position} is {_shortened(turn)}, expected {{'from': ..., 'value': text}}"
            )
    system = value[0]["value"] if value[0]["from"] == SYSTEM_ROLE else None
    first = 0 if system is None else 1
    return system, [
        Turn(_role(turn["from"], position, source), turn["value"]) for position, turn in enumerate(value[first:], first)
    ]


def _role(speaker: object, position: int, source: SampleSource) -> Role:
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(map(repr, ROLES))
        hint = f"; only the first turn may be from {SYSTEM_ROLE!r}" if speaker == SYSTEM_ROLE else ""
        raise bad_sample(source, MALFORMED, f"turn {position} is from {speaker!r}, expected one of {known}{hint}")
    return role


def _check_answers(turns: list[Turn], source: SampleSource) -> None:
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    if not answers:
        raise bad_sample(source, NO_SUPERVISED_TOKEN, "has no question with an answer; there is nothing to learn")
    if "" in answers:
        raise bad_sample(
            source, EMPTY_ANSWER, f"its answer {answers.index('') + 1} is empty; there is nothing to learn"
        )


def _check_turn_order(turns: list[Turn], source: SampleSource) -> None:
    for position, turn in enumerate(turns):
        if turn.role != ("user" if position % 2 == 0 else "assistant"):
            raise bad_sample(
                source, BAD_TURN_ORDER, "two turns in a row are from the same side; 'human' and 'gpt' must alternate"
            )


def _check_markers(turns: list[Turn], images: tuple[str, ...], source: SampleSource) -> None:
    """Every image needs its marker: LLaVA drops the second of two markers in a turn, and ignores an unmarked image."""
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
