"""A question that waits holds its images and nothing of the request that brought them; what is freed goes back."""

import asyncio
import gc
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from llava_saep.serve.api import create_app
from tests.fixtures.engines import ScriptedEngine
from tests.fixtures.image_files import encoded, gradient
from tests.fixtures.requests import data_url, question

PADDING = 8_000_000


@pytest.mark.parametrize("stream", [False, True])
def test_the_request_is_gone_while_its_question_waits(stream):
    """Its image is a few bytes, and millions of line breaks, which base64 may have."""
    engine = ScriptedEngine()
    engine.may_go_on.clear()
    app = create_app({"scripted": engine})
    small = json.dumps(question(images=[data_url(encoded(gradient())) + "PADDING"], stream=stream))
    before, after = small.encode().split(b"PADDING")

    async def run():
        parts = [lambda: before, lambda: b"\\n" * (PADDING // 2), lambda: after]
        over = asyncio.Event()

        async def receive():
            if parts:
                return {"type": "http.request", "body": parts.pop(0)(), "more_body": bool(parts)}
            await over.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "query_string": b"", "root_path": "",
            "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), "scheme": "http",
        }  # fmt: skip
        tracemalloc.start()
        task = asyncio.create_task(app(scope, receive, send))
        while not engine.streams:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        gc.collect()
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        over.set()
        engine.may_go_on.set()
        await task
        return held, peak

    held, peak = asyncio.run(run())
    assert peak > PADDING > 10 * held


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_of_large_images_goes_back_to_the_system():
    program = """
import psutil
from llava_saep.serve.api.admission import Admission
from llava_saep.serve.limits import Limits
from llava_saep.serve.untrusted import open_untrusted_image
from tests.fixtures.image_files import encoded, gradient
rss = lambda: psutil.Process().memory_info().rss / 2**20
data = encoded(gradient(100, 100).resize((5000, 4000)), "JPEG")
admission = Admission(Limits(), 1, lambda *args: None)
start = rss()
ticket = admission.enter("m")
ticket.take_pixels(20_000_000)
images = [open_untrusted_image(data, Limits()) for _ in range(3)]
held = rss()
del images
ticket.leave()
print(held - start, rss() - start)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[4], check=True
    )
    held, left = map(float, done.stdout.split())
    assert held > 200 and left < 60, done.stdout  # 3 images of 80 MB
