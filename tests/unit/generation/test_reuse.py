"""Going on from earlier turns' caches changes no token: every answer is that of the predictor, which keeps nothing."""

import random
import threading

import psutil
import pytest
import torch
from PIL import Image

from llava_saep.errors import UserError
from llava_saep.generation import EngineSettings, GenerationOptions, LocalEngine, Predictor
from llava_saep.generation.conversation_cache import shared_length
from llava_saep.generation.image_features import content_key
from tests.fixtures.conversations import answered, ask
from tests.fixtures.predictors import tiny_predictor

GREEDY = GenerationOptions(max_new_tokens=12)
MODELS = {
    "saep": {"projector": "saep"},
    "mlp": {"projector": "mlp2x_gelu"},
    "qformer": {"projector": "qformer", "loudness": 2},
    "crops": {"projector": "mlp2x_gelu", "merge_type": "spatial_unpad"},
    "crops with saep": {"projector": "saep", "merge_type": "spatial"},
    "images between markers": {"projector": "mlp2x_gelu", "has_markers": True},
    "qwen3": {"projector": "mlp2x_gelu", "model_type": "qwen3", "head_dim": 8},
}


@pytest.fixture(scope="module", params=MODELS)
def any_predictor(request, tmp_path_factory):
    return tiny_predictor(tmp_path_factory.mktemp("bases"), **MODELS[request.param])


@pytest.fixture(scope="module")
def saep(tmp_path_factory):
    return tiny_predictor(tmp_path_factory.mktemp("bases"), "saep")


@pytest.fixture
def written(monkeypatch):
    """Lists the new tokens of each row that a model generates, whoever asks it."""

    def listen(predictor):
        rows, generate = [], predictor.model.generate

        def recording(**kwargs):
            output = generate(**kwargs)
            rows.extend(output[:, kwargs["input_ids"].shape[1] :].tolist())
            return output

        monkeypatch.setattr(predictor.model, "generate", recording)
        return rows

    return listen


def listen_to_tower(predictor):
    """Return a list that grows with every run of the vision tower."""
    runs = []
    predictor.model.model.vision_tower.register_forward_pre_hook(lambda module, inputs: runs.append(1))
    return runs


def stream(engine, messages, options=GREEDY):
    answer = engine.stream(messages, options)
    return "".join(answer), answer.statistics


def check_equal(engine, rows, messages, options=GREEDY):
    """Ask the engine and the predictor and compare the tokens; returns the answer and its statistics."""
    rows.clear()
    text, statistics = stream(engine, messages, options)
    engine.predictor.generate([messages], options)
    assert rows[0] == rows[1]
    return text, statistics


def test_follow_up_questions_go_on_from_the_cache(any_predictor, images, written):
    engine = LocalEngine(any_predictor, model_id="tiny")
    rows = written(any_predictor)
    messages = ask(images[:1], "What is it?")
    text, first = check_equal(engine, rows, messages)
    assert first.cached_tokens == 0
    messages = answered(messages, text, "Which colour?")
    text, second = check_equal(engine, rows, messages)
    assert second.cached_tokens >= first.prompt_tokens
    with_image = [{"type": "image", "image": images[2]}, {"type": "text", "text": "And this?"}]
    messages = answered(messages, text, with_image)
    text, third = check_equal(engine, rows, messages)
    assert third.image_tokens > first.image_tokens and third.cached_tokens >= second.prompt_tokens
    _, fourth = check_equal(engine, rows, answered(messages, text, "Why?"))
    assert fourth.cached_tokens >= third.prompt_tokens


@pytest.mark.parametrize(
    "settings", [EngineSettings(), EngineSettings(cache="static"), EngineSettings(max_conversations=1)]
)
def test_any_order_of_edits_gives_the_predictors_answers(saep, images, written, settings):
    """Edits, undos, other tries, other images, text alone, in a random order that a seed fixes."""
    engine = LocalEngine(saep, model_id="tiny", settings=settings)
    rows, rng = written(saep), random.Random(0)
    words = ["cat", "dog", "why", "colour", "left", "number two", "</s>", "<image>"]
    conversations = [[]]
    num_reused = 0
    for _ in range(25):
        messages = list(rng.choice(conversations))
        if messages and rng.random() < 0.3:
            messages = messages[: -2 * rng.randint(1, len(messages) // 2)]
        shown = rng.sample(images, rng.choice([0, 0, 1, 2]))
        messages += ask(shown, " ".join(rng.choices(words, k=rng.randint(1, 4))))
        if len(engine.predictor.encode(messages).input_ids) > 460:
            continue
        text, statistics = check_equal(engine, rows, messages)
        num_reused += statistics.cached_tokens > 40
        conversations.append([*messages, {"role": "assistant", "content": text.strip() or "..."}])
        conversations = conversations[-4:]
    assert num_reused > 8


def test_interrupted_answer_is_gone_on_from(saep, images, written):
    engine = LocalEngine(saep, model_id="tiny")
    messages = ask(images[:1], "What is it?")
    answer = engine.stream(messages, GenerationOptions(max_new_tokens=200))
    text = next(answer)
    answer.close()
    assert answer.statistics.finish_reason == "cancelled"
    rows = written(saep)
    _, statistics = check_equal(engine, rows, answered(messages, text.strip(), "Go on."))
    assert statistics.cached_tokens >= answer.statistics.prompt_tokens


def test_another_try_keeps_all_but_the_last_token(saep, images):
    engine = LocalEngine(saep, model_id="tiny")
    messages = ask(images[:1], "What is it?")
    _, first = stream(engine, messages)
    sampled = GenerationOptions(max_new_tokens=12, temperature=2.0, seed=1)
    _, again = stream(engine, messages, sampled)
    assert again.cached_tokens == first.prompt_tokens - 1
    assert stream(engine, messages)[0] == stream(LocalEngine(saep, model_id="fresh"), messages)[0]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prompt_that_ends_with_an_image_is_answered_again(saep, images, written, cache):
    """As the template of pretraining has it: the last token, which is always read anew, is one of the image's."""
    predictor = Predictor(saep.model, saep.processor, template="plain")
    engine, rows = LocalEngine(predictor, model_id="tiny", settings=EngineSettings(cache=cache)), written(saep)
    messages = [{"role": "user", "content": [{"type": "image", "image": images[0]}]}]
    assert [check_equal(engine, rows, messages)[1].cached_tokens for _ in range(2)] == [0, 1]
    engine.close()


def test_same_words_about_another_image_share_what_is_before_it_alone(saep, images, written):
    engine = LocalEngine(saep, model_id="tiny")
    rows = written(saep)
    check_equal(engine, rows, ask(images[:1], "What is it?"))
    _, other = check_equal(engine, rows, ask(images[1:2], "What is it?"))
    assert other.cached_tokens == engine.predictor.encode(ask(images[1:2], "What is it?")).image_spans[0][0]


def test_another_chats_cache_is_left_to_it(saep, images, written):
    """Two chats begin alike; each finds its own later turns again."""
    engine = LocalEngine(saep, model_id="tiny")
    rows = written(saep)
    messages = ask(images[:1], "What is it?")
    text, _ = stream(engine, messages)
    chats = [answered(messages, text, question) for question in ("Is it a very large animal?", "Why not a dog?")]
    answers = [stream(engine, chat) for chat in chats]
    for chat, (answer, statistics) in zip(chats, answers, strict=True):
        _, later = check_equal(engine, rows, answered(chat, answer, "So?"))
        assert later.cached_tokens >= statistics.prompt_tokens


def test_vision_tower_sees_each_image_once(saep, images):
    engine = LocalEngine(saep, model_id="tiny")
    seen = listen_to_tower(saep)
    messages = ask(images[:2], "What are they?")
    text, _ = stream(engine, messages)
    stream(engine, messages)
    stream(engine, answered(messages, text, "Why?"))
    stream(engine, ask(images[1::-1], "The other way round?"))
    stream(engine, ask([Image.open(images[0]).copy()], "The same picture from elsewhere?"))
    assert len(seen) == 2
    stream(engine, ask(images[2:], "Another?"))
    assert len(seen) == 3


def test_nothing_is_kept_where_nothing_shall_be(saep, images, written):
    engine = LocalEngine(saep, model_id="tiny", settings=EngineSettings(max_conversations=0, max_image_bytes=0))
    seen = listen_to_tower(saep)
    messages = ask(images[:1], "What is it?")
    text, _ = stream(engine, messages)
    _, second = stream(engine, answered(messages, text, "Why?"))
    assert second.cached_tokens == 0 and len(seen) == 2
    assert check_equal(engine, written(saep), messages)[1].cached_tokens == 0


def test_memory_stays_within_its_bounds_over_many_chats(saep):
    limit = 200_000
    engine = LocalEngine(saep, model_id="tiny", settings=EngineSettings(max_cache_bytes=limit, max_image_bytes=20_000))
    rng = random.Random(0)
    for index in range(40):
        image = Image.frombytes("RGB", (24, 24), rng.randbytes(24 * 24 * 3))
        stream(engine, ask([image], f"Number {index}?"), GenerationOptions(max_new_tokens=2))
        assert engine._caches.num_bytes <= limit
        assert sum(kept.nbytes for kept in engine._image_features._kept.values()) <= 20_000
    assert 1 <= len(engine._caches._entries) <= 4
    engine.close()
    assert engine._caches.num_bytes == 0


def test_chats_at_the_same_time_do_not_mix(saep, images):
    """Threads hold conversations of three turns, reading them piece by piece."""
    reference = LocalEngine(saep, model_id="fresh", settings=EngineSettings(max_conversations=0))

    def talk(engine, index):
        messages, answers = ask(images[index % 3 : index % 3 + 1], f"What is number {index}?"), []
        for question in ("Why?", f"And {index}?", "So?"):
            answers.append("".join(engine.stream(messages, GREEDY)))
            messages = answered(messages, answers[-1].strip() or "...", question)
        return answers

    expected = [talk(reference, index) for index in range(6)]
    engine = LocalEngine(saep, model_id="tiny", settings=EngineSettings(max_conversations=3))
    found = [None] * 6

    def run(index):
        found[index] = talk(engine, index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


@pytest.mark.parametrize(("model_type", "options"), [("mistral", {}), ("gemma2", {"head_dim": 16})])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_that_forget_are_not_gone_on_from(tmp_path, images, written, model_type, options, cache):
    predictor = tiny_predictor(tmp_path, "mlp2x_gelu", model_type=model_type, **options, sliding_window=20)
    engine = LocalEngine(predictor, model_id="tiny", settings=EngineSettings(cache=cache))
    rows = written(predictor)
    messages = ask(images[:1], "What is it?")
    text, _ = check_equal(engine, rows, messages)
    _, second = check_equal(engine, rows, answered(messages, text, "Which colour?"))
    assert second.cached_tokens == 0


def test_out_of_memory_is_said_and_the_engine_goes_on(saep, images, monkeypatch):
    engine = LocalEngine(saep, model_id="tiny")
    messages = ask(images[:1], "What is it?")
    expected, _ = stream(engine, messages)
    with monkeypatch.context() as patch:
        patch.setattr(saep.model.lm_head, "forward", lambda *args, **kwargs: torch.empty(2**50))
        with pytest.raises(UserError, match="does not fit into the memory of cpu; shorten it or show fewer images"):
            stream(engine, messages)
    assert engine._caches.num_bytes == 0
    assert stream(engine, messages)[0] == expected


def test_memory_of_earlier_chats_is_given_up_for_a_new_one(saep, images, monkeypatch):
    engine = LocalEngine(saep, model_id="tiny")
    stream(engine, ask(images[:1], "What is it?"))
    generate, calls = saep.model.generate, []

    def scarce(**kwargs):
        calls.append(engine._caches.num_bytes)
        if calls[-1]:
            raise torch.OutOfMemoryError("no room")
        return generate(**kwargs)

    monkeypatch.setattr(saep.model, "generate", scarce)
    text, statistics = stream(engine, ask(images[1:2], "And this?"))
    assert text and statistics.cached_tokens == 0 and len(calls) == 2


def test_machine_that_cannot_compile_is_told_so(saep, monkeypatch):
    def fail(**kwargs):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more")

    monkeypatch.setattr(saep.model, "generate", fail)
    with pytest.raises(UserError, match="cannot be compiled here: .* compiler found; leave out --compile"):
        LocalEngine(saep, model_id="tiny", settings=EngineSettings(cache="static", compile=True))


def test_settings_that_do_not_go_together_are_refused(saep):
    with pytest.raises(UserError, match="needs --kv-cache static"):
        EngineSettings(compile=True)
    with pytest.raises(UserError, match="dynamic or static, got 'sliding'"):
        EngineSettings(cache="sliding")
    engine = LocalEngine(saep, model_id="tiny", settings=EngineSettings(cache="static", max_length=80))
    assert engine.description.context_length == 80
    with pytest.raises(UserError, match="the static cache has 80"):
        engine.stream(ask([], "word " * 40), GREEDY)


@pytest.mark.parametrize(
    ("symbols", "others", "length"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3], [1, 5, 3], 1),
        ([1, "a", "a", 2], [1, "a", "a", 3], 3),
        ([1, "a", "a", 2], [1, "b", "b", 2], 1),
        ([1, "a", "a", "a", 2], [1, "a", "a"], 1),
        ([], [1], 0),
    ],
)
def test_shared_beginnings_end_between_images(symbols, others, length):
    assert shared_length(symbols, others) == length


def test_images_are_known_by_their_content():
    image = Image.new("RGB", (4, 2), "red")
    assert content_key(image) == content_key(image.copy())
    others = [Image.new("RGB", (2, 4), "red"), Image.new("RGB", (4, 2), "blue"), image.convert("RGBA")]
    assert len({content_key(other) for other in [image, *others]}) == 4


@pytest.mark.slow
def test_compiled_decoding_writes_the_same(saep, images, written):
    engine = LocalEngine(saep, model_id="tiny", settings=EngineSettings(cache="static", compile=True, max_length=300))
    rows = written(saep)
    messages = ask(images[:1], "What is it?")
    text, _ = check_equal(engine, rows, messages)
    _, second = check_equal(engine, rows, answered(messages, text, "Which colour?"))
    assert second.cached_tokens > 40
    engine.close()


@pytest.mark.slow
def test_resident_memory_does_not_grow_over_hundreds_of_chats(saep):
    """Settings that keep a few chats; the first hundred fill what is kept and the allocator's own stores."""
    engine = LocalEngine(saep, model_id="tiny", settings=EngineSettings(max_cache_bytes=10**6, max_image_bytes=10**5))
    rng, process, resident = random.Random(0), psutil.Process(), []
    for index in range(400):
        image = Image.frombytes("RGB", (200, 200), rng.randbytes(200 * 200 * 3))
        messages = ask([image], f"Number {index}?")
        text, _ = stream(engine, messages, GenerationOptions(max_new_tokens=4))
        stream(engine, answered(messages, text, "Why?"), GenerationOptions(max_new_tokens=4))
        resident.append(process.memory_info().rss)
    # One image alone is 120 kB; 300 of them kept would be 36 MB.
    assert max(resident[-50:]) - max(resident[50:100]) < 10 * 2**20
    engine.close()
