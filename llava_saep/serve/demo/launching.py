"""Serving the page with everything off that it does not need: share links, analytics, other hosts, APIs, files."""

import os
import secrets
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.middleware import Middleware

from llava_saep.serve.demo.pictures import write_privately
from llava_saep.serve.demo.protection import Protection
from llava_saep.serve.demo.services import DemoServices
from llava_saep.serve.demo.style import CSS, SECTIONS_CSS, theme

_THREADS_BESIDE_ANSWERS = 40


@contextmanager
def working_folder() -> Iterator[Path]:
    """A private temporary folder for uploads and previews, where Gradio keeps its files too; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="llava-saep-demo-") as name:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = str(Path(name) / "uploads")
        try:
            yield Path(name)
        finally:
            os.environ.pop("GRADIO_TEMP_DIR") if before is None else os.environ.update(GRADIO_TEMP_DIR=before)


def storage_secret(history_folder: Path | None) -> str:
    """The key of what browsers keep: beside the chats where these outlive the server, so that it does too."""
    if history_folder is None:
        return secrets.token_hex(16)
    path = history_folder / "browser.key"
    if not path.exists():
        write_privately(path, secrets.token_hex(16).encode())
    return path.read_text(encoding="ascii").strip()


def launch(
    page,
    services: DemoServices,
    *,
    host: str,
    port: int,
    is_allowed: Callable[[str, str], Awaitable[bool]] | None,
    root_path: str = "",
    opens_browser: bool = False,
) -> str:
    """Serve the page in threads of its own, and return its address.

    Args:
        page: of `build_page`.
        port: a free one.
        is_allowed: asked with name and password; None: nobody is asked.
        root_path: where a proxy shows the page, where that is not its root.
    """
    limits = services.settings.limits
    page.queue(api_open=False, max_size=2 * (limits.max_queue + 1), default_concurrency_limit=4)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        auth=is_allowed,
        root_path=root_path or None,
        share=False,
        inbrowser=opens_browser,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        strict_cors=True,
        allowed_paths=[],
        max_file_size=limits.max_image_bytes,
        max_threads=_THREADS_BESIDE_ANSWERS + limits.max_queue,
        state_session_capacity=1000,
        theme=theme(),
        css=CSS + SECTIONS_CSS,
        app_kwargs={
            "middleware": [
                Middleware(
                    Protection,
                    max_request_bytes=limits.max_request_bytes,
                    uploads=services.uploads,
                )
            ]
        },
    )
    return address
