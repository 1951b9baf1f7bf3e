"""Attention drawn over an image: cells of the token grid in a colour per value, with the grid and a legend."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava_saep.data.images import ImageSize
from llava_saep.model.token_layout import Span, TokenLayout, TokenMap

LONGER_SIDE = 640
"""Of a drawn image, in pixels; small images are enlarged, so that a grid over them can be seen."""

# Viridis (CC0), which grows evenly in lightness and is told apart with impaired colour vision; every 1/10 of its way.
_ANCHORS = np.array(
    [
        (68, 1, 84),
        (72, 36, 117),
        (65, 68, 135),
        (53, 95, 141),
        (42, 120, 142),
        (33, 145, 140),
        (34, 168, 132),
        (68, 191, 112),
        (122, 209, 81),
        (189, 223, 38),
        (253, 231, 37),
    ]
)
_WEAKEST, _STRONGEST = 0.25, 0.70
"""Opacity of the lowest and of the highest value, so that the image shows through and hot cells still stand out."""

_LEGEND_HEIGHT, _BARS_HEIGHT = 48, 160
_PIXELS_SHOW = 4
"""Scale from which on an image's own pixels are drawn as squares: smoothed, it would look out of focus."""
_PADDING_COLOUR = (128, 128, 128)
_PANEL, _INK = (24, 28, 36), (236, 238, 242)


@dataclass(frozen=True)
class _Canvas:
    """A window on the plane of an image, in its pixels, drawn at some scale."""

    left: float
    top: float
    width: float
    height: float

    @property
    def scale(self) -> float:
        """Pixels of the drawing per pixel of the image."""
        return LONGER_SIDE / max(self.width, self.height)

    @property
    def size(self) -> ImageSize:
        """Of the drawing."""
        return ImageSize(max(round(self.height * self.scale), 1), max(round(self.width * self.scale), 1))

    def x(self, position: float) -> float:
        """From pixels of the image to pixels of the drawing."""
        return (position - self.left) * self.scale

    def y(self, position: float) -> float:
        """From pixels of the image to pixels of the drawing."""
        return (position - self.top) * self.scale


def draw_attention(
    image: Image.Image,
    layout: TokenLayout,
    values: np.ndarray | None,
    *,
    part: str,
    with_grid: bool,
    title: str = "share of attention per token",
) -> Image.Image:
    """Draw one part's tokens over the image.

    Args:
        image: of the layout's size, or a smaller copy of it.
        values: (tokens,), not negative; None: the grid alone.
        part: which of the layout's maps to draw.
        title: of the legend.
    """
    maps = [token_map for token_map in layout.maps if token_map.part == part]
    canvas = _canvas_around(layout.size, maps)
    drawing = _drawn_image(image, layout.size, canvas)
    if values is not None:
        strongest = max(float(token_map.arrange(values).max()) for token_map in maps)
        for token_map in maps:
            drawing = _with_heat(drawing, canvas, token_map, token_map.arrange(values), strongest)
    if with_grid:
        _draw_grid(drawing, canvas, maps)
    return drawing if values is None else _with_legend(drawing, strongest, title)


def draw_bars(
    image: Image.Image, size: ImageSize, values: np.ndarray | None, *, title: str = "share of attention per token"
) -> Image.Image:
    """Draw the image, and below it a bar for each of the tokens, in their order, where those have no place on it.

    Args:
        size: of the image, which may be a smaller copy here.
        values: (tokens,), not negative; None: the image alone.
    """
    drawing = _drawn_image(image, size, _canvas_around(size, ()))
    if values is None:
        return drawing
    bars, strongest = _bars(values, drawing.width), float(values.max())
    whole = Image.new("RGB", (drawing.width, drawing.height + bars.height), _PANEL)
    whole.paste(drawing, (0, 0))
    whole.paste(bars, (0, drawing.height))
    return _with_legend(whole, strongest, title)


def _bars(values: np.ndarray, width: int) -> Image.Image:
    """(tokens,) -> a drawing of the given width."""
    drawing = Image.new("RGB", (width, _BARS_HEIGHT), _PANEL)
    draw = ImageDraw.Draw(drawing)
    fractions = values / max(float(values.max()), 1e-12)
    edges = np.linspace(0, width, len(values) + 1).round().astype(int)
    for left, right, fraction in zip(edges[:-1], edges[1:], fractions, strict=True):
        top = _BARS_HEIGHT - 1 - round(float(fraction) * (_BARS_HEIGHT - 12))
        colour = tuple(int(channel) for channel in colours(fraction))
        draw.rectangle((left, top, max(right - 2, left), _BARS_HEIGHT), fill=colour)
    return drawing


def as_drawn(image: Image.Image) -> Image.Image:
    """Return an RGB copy that has no more pixels than a drawing shows."""
    copy = image.convert("RGB")
    copy.thumbnail((LONGER_SIDE, LONGER_SIDE), Image.Resampling.LANCZOS)
    return copy


def colours(fractions: np.ndarray) -> np.ndarray:
    """Colour values between 0 and 1: (...) -> (..., 3), 0 to 255."""
    places = np.linspace(0, 1, len(_ANCHORS))
    return np.stack([np.interp(fractions, places, _ANCHORS[:, channel]) for channel in range(3)], axis=-1)


def _canvas_around(size: ImageSize, maps: Sequence[TokenMap]) -> _Canvas:
    """The image and all cells: where it was padded, some lie beside it."""
    rows = [span for token_map in maps for span in token_map.rows]
    columns = [span for token_map in maps for span in token_map.columns]
    left, top = min([0.0, *(span.start for span in columns)]), min([0.0, *(span.start for span in rows)])
    right = max([float(size.width), *(span.end for span in columns)])
    bottom = max([float(size.height), *(span.end for span in rows)])
    return _Canvas(left, top, right - left, bottom - top)


def _drawn_image(image: Image.Image, size: ImageSize, canvas: _Canvas) -> Image.Image:
    drawing = Image.new("RGB", (canvas.size.width, canvas.size.height), _PADDING_COLOUR)
    left, top = round(canvas.x(0)), round(canvas.y(0))
    width, height = round(canvas.x(size.width)) - left, round(canvas.y(size.height)) - top
    if canvas.scale >= _PIXELS_SHOW:
        resampling = Image.Resampling.NEAREST
    else:
        resampling = Image.Resampling.BICUBIC if canvas.scale > 1 else Image.Resampling.LANCZOS
    drawing.paste(image.convert("RGB").resize((max(width, 1), max(height, 1)), resampling), (left, top))
    return drawing


def _with_heat(
    drawing: Image.Image, canvas: _Canvas, token_map: TokenMap, values: np.ndarray, strongest: float
) -> Image.Image:
    """Lay the colours of a map's (rows, columns) over a drawing."""
    rows = _cell_of_each_pixel(token_map.rows, canvas.top, canvas.scale, drawing.height)
    columns = _cell_of_each_pixel(token_map.columns, canvas.left, canvas.scale, drawing.width)
    inside = (rows >= 0)[:, None] & (columns >= 0)
    fractions = (values / max(strongest, 1e-12))[rows][:, columns]
    opacity = np.where(inside, _WEAKEST + (_STRONGEST - _WEAKEST) * fractions, 0.0)[..., None]
    mixed = np.asarray(drawing) * (1 - opacity) + colours(fractions) * opacity
    return Image.fromarray(mixed.round().astype(np.uint8))


def _cell_of_each_pixel(spans: Sequence[Span], start: float, scale: float, length: int) -> np.ndarray:
    """Index of the span that holds the centre of each pixel of a drawing; -1 where none does."""
    centres = start + (np.arange(length) + 0.5) / scale
    index = np.searchsorted([span.start for span in spans], centres, side="right") - 1
    is_inside = (index >= 0) & (centres < np.array([span.end for span in spans])[index])
    return np.where(is_inside, index, -1)


def _draw_grid(drawing: Image.Image, canvas: _Canvas, maps: Sequence[TokenMap]) -> None:
    """Outline all cells, light on dark, so that lines show on any image."""
    draw = ImageDraw.Draw(drawing, "RGBA")
    for token_map in maps:
        x = [canvas.x(edge) for edge in _edges(token_map.columns)]
        y = [canvas.y(edge) for edge in _edges(token_map.rows)]
        for shift, colour in ((1, (0, 0, 0, 70)), (0, (255, 255, 255, 150))):
            for position in x:
                place = min(round(position), drawing.width - 1) + shift
                draw.line((place, y[0], place, y[-1]), fill=colour)
            for position in y:
                place = min(round(position), drawing.height - 1) + shift
                draw.line((x[0], place, x[-1], place), fill=colour)


def _edges(spans: Sequence[Span]) -> list[float]:
    return sorted({edge for span in spans for edge in span})


def _with_legend(drawing: Image.Image, strongest: float, title: str) -> Image.Image:
    """Put a bar of the colours under a drawing, from nothing to the strongest value."""
    width, height = drawing.size
    width = max(width, 320)
    whole = Image.new("RGB", (width, height + _LEGEND_HEIGHT), _PANEL)
    whole.paste(drawing, ((width - drawing.width) // 2, 0))
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(size=16)
    left, right, top = 12, width - 12, height + 9
    ramp = colours(np.linspace(0, 1, right - left))[None].repeat(10, axis=0)
    whole.paste(Image.fromarray(ramp.round().astype(np.uint8)), (left, top))
    draw.text((left, top + 13), "0 %", fill=_INK, font=font)
    draw.text((width // 2, top + 13), title, fill=_INK, font=font, anchor="ma")
    draw.text((right, top + 13), percent(strongest), fill=_INK, font=font, anchor="ra")
    return whole


def percent(share: float) -> str:
    """A share in percent, with as many digits as say something."""
    value = 100 * share
    return f"{value:.1f} %" if value >= 1 or value == 0 else f"{value:.2g} %"
