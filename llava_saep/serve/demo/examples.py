"""Pictures to try a model with, drawn when they are wanted, so that none has to be shipped or fetched."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_SIDE = 336


@dataclass(frozen=True)
class Example:
    """A question about pictures that are drawn."""

    name: str
    question: str
    draw: tuple[Callable[[], Image.Image], ...]


def _canvas(colour: str = "#f7f5f0") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (_SIDE, _SIDE), colour)
    return image, ImageDraw.Draw(image)


def draw_shapes() -> Image.Image:
    """A red square, a blue circle and a yellow triangle."""
    image, draw = _canvas()
    draw.rectangle((32, 110, 132, 210), fill="#d33c32")
    draw.ellipse((190, 60, 300, 170), fill="#2f6fc4")
    draw.polygon(((170, 300), (240, 190), (310, 300)), fill="#eab62c")
    return image


def draw_scene() -> Image.Image:
    """A house beside a tree under a sun."""
    image, draw = _canvas("#bfe0f5")
    draw.rectangle((0, 240, _SIDE, _SIDE), fill="#7db35a")
    draw.ellipse((250, 24, 310, 84), fill="#f6d04d")
    draw.rectangle((48, 160, 168, 270), fill="#e8d3b0", outline="#8a6d46", width=3)
    draw.polygon(((36, 160), (108, 96), (180, 160)), fill="#a4432f")
    draw.rectangle((94, 206, 124, 270), fill="#6b4a2b")
    draw.rectangle((236, 190, 254, 272), fill="#76502e")
    draw.ellipse((200, 110, 292, 208), fill="#3f7d3a")
    return image


def draw_chart() -> Image.Image:
    """A bar chart of four labelled bars."""
    image, draw = _canvas("#ffffff")
    font = ImageFont.load_default(size=18)
    draw.line((40, 290, 310, 290), fill="#444444", width=2)
    bars = (("A", 120, "#4c78a8"), ("B", 210, "#f58518"), ("C", 70, "#54a24b"), ("D", 160, "#b279a2"))
    for index, (label, height, colour) in enumerate(bars):
        left = 58 + 64 * index
        draw.rectangle((left, 290 - height, left + 40, 290), fill=colour)
        draw.text((left + 14, 298), label, fill="#222222", font=font)
    return image


def draw_clock() -> Image.Image:
    """A clock at ten past ten."""
    image, draw = _canvas()
    draw.ellipse((48, 48, 288, 288), fill="#ffffff", outline="#333333", width=6)
    font = ImageFont.load_default(size=22)
    for hour in range(1, 13):
        angle = math.radians(30 * hour - 90)
        draw.text(
            (168 + 96 * math.cos(angle), 168 + 96 * math.sin(angle)), str(hour), fill="#222222", font=font, anchor="mm"
        )
    for degrees, length, width in ((305, 56, 9), (60, 84, 5)):
        angle = math.radians(degrees - 90)
        draw.line(
            (168, 168, 168 + length * math.cos(angle), 168 + length * math.sin(angle)), fill="#111111", width=width
        )
    return image


EXAMPLES = (
    Example("Shapes", "What is left of the blue circle?", (draw_shapes,)),
    Example("Scene", "Describe this picture in one sentence.", (draw_scene,)),
    Example("Chart", "Which bar is the highest?", (draw_chart,)),
    Example("Two pictures", "What do these two pictures have in common?", (draw_scene, draw_clock)),
)


def write_examples(folder: Path) -> list[tuple[Example, list[Path]]]:
    """Draw all pictures into files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for example in EXAMPLES:
        paths = []
        for draw in example.draw:
            path = folder / f"{draw.__name__.removeprefix('draw_')}.png"
            if not path.exists():
                draw().save(path)
            paths.append(path)
        written.append((example, paths))
    return written
