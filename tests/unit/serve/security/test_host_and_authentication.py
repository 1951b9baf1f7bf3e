"""A server is reachable from other machines only with authentication, or when its owner gives that up in words."""

import socket

import pytest

from llava_saep.errors import UserError
from llava_saep.program import AbbreviatingParser
from llava_saep.serve.access import add_access_flags, bind_socket, check_access, check_host, is_loopback

NOTHING = {"has_authentication": False, "allows_unauthenticated": False, "how_to_authenticate": "--api-key-file FILE"}


def parsed(*flags):
    parser = AbbreviatingParser()
    add_access_flags(parser, port=8000)
    return parser.parse_args(flags)


def test_without_flags_only_this_machine_reaches_the_server():
    args = parsed()
    assert (args.host, args.port) == ("127.0.0.1", 8000)
    check_access(args, has_authentication=False, how_to_authenticate="a key")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_authentication(host):
    assert is_loopback(host)
    check_host(host, **NOTHING)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.4", "8.8.8.8", "fe80::1", "::ffff:8.8.8.8"])
def test_other_addresses_need_authentication_or_the_flag(host):
    assert not is_loopback(host)
    with pytest.raises(
        UserError, match=r"(?s)--api-key-file FILE.*--allow-unauthenticated-network-access: then everybody"
    ):
        check_host(host, **NOTHING)
    check_host(host, **NOTHING | {"has_authentication": True})
    check_host(host, **NOTHING | {"allows_unauthenticated": True})


def test_a_name_is_loopback_only_where_all_its_addresses_are(monkeypatch):
    found = [(socket.AF_INET, 1, 6, "", (address, 0)) for address in ("127.0.0.1", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    assert not is_loopback("two-faced.example")


def test_the_flag_gives_authentication_up():
    args = parsed("--host", "0.0.0.0", "--allow-unauthenticated-network-access")
    check_access(args, has_authentication=False, how_to_authenticate="a key")
    with pytest.raises(UserError, match="Add a key"):
        check_access(parsed("--host", "0.0.0.0"), has_authentication=False, how_to_authenticate="a key")


def test_a_port_in_use_is_named():
    with bind_socket("127.0.0.1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: the port is in use"):
            bind_socket("127.0.0.1", port)


def test_an_address_of_another_machine_is_named():
    with pytest.raises(UserError, match="belongs to no network of this machine"):
        bind_socket("192.0.2.1", 0)  # TEST-NET-1: nobody has it
