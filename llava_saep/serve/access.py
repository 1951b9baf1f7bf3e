"""Who may reach a server: itself alone, unless there is authentication, or its owner says that there need be none."""

import argparse
import errno
import ipaddress
import socket

from llava_saep.errors import UserError
from llava_saep.program import AbbreviatingParser

LOOPBACK_HOST = "127.0.0.1"
UNAUTHENTICATED_FLAG = "--allow-unauthenticated-network-access"
API_KEY_VARIABLE = "LLAVA_SAEP_API_KEY"
"""Environment variable with the key that a server asks for, and that a client presents."""


def add_access_flags(parser: AbbreviatingParser, *, port: int) -> None:
    """Give a parser --host, --port and the flag that gives up authentication."""
    parser.add_flag(
        "host", default=LOOPBACK_HOST, help="address to listen at (default: %(default)s, this machine alone)"
    )
    parser.add_flag("port", type=int, default=port, help="port to listen at (default: %(default)s)")
    parser.add_flag(
        UNAUTHENTICATED_FLAG.removeprefix("--"),
        action="store_true",
        help="with a --host that other machines reach: let whoever reaches it use the model, without a key or password",
    )


def check_access(args: argparse.Namespace, *, has_authentication: bool, how_to_authenticate: str) -> None:
    """Check flags of `add_access_flags`, as `check_host`."""
    check_host(
        args.host,
        has_authentication=has_authentication,
        allows_unauthenticated=args.allow_unauthenticated_network_access,
        how_to_authenticate=how_to_authenticate,
    )


def check_host(host: str, *, has_authentication: bool, allows_unauthenticated: bool, how_to_authenticate: str) -> None:
    """Refuse to be reachable from other machines without authentication.

    Args:
        how_to_authenticate: the program's flags for it, such as "--api-key-file FILE".
    Raises:
        UserError: an address that other machines reach, no authentication, and no flag that gives it up.
    """
    if has_authentication or allows_unauthenticated or is_loopback(host):
        return
    raise UserError(
        f"--host {host} can be reached from other machines, and nothing asks them who they are. Add "
        f"{how_to_authenticate}, or leave --host at {LOOPBACK_HOST}, or add {UNAUTHENTICATED_FLAG}: then everybody who "
        "reaches this port can use the model and keep it busy, and what they send is not encrypted"
    )


def is_loopback(host: str) -> bool:
    """Whether an address, or all addresses of a name, are this machine's own; "" and 0.0.0.0 mean every network.

    Raises:
        UserError: the name is not known.
    """
    if not host:
        return False
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: no such address; {LOOPBACK_HOST} is this machine alone") from error
    return all(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for *_, address in found)


def bind_socket(host: str, port: int) -> socket.socket:
    """Take an address before anything slow is done, so that a port in use is noticed at once; nobody can connect yet.

    Raises:
        UserError: the port is in use or not allowed, or the address is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: expected 1 to 65535, or 0 for any free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen at {host}:{port}: {_reason(error)}") from error
    return listener


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return "the port is in use; end the other program or give another --port (0: any free one)"
    if number == errno.EACCES:
        return "this port needs more rights; give a --port above 1023"
    if number == errno.EADDRNOTAVAIL:
        return "the address belongs to no network of this machine; give another --host"
    return str(error)
