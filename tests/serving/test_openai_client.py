"""OpenAI's own client against a real server with a real, tiny model."""

import re
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from PIL import Image

from llava_saep.generation import GenerationOptions
from llava_saep.serve.api import ApiKeys, ApiSettings, create_app
from llava_saep.serve.limits import Limits
from tests.fixtures.image_files import encoded, gradient
from tests.fixtures.requests import data_url
from tests.fixtures.servers import REPOSITORY, serving

KEY = "a-key-of-enough-characters"
SETTINGS = ApiSettings(keys=ApiKeys.of([KEY]), limits=Limits(max_requests_per_minute=10_000))
GREEDY = {"model": "model", "temperature": 0, "max_tokens": 40}


@pytest.fixture(scope="module")
def address(local_engine):
    with serving(create_app({"model": local_engine}, SETTINGS)) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=address, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def messages(text, *images):
    parts = [{"type": "image_url", "image_url": {"url": data_url(encoded(image))}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def greedy(engine, text, *images, **options):
    """What the engine of this process answers, and the statistics of that."""
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    options = GenerationOptions(**{"max_new_tokens": 40} | options)
    with engine.stream([{"role": "user", "content": content}], options) as stream:
        return "".join(stream), stream.statistics


def test_a_completion_is_the_engines_answer(client, local_engine):
    expected, statistics = greedy(local_engine, "What is it?", gradient())
    answer = client.chat.completions.create(messages=messages("What is it?", gradient()), **GREEDY)
    [choice] = answer.choices
    assert choice.message.content == expected != ""
    assert choice.finish_reason == statistics.finish_reason
    assert answer.usage.prompt_tokens == statistics.prompt_tokens
    assert answer.usage.completion_tokens == statistics.completion_tokens
    assert answer.usage.prompt_tokens_details.image_tokens == statistics.image_tokens == 9


def test_a_stream_is_the_engines_answer_with_usage_at_its_end(client, local_engine):
    expected, statistics = greedy(local_engine, "What is it?", gradient())
    chunks = list(
        client.chat.completions.create(
            messages=messages("What is it?", gradient()), stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == expected and len(pieces) > 1
    assert chunks[-1].usage.total_tokens == statistics.prompt_tokens + statistics.completion_tokens
    assert chunks[-2].choices[0].finish_reason == statistics.finish_reason


def test_the_image_reaches_the_model(client):
    texts = {
        client.chat.completions.create(messages=messages("What?", Image.new("RGB", (24, 24), colour)), **GREEDY)
        .choices[0]
        .message.content
        for colour in ("black", "white", "red", "blue")
    }
    assert len(texts) > 1


def test_an_answer_ends_before_a_stop_string(client, local_engine):
    whole, _ = greedy(local_engine, "What is it?", gradient())
    stop = whole.split()[2]
    answer = client.chat.completions.create(messages=messages("What is it?", gradient()), stop=stop, **GREEDY)
    assert answer.choices[0].message.content.rstrip() == whole[: whole.index(stop)].rstrip()
    assert answer.choices[0].finish_reason == "stop"


def test_a_seed_makes_sampling_repeat_itself(client):
    sampled = GREEDY | {"temperature": 1.5, "seed": 7}
    answers = [client.chat.completions.create(messages=messages("What?"), **sampled) for _ in range(2)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_earlier_turns_are_part_of_the_conversation(client, local_engine):
    conversation = [
        *messages("What is it?", gradient()),
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Which one?"},
    ]
    first = client.chat.completions.create(messages=conversation[:1], **GREEDY)
    second = client.chat.completions.create(messages=conversation, **GREEDY)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_the_example_of_the_documentation_works(address, tmp_path, monkeypatch, capsys):
    page = (REPOSITORY / "docs" / "serving.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    for old, new in {
        "http://127.0.0.1:8000/v1": address,
        "any, where none is asked for": KEY,
        "llava-7b-saep": "model",
        "temperature=0": "temperature=0, max_tokens=10",
    }.items():
        assert old in example
        example = example.replace(old, new)
    (tmp_path / "photo.jpg").write_bytes(encoded(gradient(), "JPEG"))
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert "image_tokens=9" in capsys.readouterr().out


def test_models_are_listed(client):
    [model] = client.models.list()
    assert model.id == "model" and client.models.retrieve("model").id == "model"
    assert model.tokens_per_image == 9


def test_a_wrong_key_is_refused(address):
    with openai.OpenAI(base_url=address, api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError, match="the key is missing or wrong"):
            stranger.chat.completions.create(messages=messages("What?"), **GREEDY)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"model": "other"}, openai.NotFoundError, "'other' is not here"),
        ({"n": 2}, openai.BadRequestError, "n is not supported"),
        ({"max_tokens": 500}, openai.BadRequestError, "context"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
    ],
)
def test_mistakes_raise_the_clients_own_errors(client, fields, error, words):
    with pytest.raises(error, match=words):
        client.chat.completions.create(messages=messages("What?"), **GREEDY | fields)


def test_clients_at_once_get_their_own_answers(client, local_engine):
    """Drawn with seeds, since greedy answers of a random model are much alike."""
    questions = [f"What is number {index} of them all?" for index in range(8)]
    images = [Image.new("RGB", (24, 24), (index * 30, 255 - index * 30, 99)) for index in range(8)]
    expected = [greedy(local_engine, questions[seed], images[seed], seed=seed, temperature=1.0)[0] for seed in range(8)]
    assert len(set(expected)) == 8

    def ask(seed):
        fields = GREEDY | {"temperature": 1, "seed": seed}
        conversation = messages(questions[seed], images[seed])
        stream = client.chat.completions.create(messages=conversation, stream=True, **fields)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == expected


def test_hanging_up_stops_the_model(client, local_engine):
    """The next question would otherwise wait for the rest of a long answer."""
    long = GREEDY | {"max_tokens": 300}
    stream = client.chat.completions.create(messages=messages("Tell me all.", gradient()), stream=True, **long)
    next(iter(stream))
    stream.close()
    _, statistics = greedy(local_engine, "Say hello.")
    assert statistics.waiting_seconds < 1
