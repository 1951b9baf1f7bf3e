"""Who may see the page: names and passwords from a file, as hashes or, where nobody else can read it, as they are."""

import asyncio
import base64
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

from llava_saep.errors import UserError

_PREFIX = "scrypt$"
_COST = {"n": 2**14, "r": 8, "p": 1}  # 16 MB and some hundredths of a second a try
_SECONDS_AFTER_A_MISTAKE = 1.0


def hash_password(password: str) -> str:
    """Make a line's second half from a password: `scrypt$salt$hash`, both in base64."""
    salt = secrets.token_bytes(16)
    digest = hashlib.scrypt(password.encode(), salt=salt, **_COST)
    return _PREFIX + "$".join(base64.b64encode(part).decode() for part in (salt, digest))


def is_right_password(password: str, stored: str) -> bool:
    """Compare in a time that tells nothing of the stored one."""
    if not stored.startswith(_PREFIX):
        return hmac.compare_digest(password.encode(), stored.encode())
    salt, digest = (base64.b64decode(part) for part in stored.removeprefix(_PREFIX).split("$"))
    return hmac.compare_digest(hashlib.scrypt(password.encode(), salt=salt, **_COST), digest)


def read_accounts(path: str | Path) -> dict[str, str]:
    """Read lines of `name:password` or `name:scrypt$...`; empty ones and those that begin with # are left out.

    Raises:
        UserError: the file is missing, holds passwords and can be read by others, or a line is no account.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--auth-file {path}: cannot be read ({error})") from error
    accounts: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            name, colon, password = line.strip().partition(":")
            if not (name.strip() and colon and password and _is_complete(password)):
                raise UserError(f"--auth-file {path}, line {number}: expected name:password or name:scrypt$...")
            if name.strip() in accounts:
                raise UserError(f"--auth-file {path}, line {number}: the name {name.strip()!r} occurs twice")
            accounts[name.strip()] = password
    if not accounts:
        raise UserError(f"--auth-file {path} holds no account; write lines of name:password")
    _refuse_readable_passwords(path, accounts)
    return accounts


def password_check(accounts: dict[str, str]) -> Callable[[str, str], Awaitable[bool]]:
    """Return what Gradio asks with a name and a password; a wrong one costs a second, and so does an unknown name."""
    stand_in = hash_password(secrets.token_hex(16))

    async def is_allowed(name: str, password: str) -> bool:
        stored = accounts.get(name, stand_in)
        if await asyncio.to_thread(is_right_password, password, stored) and name in accounts:
            return True
        await asyncio.sleep(_SECONDS_AFTER_A_MISTAKE)
        return False

    return is_allowed


def _is_complete(password: str) -> bool:
    if not password.startswith(_PREFIX):
        return True
    try:
        salt, digest = (base64.b64decode(part, validate=True) for part in password.removeprefix(_PREFIX).split("$"))
    except ValueError:
        return False
    return len(digest) == 64 and len(salt) > 0


def _refuse_readable_passwords(path: Path, accounts: dict[str, str]) -> None:
    is_plain = any(not password.startswith(_PREFIX) for password in accounts.values())
    if is_plain and os.name == "posix" and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(
            f"--auth-file {path} holds passwords as they are, and others than its owner may read it: run chmod 600 "
            f"{path}, or store hashes (llava-saep demo --hash-password)"
        )
