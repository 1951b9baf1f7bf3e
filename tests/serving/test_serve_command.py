"""`llava-saep serve` as a program: what it prints, checks before it loads a model, and how it ends."""

import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from dataclasses import fields

import httpx
import pytest

from llava_saep.cli import main
from llava_saep.commands.serve import build_parser, name_models
from llava_saep.errors import UserError
from llava_saep.serve.access import bind_socket
from llava_saep.serve.api import create_app
from llava_saep.serve.api.server import build_server, run_server
from llava_saep.serve.limits import Limits
from tests.fixtures.image_files import encoded, gradient
from tests.fixtures.requests import question
from tests.fixtures.servers import REPOSITORY, ServeProcess

KEY = "a-key-of-enough-characters"


def test_flags_change_only_on_purpose():
    """A frozen list: people's scripts depend on these names."""
    flags = {flag for action in build_parser()._actions for flag in action.option_strings if "_" not in flag}
    assert " ".join(sorted(flag.removeprefix("--") for flag in flags - {"-h", "--help"})) == (
        "allow-unauthenticated-network-access allowed-image-hosts api-key-file cached-bytes cached-chats compile "
        "conv-mode device downscale-delay-seconds host kv-cache kv-cache-tokens load-4bit load-8bit "
        "max-generation-seconds max-image-bytes max-image-pixels max-images max-images-per-message max-messages "
        "max-new-tokens max-ongoing-requests max-pixels-in-memory max-prompt-characters max-queue max-replicas "
        "max-request-bytes max-requests-per-minute model-base model-path num-cpus-per-replica num-gpus-per-replica "
        "port replicas trust-projector-code trusted-proxies upscale-delay-seconds"
    )


@pytest.mark.parametrize("limit", fields(Limits), ids=lambda limit: limit.name)
def test_documentation_has_each_limit_with_its_default(limit):
    page = (REPOSITORY / "docs" / "serving.md").read_text()
    flag = f"`--{limit.name.replace('_', '-')}`"
    [row] = [line for line in page.splitlines() if line.startswith("| `--") and flag in line.split(" | ")[0]]
    default = f"{limit.default:,}" if limit.default > 5000 else f"{limit.default:g}"
    assert default in re.split(r"[ ;]+", row.split(" | ")[1])


def test_models_are_called_by_their_folders():
    paths = {"llava-7b": "/a/llava-7b/", "saep": "b/saep", "name": "hub/name"}
    assert name_models(list(paths.values())) == paths
    with pytest.raises(UserError, match="both would be called 'saep'"):
        name_models(["a/saep", "b/saep"])


@pytest.fixture
def loading_fails_the_test(monkeypatch):
    def load(*args, **kwargs):
        pytest.fail("a model is loaded")

    monkeypatch.setattr("llava_saep.generation.LocalEngine.from_pretrained", load)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--host 0.0.0.0", "--allow-unauthenticated-network-access"),
        ("--port 99999", "expected 1 to 65535"),
        ("--api-key-file /nowhere/keys", "--api-key-file /nowhere/keys: cannot be read"),
        ("--max-replicas 2", "--max-replicas is for several replicas; add --replicas N"),
        ("--max-queue -1", "--max-queue must be at least 0"),
        ("--trusted-proxies proxy.example", "'proxy.example' is no address"),
        ("--allowed-image-hosts https://a.example/", "'https://a.example/' is no host name"),
        ("", "no-model"),
    ],
)
def test_mistakes_end_before_a_model_is_loaded(flags, message, tmp_path, capsys, loading_fails_the_test):
    assert main(["serve", "--model-path", str(tmp_path / "no-model"), "--port", "0", *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use_ends_before_a_model_is_loaded(model_folder, capsys, loading_fails_the_test):
    with bind_socket("127.0.0.1", 0) as other:
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "--model-path", str(model_folder), "--port", str(port)]) == 2
    assert f"127.0.0.1:{port}: the port is in use; end the other program or give another" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_server_prints_can_be_tried(model_folder, tmp_path):
    """The curl example, as it stands, in a folder with a photo.jpg."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    (tmp_path / "photo.jpg").write_bytes(encoded(gradient(), "JPEG"))
    with ServeProcess(["--model-path", str(model_folder)], tmp_path / "log", LLAVA_SAEP_API_KEY=KEY) as server:
        assert "model: saep projector, 9 tokens per image, context 512, cpu, float32" in server.introduction
        command = server.introduction.partition("Try:\n")[2]
        environment = {"LLAVA_SAEP_API_KEY": KEY, "PATH": "/usr/bin:/bin"}
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
        assert b'"image_tokens":9' in done.stdout, done
        assert httpx.post(f"{server.address}/v1/chat/completions", json={}).status_code == 401


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_an_answer_end_and_takes_no_new_ones(model_folder, tmp_path, number):
    fields = question(model="model", max_tokens=200, stream=True, temperature=0)
    with ServeProcess(["--model-path", str(model_folder)], tmp_path / "log") as server:
        with httpx.stream("POST", f"{server.address}/v1/chat/completions", json=fields, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(number)
            time.sleep(0.5)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{server.address}/health")
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert server.process.wait(30) == (0 if number == signal.SIGTERM else 130)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_server_says_that_it_is_ready_when_it_can_be_reached():
    """Whoever waits for the words can ask at once."""
    statuses = []

    def on_ready():
        thread = threading.Thread(target=lambda: statuses.append(httpx.get(f"{address}/health").status_code))
        thread.start()
        threads.append(thread)
        with socket.create_connection(bound.getsockname(), timeout=5):  # refused before somebody listens
            statuses.append("connected")

    threads: list[threading.Thread] = []
    with bind_socket("127.0.0.1", 0) as bound:
        address = f"http://127.0.0.1:{bound.getsockname()[1]}"
        server = build_server(create_app({}), on_ready=on_ready)
        serving = threading.Thread(target=run_server, args=(server, bound))
        serving.start()
        while not threads:
            time.sleep(0.01)
        threads[0].join()
        server.should_exit = True
        serving.join(20)
    assert statuses == ["connected", 200]
