"""`llava-saep serve --replicas`: the same answers as in process, and what happens when it is too much, or one dies.

One server with two replicas is started for all tests of this file, which come in the order of what they leave behind.
"""

import contextlib
import os
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from llava_saep.errors import UserError
from llava_saep.generation import GenerationOptions, LocalEngine
from llava_saep.serve.remote import Endpoint, remote_engines
from tests.fixtures.model import write_model
from tests.fixtures.programs import Program, listeners, running
from tests.fixtures.tiny import write_image

pytest.importorskip("ray", reason="needs the extra serve: pip install -e '.[serve]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KEY = "a-key-of-the-tests-alone"
LONG = GenerationOptions(max_new_tokens=400)
QUESTION = [{"role": "user", "content": "What is shown?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("replicas"))


@pytest.fixture(scope="module")
def ray_folder():
    # Not below pytest's: the names of Ray's sockets would be too long for a socket.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        yield folder


def serve(model, ray_folder, log, *flags):
    environment = {"RAY_TMPDIR": ray_folder, "RAY_ADDRESS": "", "LLAVA_SAEP_API_KEY": KEY}
    arguments = ("--model-path", model, "--port", "0", "--device", "cpu", "--num-cpus-per-replica", "0.5", *flags)
    return running("serve", *arguments, log=log, environment=environment)


@pytest.fixture(scope="module")
def server(model, ray_folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(model, ray_folder, log, "--replicas", "2", "--max-queue", "2") as program:
        program.url = program.wait_for(r"Serving at (http://\S+)/v1", seconds=200)[1]
        yield program


@pytest.fixture(scope="module")
def engine(server):
    engine = remote_engines(Endpoint(url=server.url, api_key=KEY))["model"]
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def local(model):
    engine = LocalEngine.from_pretrained(model, device="cpu")
    yield engine
    engine.close()


def replicas(server: Program) -> list[psutil.Process]:
    return [process for process in server.family() if process.name().startswith("ray::ServeRepli")]


def wait_until(condition, *, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} seconds"
        time.sleep(0.2)


def test_streamed_answers_equal_greedy_decoding_in_process_piece_by_piece(engine, local, tmp_path):
    images = [write_image(tmp_path / f"{seed}.png", width=24 + 8 * seed, seed=seed) for seed in range(3)]
    conversations = [QUESTION]
    for image in images:
        content = [{"type": "image", "image": image}, {"type": "text", "text": "Describe it."}]
        conversations.append([{"role": "user", "content": content}])
    options = GenerationOptions(max_new_tokens=60)
    with ThreadPoolExecutor(4) as threads:  # at the same time, on both replicas
        answers = list(threads.map(lambda messages: list(engine.stream(messages, options)), conversations))
    expected = [list(local.stream(messages, options)) for messages in conversations]
    assert answers == expected
    assert len({"".join(answer) for answer in answers}) == 4


def test_a_follow_up_takes_as_much_from_the_cache_as_it_would_of_one_model(engine, local):
    options = GenerationOptions(max_new_tokens=20)
    for subject in ("red", "green", "blue", "yellow"):
        messages = [{"role": "user", "content": f"Which colour is {subject}?"}]
        answer = "".join(engine.stream(messages, options))
        assert answer == "".join(local.stream(messages, options))
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And the circle?"}]
        far, near = engine.stream(messages, options), local.stream(messages, options)
        assert list(far) == list(near)
        assert far.statistics.cached_tokens == near.statistics.cached_tokens, "it went to the other replica"


def test_keys_are_asked_for_at_the_one_door(server):
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/health").status_code == 200
        metrics = client.get("/metrics", headers={"authorization": f"Bearer {KEY}"})
    assert "llava_saep" in metrics.text


def test_nothing_listens_where_another_machine_could_reach_it(server):
    addresses = {address for address, _ in listeners(server.family())}
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_more_than_replicas_answer_and_may_wait_is_refused_with_a_time_to_come_again(server, engine):
    body = {"model": "model", "messages": QUESTION, "max_tokens": 400, "temperature": 0}
    headers = {"authorization": f"Bearer {KEY}"}

    def ask(_):
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)

    with ThreadPoolExecutor(12) as threads:
        responses = list(threads.map(ask, range(12)))
    answered = [response for response in responses if response.status_code == 200]
    refused = [response for response in responses if response.status_code == 503]
    assert len(answered) >= 4, "two are answered and two wait"
    assert refused and len(answered) + len(refused) == 12
    assert all(int(response.headers["retry-after"]) > 0 for response in refused)
    assert all(response.json()["error"]["code"] == "overloaded" for response in refused)
    assert len({response.json()["choices"][0]["message"]["content"] for response in answered}) == 1


def test_hanging_up_frees_the_replica(engine):
    stream = engine.stream(QUESTION, LONG)
    next(stream)
    stream.close()
    started = time.monotonic()
    assert list(engine.stream(QUESTION, GenerationOptions(max_new_tokens=2)))
    assert time.monotonic() - started < 5


def test_killed_replica_is_replaced_while_the_other_answers(server, engine, local):
    expected = list(local.stream(QUESTION, LONG))
    before = replicas(server)
    assert len(before) == 2
    streams = [engine.stream(QUESTION, LONG) for _ in range(2)]  # one on each: the less busy one is asked
    first_pieces = [next(stream) for stream in streams]
    before[0].send_signal(signal.SIGKILL)
    answers = []
    for first, stream in zip(first_pieces, streams, strict=True):
        try:
            answers.append([first, *stream])
        except UserError as error:
            assert "internal error" in str(error)
    assert answers == [expected], "one answer breaks off with its replica, the other goes on to its end"
    for _ in range(5):
        assert list(engine.stream(QUESTION, LONG)) == expected
    wait_until(lambda: len({p.pid for p in replicas(server)} - {before[0].pid}) == 2, seconds=90)
    assert list(engine.stream(QUESTION, LONG)) == expected


def test_questions_that_wait_at_a_killed_replica_are_answered_by_another(server, engine, local):
    expected = list(local.stream(QUESTION, LONG))
    answers, errors = [], []

    def ask():
        try:
            answers.append(list(engine.stream(QUESTION, LONG)))
        except UserError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]  # two on each replica, of which one waits
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    replicas(server)[0].send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert answers.count(expected) == len(answers) >= 3
    assert len(errors) <= 1


def test_sigterm_ends_everything_that_was_started(server):
    family = server.family()
    assert server.end() == 0, server.output[-2000:]
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


def test_replicas_are_added_under_load_and_end_with_a_killed_front_end(model, ray_folder, tmp_path):
    flags = ("--replicas", "1", "--max-replicas", "2", "--upscale-delay-seconds", "1")
    with serve(model, ray_folder, tmp_path / "log", *flags) as server:
        url = server.wait_for(r"Serving at (http://\S+)/v1", seconds=200)[1]
        engine = remote_engines(Endpoint(url=url, api_key=KEY))["model"]
        assert len(replicas(server)) == 1
        stop = threading.Event()

        def ask():
            while not stop.is_set():
                list(engine.stream(QUESTION, LONG))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: len(replicas(server)) == 2, seconds=60)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        family, models = server.family(), replicas(server)
        os.kill(server.process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(models, timeout=30)
        for process in family:  # two small agents of Ray's look for their parent, and then for a log, for minutes
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert not alive, "models stay in memory that nobody can ask"


def test_folder_that_is_no_model_is_named_before_ray_is_started(ray_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with serve(tmp_path / "empty", ray_folder, tmp_path / "log", "--replicas", "2") as server:
        assert server.process.wait(60) == 2
        assert "empty" in server.output and "Traceback" not in server.output
    assert not list(Path(ray_folder).glob("ray/session_*empty*"))
