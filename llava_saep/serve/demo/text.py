"""Text on its way to the page: nothing that a visitor, a model or a file name brings may become markup there."""

import html
import logging
import re
import secrets
from pathlib import PurePosixPath

from llava_saep.errors import UserError
from projectors import ProjectorError

logger = logging.getLogger(__name__)

_ABSOLUTE_PATH = re.compile(r"(?<![\w:/.])/(?:[^\s/'\"]+/)+[^\s/'\",;:)]*")


def as_html(text: str) -> str:
    """Text as it stands, where the page renders HTML."""
    return html.escape(text, quote=True)


def without_paths(text: str) -> str:
    """Leave of each absolute path its last part, which says what is meant and not where the server keeps it."""
    return _ABSOLUTE_PATH.sub(lambda match: PurePosixPath(match.group()).name, text)


def told(error: Exception) -> str:
    """What a visitor is told of an error: a mistake's own words, and of anything else a number that the log explains.

    Call it where the error is handled; the log gets its traceback.
    """
    if isinstance(error, (UserError, ProjectorError)):
        return without_paths(str(error))
    number = secrets.token_hex(4)
    logger.error("internal error %s", number, exc_info=error)
    return f"Internal error {number}. Whoever runs this page finds its cause in the server's log."
