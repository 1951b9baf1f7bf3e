"""Look inside and Compare below the page: what is drawn and said of a look, what is kept, and two models at once."""

import threading

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from llava_saep.data.images import ImageSize
from llava_saep.errors import UserError
from llava_saep.generation.attention_maps import AnswerPiece, AttentionMaps, ImageAttention
from llava_saep.model.token_layout import WHOLE, Span, TokenLayout, TokenMap
from llava_saep.serve.demo.catalog import ModelCatalog
from llava_saep.serve.demo.compare import CompareSection
from llava_saep.serve.demo.look import Look, LookStore, View, drawn, facts_of, layer_choices
from llava_saep.serve.demo.page import build_page
from llava_saep.serve.demo.services import DemoServices
from llava_saep.serve.demo.settings import DemoSettings
from tests.fixtures.engines import ScriptedEngine

STATISTICS = {
    "image_tokens": 4,
    "prompt_tokens": 30,
    "first_token_seconds": 0.25,
    "completion_tokens": 3,
    "tokens_per_second": 12.0,
}


SIZE = ImageSize(20, 40)


def look(has_places=True, size=SIZE):
    """Two words over 2 x 2 tokens and two layers: one looks at the first token, the other in layer 2 at the last."""
    weights = np.full((2, 2, 4), 0.01, dtype=np.float16)
    weights[:, 0, 0], weights[1, 1, 3] = 0.5, 0.25
    rows, columns = ((Span(0, size.height / 2), Span(size.height / 2, size.height)), (Span(0, 20), Span(20, 40)))
    maps = (TokenMap(WHOLE, rows, columns, 0, 2),) if has_places else ()
    image = ImageAttention(Image.new("RGB", (size.width, size.height)), TokenLayout(size, 4, maps), weights)
    pieces = (AnswerPiece("<b>", 0, 1), AnswerPiece(" cat", 1, 2))
    return Look.of(AttentionMaps(pieces, (image,), 2), "model", "saep", STATISTICS)


def test_a_word_is_said_to_look_where_its_weights_are():
    assert "“&lt;b&gt;” looks most at row 1, column 1 (50.0 %); 53.0 % of its attention" in drawn(look(), View(0))[1]
    assert "“cat” looks most at row 2, column 2 (13.0 %)" in drawn(look(), View(1))[1]  # mean of 25 % and 1 %
    assert "row 2, column 2 (25.0 %)" in drawn(look(), View(1, layers="1"))[1]


def test_only_what_exceeds_the_average_is_left_on_request():
    assert "row 2, column 2 (6.0 %)" in drawn(look(), View(1, only_above=True))[1]  # 13 % less the mean of 1 and 13


def test_grid_is_described_before_a_word_is_chosen():
    drawing, caption = drawn(look(), View())
    assert "saep makes a grid of 2 × 2 tokens of the picture." in caption
    assert drawing.width == 2 * drawing.height


def test_tokens_without_a_place_are_said_to_have_none():
    assert "The 4 tokens that saep makes of this picture have no place on it" in drawn(look(False), View())[1]
    assert "“cat” looks most at token 4;" in drawn(look(False), View(1))[1]


def test_numbers_of_an_answer_are_listed():
    facts = facts_of(look())
    for fact in ("4 tokens per image", "4 image tokens of 30 in the prompt", "0.25 s", "12.0 tokens/s"):
        assert fact in facts


@pytest.mark.parametrize("view", [View(2), View(-1), View(0, picture=1), View(0, layers="2"), View(0, layers="x")])
def test_what_is_not_there_cannot_be_drawn(view):
    with pytest.raises(UserError, match="There is no such"):
        drawn(look(), view)


def test_layers_are_offered_alone_and_in_halves():
    assert [value for _, value in layer_choices(4)] == ["all", "first", "second", "0", "1", "2", "3"]


def test_looks_make_room_for_new_ones_and_large_pictures_are_kept_small():
    large = look(size=ImageSize(3000, 4000))
    assert large.num_bytes < 640 * 640 * 3 + 100
    store = LookStore(max_bytes=2 * look().num_bytes)
    first, second, third = (store.put(look()) for _ in range(3))
    assert store.get(second) and store.get(third)
    for gone in (first, None):
        with pytest.raises(UserError, match="no longer kept"):
            store.get(gone)
    store.discard(third)
    with pytest.raises(UserError, match="no longer kept"):
        store.get(third)


class Visit:
    """What the sections ask of a request."""

    session_hash = "session"
    username = None
    client = None


@pytest.fixture
def compare(tmp_path):
    engines = {"left": ScriptedEngine(("Yes", " it is")), "right": ScriptedEngine(("No",))}
    catalog = ModelCatalog(engines=engines)
    services = DemoServices(catalog, DemoSettings(working_folder=tmp_path))
    sections = []
    build = CompareSection.__init__

    def remember(self, *args, **kwargs):
        sections.append(self)
        build(self, *args, **kwargs)

    CompareSection.__init__ = remember
    try:
        build_page(services, storage_secret="secret")
    finally:
        CompareSection.__init__ = build
    return sections[0], engines


def asked(section, models=("left", "right"), system=""):
    return section.ask({"text": "<i>What?</i>", "files": []}, *models, None, Visit(), system, 0.0, 1.0, 16)


def columns(output):
    return output[3], output[4]


def test_both_models_answer_the_same_question_and_are_counted(compare):
    section, engines = compare
    *_, last = asked(section, system="Be brief.")
    left, right = columns(last)
    assert "Yes it is" in left and "No" in right
    assert "Answer tokens" in left and "tokens/s" in left
    questions = [engine.asked[0][0] for engine in engines.values()]
    assert questions[0] == questions[1]
    assert questions[0][0] == {"role": "system", "content": "Be brief."}


def test_both_write_at_the_same_time(compare):
    """Neither waits for the other: each begins while the other is held back."""
    section, engines = compare
    for engine in engines.values():
        engine.may_go_on.clear()
    outputs = []
    reader = threading.Thread(target=lambda: outputs.extend(asked(section)), daemon=True)
    reader.start()
    for _ in range(100):
        if all(engine.asked for engine in engines.values()):
            break
        reader.join(0.05)
    assert all(engine.asked for engine in engines.values())
    for engine in engines.values():
        engine.may_go_on.set()
    reader.join(10)
    assert "Yes it is" in columns(outputs[-1])[0]


def test_failing_model_is_named_and_the_other_answers(compare):
    section, engines = compare
    engines["left"].error = UserError("the prompt is too <long>")
    engines["right"].error_after_pieces = None
    *_, last = asked(section)
    left, right = columns(last)
    assert "role='alert'>the prompt is too &lt;long&gt;" in left
    assert "No" in right


def test_question_is_shown_as_text(compare):
    section, _ = compare
    first = next(iter(asked(section)))
    assert "&lt;i&gt;What?&lt;/i&gt;" in first[1]


def test_two_models_are_needed(compare, monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Warning", lambda text, **_: said.append(text))
    section, engines = compare
    list(asked(section, models=("left", None)))
    assert "Choose two models" in said[0] and not engines["left"].asked
