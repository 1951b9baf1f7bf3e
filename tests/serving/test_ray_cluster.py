"""`llava-saep serve` on a Ray that runs already (RAY_ADDRESS), as on a cluster; here of one machine."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.fixtures.programs import free_port, running

pytest.importorskip("ray", reason="needs the extra serve: pip install -e '.[serve]'")
pytestmark = pytest.mark.slow


@pytest.fixture
def cluster():
    """A Ray of two cores; yields its process and the environment that leads to it."""
    port = free_port()
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp"
    ) as folder:  # a longer name would be too long for sockets
        environment = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        ray = Path(sys.executable).with_name("ray")
        flags = ["--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
        command = [ray, "start", "--block", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000", *flags]
        log = Path(folder, "log")
        with log.open("w") as output:
            variables = {**os.environ, **environment}
            process = subprocess.Popen(command, env=variables, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 60
            while "Ray runtime started" not in log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield psutil.Process(process.pid), environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            for left in [process, *psutil.Process(process.pid).children(recursive=True)]:
                left.kill()
            process.wait(10)


def replicas(cluster):
    return [child for child in cluster.children(recursive=True) if child.name().startswith("ray::ServeRepli")]


def ask(program):
    address = program.wait_for(r"Serving at (http://\S+)/v1", seconds=120)[1]
    fields = {"model": "model", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "temperature": 0}
    return httpx.post(f"{address}/v1/chat/completions", json=fields, timeout=60).raise_for_status()


def test_replicas_of_a_killed_program_are_taken_over_and_the_cluster_stays(cluster, model_folder, tmp_path):
    ray, environment = cluster
    arguments = ("serve", "--model-path", model_folder, "--device", "cpu", "--replicas", "1", "--port", "0")
    with running(*arguments, log=tmp_path / "first", environment=environment) as program:
        ask(program)
        assert len(replicas(ray)) == 1
        program.process.send_signal(signal.SIGKILL)
        program.process.wait(10)
    assert len(replicas(ray)) == 1, "a cluster's replicas belong to the cluster"
    with running(*arguments, log=tmp_path / "second", environment=environment) as program:
        ask(program)
        assert len(replicas(ray)) == 1
        assert program.end() == 0
    _, alive = psutil.wait_procs(replicas(ray), timeout=20)
    assert not alive
    assert ray.is_running()
