"""Bearer keys: where they come from, and how one that is presented is compared with them.

A key never stands on a command line, which every process of a machine can read.
"""

import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llava_saep.errors import UserError
from llava_saep.serve.access import API_KEY_VARIABLE

logger = logging.getLogger(__name__)

_MIN_KEY_CHARACTERS = 16
_MAKE_ONE = """python -c "import secrets; print(secrets.token_urlsafe(32))" makes one"""


@dataclass(frozen=True)
class ApiKeys:
    """Keys that are let in, as SHA-256 digests; none: everybody is."""

    digests: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, keys: Iterable[str]) -> "ApiKeys":
        """Keep the digests of keys.

        Raises:
            UserError: a key is short enough to be guessed, or cannot stand in a header.
        """
        return cls(tuple(dict.fromkeys(_digest(_checked(key)) for key in keys)))

    def __bool__(self) -> bool:
        return bool(self.digests)

    def identify(self, authorization: str | None) -> str | None:
        """Return a name for the key of an Authorization header (not the key), or None where it is no key of ours.

        All keys are compared, each in constant time: how long it takes tells nothing about them.
        """
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self.digests]
        return given.hex()[:12] if scheme.lower() == "bearer" and any(matches) else None


def read_api_keys(file: str | Path | None, environment: Mapping[str, str] = os.environ) -> ApiKeys:
    """Read keys from a file, one a line (# begins a comment line), and from the environment variable API_KEY_VARIABLE.

    Raises:
        UserError: the file cannot be read or holds no key, or a key is too short.
    """
    keys = [] if file is None else _keys_of_file(Path(file))
    if API_KEY_VARIABLE in environment:
        keys.append(environment[API_KEY_VARIABLE].strip())
    return ApiKeys.of(keys)


def _keys_of_file(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {path}: cannot be read ({error})") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UserError(f"--api-key-file {path}: holds no key; expected one a line. {_MAKE_ONE}")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.warning("--api-key-file %s can be read by other users of this machine; chmod 600 keeps it to you", path)
    return keys


def _checked(key: str) -> str:
    if len(key) < _MIN_KEY_CHARACTERS:
        raise UserError(f"an API key has {len(key)} characters, expected {_MIN_KEY_CHARACTERS} or more; {_MAKE_ONE}")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"an API key holds blanks or characters that are not ASCII; {_MAKE_ONE}")
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
