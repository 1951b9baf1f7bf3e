"""A browser without a window, the demo with models whose answers are known, and a visitor's page."""

import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.browser.demo_page import DemoPage
from tests.browser.demo_server import CHROMIUM, DESKTOP, demo_server
from tests.fixtures.scripted import write_scripted_checkpoint

ANSWER = "The triangle is yellow."
MARKUP = "<img src=x>"


def pytest_collection_modifyitems(items):
    """Mark everything in this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory):
    """A model that answers, one that writes markup for ever, and one that cannot be loaded."""
    folder = tmp_path_factory.mktemp("models")
    write_scripted_checkpoint(folder / "answers", ANSWER)
    write_scripted_checkpoint(folder / "writes", MARKUP, projector="mlp2x_gelu", repeats=True, num_layers=16)
    damaged = shutil.copytree(folder / "answers", folder / "damaged")
    (damaged / "model.safetensors").write_bytes(b"damaged")
    for name in ("answers", "writes", "damaged"):
        shutil.rmtree(folder / name / "bases")
    return folder


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="package")
def demo(models_folder, demo_folder):
    log = demo_folder / "log"
    flags = ["--models-dir", str(models_folder), "--model-path", str(models_folder / "answers")]
    flags += ["--temperature", "0", "--max-requests-per-minute", "1000", "--max-image-pixels", "4000000"]
    with demo_server(flags, log) as address:
        yield address
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="session")
def likes(demo_folder):
    """Where the demo writes likes when no flag names a file."""
    return demo_folder / "demo_likes.jsonl"


@pytest.fixture(scope="package")
def browser():
    """One for this folder's tests; Playwright holds an event loop until its end, and there can be but one."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra test)")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser, demo):
    """Open the demo as a new visitor; afterwards, no request may have gone to another host."""
    contexts, urls = [], []

    def open_(address: str = demo, viewport: dict | None = None, **options) -> DemoPage:
        context = browser.new_context(viewport=viewport or DESKTOP, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: urls.append(request.url))
        page.set_default_timeout(20_000)
        page.goto(address)
        return DemoPage(page)

    yield open_
    for context in contexts:
        context.close()
    hosts = {urlsplit(url).netloc for url in urls if urlsplit(url).scheme not in ("data", "blob")}
    assert all(host.startswith("127.0.0.1:") for host in hosts), hosts


@pytest.fixture
def page(open_page):
    """The demo in a desktop's window."""
    opened = open_page()
    opened.wait_until_ready()
    return opened
