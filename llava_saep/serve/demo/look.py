"""An answer that was looked into: what is kept of it, and a view of it as a drawing and in words."""

import dataclasses
import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from llava_saep.errors import UserError
from llava_saep.generation.attention_maps import AttentionMaps, ImageAttention
from llava_saep.model.token_layout import TILES, WHOLE
from llava_saep.serve.demo.heat_map import as_drawn, draw_attention, draw_bars, percent
from llava_saep.serve.demo.text import as_html

MAX_KEPT_BYTES = 512 * 10**6
"""Of all visitors' maps together; the oldest make room."""

HINT = "Choose a word of the answer to see where the model looked when it wrote it."


@dataclass(frozen=True)
class Look:
    """An answer that was looked into.

    Attributes:
        statistics: the fields of `AnswerStatistics`; None where the answer was stopped.
    """

    maps: AttentionMaps
    model_id: str
    projector: str
    statistics: Mapping[str, Any] | None

    @classmethod
    def of(cls, maps: AttentionMaps, model_id: str, projector: str, statistics: Mapping[str, Any] | None) -> "Look":
        """Keep of the pictures what is drawn of them."""
        images = tuple(dataclasses.replace(image, image=as_drawn(image.image)) for image in maps.images)
        return cls(dataclasses.replace(maps, images=images), model_id, projector, statistics)

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return sum(image.weights.nbytes + 3 * image.image.width * image.image.height for image in self.maps.images)


@dataclass(frozen=True)
class View:
    """What of it is shown: a word (None: none yet), a picture, a part of it, layers, and how."""

    piece: int | None = None
    picture: int = 0
    part: str = WHOLE
    layers: str = "all"
    with_grid: bool = True
    only_above: bool = False


class LookStore:
    """What visitors look into, by names that nobody guesses. Thread-safe.

    Args:
        max_bytes: above it, what was put in first goes.
    """

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES):
        self.max_bytes = max_bytes
        self._looks: OrderedDict[str, Look] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, look: Look) -> str:
        """Keep it, and return its name."""
        name = secrets.token_hex(8)
        with self._lock:
            self._looks[name] = look
            while len(self._looks) > 1 and sum(kept.num_bytes for kept in self._looks.values()) > self.max_bytes:
                self._looks.popitem(last=False)
        return name

    def get(self, name: str | None) -> Look:
        """Find it again.

        Raises:
            UserError: it had to make room.
        """
        with self._lock:
            look = self._looks.get(name or "")
        if look is None:
            raise UserError("This look inside is no longer kept; choose the answer once more.")
        return look

    def discard(self, name: str | None) -> None:
        """Forget it."""
        with self._lock:
            self._looks.pop(name or "", None)


def drawn(look: Look, view: View) -> tuple[Image.Image, str]:
    """Draw a view, and put it into words as HTML.

    Raises:
        UserError: there is no such word, picture or layer.
    """
    maps = look.maps
    if not 0 <= view.picture < len(maps.images) or not (view.piece is None or 0 <= view.piece < len(maps.pieces)):
        raise UserError("There is no such word or picture; reload the page.")
    image = maps.images[view.picture]
    layers = _layers(view.layers, maps.num_layers)
    values = None if view.piece is None else _values(look, image, view, layers)
    title = "above the answer's average" if view.only_above else "share of attention per token"
    parts = [token_map.part for token_map in image.layout.maps]
    if not parts:
        drawing = draw_bars(image.image, image.layout.size, values, title=title)
        return drawing, _caption(look, image, view, values, layers)
    part = view.part if view.part in parts else WHOLE  # a thin image may have lost its tiles
    drawing = draw_attention(image.image, image.layout, values, part=part, with_grid=view.with_grid, title=title)
    return drawing, _caption(look, image, dataclasses.replace(view, part=part), values, layers)


def _values(look: Look, image: ImageAttention, view: View, layers: range) -> np.ndarray:
    values = image.of_piece(look.maps.pieces[view.piece], layers)
    return np.maximum(values - image.mean(layers).mean(axis=0), 0) if view.only_above else values


def _caption(look: Look, image: ImageAttention, view: View, values: np.ndarray | None, layers: range) -> str:
    """What is drawn, in words."""
    places = _places(look, image, view.part)
    if values is None:
        return note(f"{places} {HINT}")
    piece = look.maps.pieces[view.piece]
    word = f"“{visible(piece.text).strip()}”"
    on_picture = percent(float(image.of_piece(piece, layers).sum()))
    shares = f"{on_picture} of its attention lies on this picture"
    if values.max() <= 0:
        return note(f"{word}: {shares}, nowhere more than on average.")
    return note(f"{word} looks most at {_strongest_place(image, view.part, values)}; {shares}.")


def _strongest_place(image: ImageAttention, part: str, values: np.ndarray) -> str:
    maps = [token_map for token_map in image.layout.maps if token_map.part == part]
    if not maps:
        return f"token {int(values.argmax()) + 1}"
    arranged = [token_map.arrange(values) for token_map in maps]
    best = max(range(len(maps)), key=lambda index: arranged[index].max())
    row, column = divmod(int(arranged[best].argmax()), len(maps[best].columns))
    tile = f" of tile {best + 1}" if len(maps) > 1 else ""
    return f"row {row + 1}, column {column + 1}{tile} ({percent(float(arranged[best].max()))})"


def _places(look: Look, image: ImageAttention, part: str) -> str:
    """Where a picture's tokens lie, in words."""
    count = image.layout.num_tokens
    maps = [token_map for token_map in image.layout.maps if token_map.part == part]
    if not maps:
        return (
            f"The {count} tokens that {look.projector} makes of this picture have no place on it: each is gathered "
            "from all of it. Bars show them in their order."
        )
    grid = f"{len(maps[0].rows)} × {len(maps[0].columns)}"
    whose = {WHOLE: "the picture", TILES: "each of its tiles" if len(maps) > 1 else "its tiles together"}[part]
    of_all = "" if len(image.layout.maps) == 1 else f" ({count} tokens in all)"
    return f"{look.projector} makes a grid of {grid} tokens of {whose}{of_all}."


def facts_of(look: Look) -> str:
    """The numbers of an answer, as HTML of our own."""
    counts = [image.layout.num_tokens for image in look.maps.images]
    facts = [look.model_id, f"{look.projector} projector"]
    facts.append(f"{counts[0]:,} tokens per image" if len(set(counts)) == 1 else f"{counts} tokens per image")
    statistics = look.statistics
    if statistics:
        facts.append(f"{statistics['image_tokens']:,} image tokens of {statistics['prompt_tokens']:,} in the prompt")
        facts.append(f"first token after {statistics['first_token_seconds']:.2f} s")
        if statistics["completion_tokens"] > 1 and statistics["tokens_per_second"]:
            facts.append(f"{statistics['tokens_per_second']:.1f} tokens/s")
    return "<ul class='facts'>" + "".join(f"<li>{as_html(fact)}</li>" for fact in facts) + "</ul>"


def layer_choices(num_layers: int) -> list[tuple[str, str]]:
    halves = [("First half", "first"), ("Second half", "second")] if num_layers > 2 else []
    return [("All layers", "all"), *halves, *((f"Layer {index + 1}", str(index)) for index in range(num_layers))]


def _layers(name: str, num_layers: int) -> range:
    """Layers by the name of a choice; the second half has the middle one of an odd number."""
    named = {"all": range(num_layers), "first": range(num_layers // 2), "second": range(num_layers // 2, num_layers)}
    named |= {str(index): range(index, index + 1) for index in range(num_layers)}
    if name not in named:
        raise UserError("There is no such layer; reload the page.")
    return named[name]


def visible(text: str) -> str:
    """A word as a button shows it."""
    return text.strip() or text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")


def note(text: str) -> str:
    """A sentence of the page, as HTML."""
    return f"<p class='note'>{as_html(text)}</p>"
