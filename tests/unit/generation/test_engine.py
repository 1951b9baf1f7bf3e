"""The engine: its answers are the predictor's, and reading, stopping, counting and waiting are as promised."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from llava_saep.errors import UserError
from llava_saep.generation import GenerationOptions, LocalEngine
from llava_saep.generation.streams import PieceTimes, StopStringFilter
from tests.fixtures.conversations import answered, ask

GREEDY = GenerationOptions(max_new_tokens=8)
LONG = GenerationOptions(max_new_tokens=300)


@pytest.fixture
def engine(predictor):
    engine = LocalEngine(predictor, model_id="tiny")
    yield engine
    engine.close()


def test_streamed_answer_is_the_predictors(engine, predictor, images):
    conversation = ask(images[:1], "What is it?")
    stream = engine.stream(conversation, GREEDY)
    pieces = list(stream)
    assert "".join(pieces).strip() == predictor.generate([conversation], GREEDY)[0]
    assert all(pieces)
    statistics = stream.statistics
    assert statistics.prompt_tokens == len(predictor.encode(conversation).input_ids)
    assert statistics.image_tokens == predictor.num_image_tokens
    assert (statistics.completion_tokens, statistics.finish_reason) == (8, "length")
    assert 0 < statistics.first_token_seconds <= statistics.seconds


def test_mistakes_are_raised_when_the_question_is_put(engine):
    with pytest.raises(UserError, match="context is 512"):
        engine.stream(ask([], "word " * 600), GREEDY)
    with pytest.raises(UserError, match="role 'robot'"):
        engine.stream([{"role": "robot", "content": "x"}], GREEDY)
    with pytest.raises(UserError, match="num_beams is 2"):
        engine.stream(ask([], "Why?"), GenerationOptions(num_beams=2))


def test_closing_stops_the_model_and_frees_it_for_the_next(engine, images):
    stream = engine.stream(ask(images[:1], "What is it?"), LONG)
    next(stream)
    stream.close()
    stream.close()
    assert stream.statistics.finish_reason == "cancelled"
    assert 0 < stream.statistics.completion_tokens < 300
    assert list(stream) == []
    assert "".join(engine.stream(ask([], "Why?"), GREEDY))


def test_question_that_waits_is_taken_back_at_once(engine, predictor, monkeypatch):
    """Closing it waits for no other answer, which may take minutes."""
    generate, may_go_on = predictor.model.generate, threading.Event()

    def slow(**kwargs):
        may_go_on.wait(30)
        return generate(**kwargs)

    monkeypatch.setattr(predictor.model, "generate", slow)
    first, waiting = engine.stream(ask([], "Why?"), GREEDY), engine.stream(ask([], "When?"), GREEDY)
    waiting.close()
    waiting.close()
    assert list(waiting) == []
    assert waiting.statistics.finish_reason == "cancelled" and waiting.statistics.completion_tokens == 0
    with pytest.raises(RuntimeError):
        first.statistics  # noqa: B018 - it has not even begun
    may_go_on.set()
    assert "".join(first)


def test_stream_that_nobody_reads_any_more_stops(engine, images):
    stream = engine.stream(ask(images[:1], "What is it?"), LONG)
    answer = stream._answer
    next(stream)
    del stream
    deadline = time.monotonic() + 30
    while answer.statistics is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert answer.statistics.finish_reason == "cancelled"


def test_time_limit_ends_an_answer(engine):
    stream = engine.stream(ask([], "Why?"), LONG, max_seconds=1e-6)
    text = "".join(stream)
    assert stream.statistics.finish_reason == "time_limit"
    assert stream.statistics.completion_tokens == 1 and text


def test_statistics_are_there_at_the_end_only(engine):
    stream = engine.stream(ask([], "Why?"), LONG)
    with pytest.raises(RuntimeError, match="has not come to its end"):
        stream.statistics  # noqa: B018
    stream.close()


def test_questions_wait_in_order_and_do_not_mix(engine, predictor, images):
    conversations = [ask(images[i % 3 : i % 3 + 1], f"What is number {i}?") for i in range(6)]
    expected = [predictor.generate([conversation], GREEDY)[0] for conversation in conversations]
    answers = [""] * len(conversations)

    def read(index):
        answers[index] = "".join(engine.stream(conversations[index], GREEDY)).strip()

    threads = [threading.Thread(target=read, args=(index,)) for index in range(len(conversations))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == expected


def test_same_seed_same_answer_and_the_programs_random_numbers_stay(engine):
    options = GenerationOptions(max_new_tokens=20, temperature=5.0, seed=3)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = "".join(engine.stream(ask([], "Why?"), options))
    assert torch.equal(torch.rand(3), expected)
    assert "".join(engine.stream(ask([], "Why?"), options)) == first
    batch = engine.predictor.generate([ask([], "Why?")], options)
    assert engine.predictor.generate([ask([], "Why?")], options) == batch
    other = GenerationOptions(max_new_tokens=20, temperature=5.0, seed=4)
    assert "".join(engine.stream(ask([], "Why?"), other)) != first


def test_error_of_the_models_reaches_the_reader_and_the_engine_goes_on(engine, predictor, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(predictor.model, "generate", fail)
        stream = engine.stream(ask([], "Why?"), GREEDY)
        with pytest.raises(ZeroDivisionError, match="broken"):
            list(stream)
        assert stream.statistics.completion_tokens == 0
    assert "".join(engine.stream(answered(ask([], "Why?"), "So.", "Really?"), GREEDY))


def test_closed_engine_refuses_questions(predictor):
    engine = LocalEngine(predictor, model_id="tiny")
    running = engine.stream(ask([], "Why?"), LONG)
    engine.close()
    assert running.statistics.finish_reason == "cancelled"
    with pytest.raises(UserError, match="tiny was unloaded"):
        engine.stream(ask([], "Why?"), GREEDY)


def test_description_names_the_model(engine, predictor):
    description = engine.description
    assert (description.model_id, description.projector) == ("tiny", predictor.model.config.projector["name"])
    assert (description.template, description.takes_system, description.context_length) == ("v1", True, 512)
    assert (description.device, description.dtype) == ("cpu", "float32")


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a", "b"], "ab"),
        (["a</", "s>b"], "a"),
        (["a<", "b"], "a<b"),
        (["a</", "s"], "a</s"),
        (["  ", " a"], "a"),
        (["one ## two ###", " three"], "one ## two"),
    ],
)
def test_stop_strings_end_a_stream_wherever_the_pieces_are_cut(pieces, expected):
    stop_filter = StopStringFilter(("</s>", "###"))
    assert "".join([*map(stop_filter.feed, pieces), stop_filter.flush()]) == expected


def test_pieces_are_timed_from_the_question(monkeypatch):
    times = PieceTimes(asked=100.0)
    assert (times.num_pieces, times.first_piece_seconds, times.seconds) == (0, 0.0, 0.0)
    clock = iter((101.5, 102.0, 104.0))
    monkeypatch.setattr("llava_saep.generation.streams.time", SimpleNamespace(monotonic=lambda: next(clock)))
    for _ in range(3):
        times.note_piece()
    assert (times.num_pieces, times.first_piece_seconds, times.seconds) == (3, 1.5, 4.0)
