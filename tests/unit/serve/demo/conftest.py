"""One launched page for all tests of this folder, in front of an engine whose answers are known."""

import ipaddress
import sys

import pytest

from llava_saep.serve.limits import Limits
from tests.fixtures.demo_page import PageClient, launched
from tests.fixtures.engines import ScriptedEngine
from tests.fixtures.tiny import write_image

LIMITS = Limits(max_image_bytes=200_000, max_image_pixels=100_000, max_request_bytes=400_000, max_images_per_message=2)


class DemoPage:
    """The page, with what tests look at behind it."""

    def __init__(self, engine, services, address, likes):
        self.engine = engine
        self.services = services
        self.address = address
        self.likes = likes

    def open(self, **kwargs) -> PageClient:
        return PageClient(self.address, **kwargs)


@pytest.fixture(scope="session")
def asked_hosts():
    """Addresses and names outside of this machine that this process has asked for since the fixture was made."""
    asked, is_over = [], []

    def note(event, arguments):
        if is_over or event not in ("socket.connect", "socket.getaddrinfo"):
            return
        host = arguments[1][0] if event == "socket.connect" and isinstance(arguments[1], tuple) else arguments[0]
        if isinstance(host, (str, bytes)) and not _is_own(host):
            asked.append(host)

    sys.addaudithook(note)  # cannot be taken away
    yield asked
    is_over.append(True)


def _is_own(host):
    host = host.decode() if isinstance(host, bytes) else host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "")


@pytest.fixture(scope="session")
def launched_page(tmp_path_factory, asked_hosts):
    engine = ScriptedEngine(["Hello", " there"])
    likes = tmp_path_factory.mktemp("likes") / "likes.jsonl"
    with launched({"scripted": engine}, limits=LIMITS, feedback_file=likes) as (services, address):
        yield DemoPage(engine, services, address, likes)


@pytest.fixture
def page(launched_page):
    """The page with an engine that has forgotten the test before."""
    engine = launched_page.engine
    engine.__init__(["Hello", " there"])
    yield launched_page
    engine.may_go_on.set()
    launched_page.services.stop_all()


@pytest.fixture
def picture(tmp_path):
    return write_image(tmp_path / "picture.png", height=20, width=30)
