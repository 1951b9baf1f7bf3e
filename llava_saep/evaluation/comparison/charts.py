"""Pictures of a comparison as SVG text inside the page: no library, no colours of their own.

Every element has a class and the page's style sheet gives the classes their colours, so that one picture serves light,
dark and paper. Nothing is told by colour alone: points carry their names, lines have a panel each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from typing import NamedTuple

from llava_saep.evaluation.comparison.results import Curve
from llava_saep.evaluation.comparison.statistics import Interval

_CHARACTER_WIDTH, _LINE_HEIGHT = 6.6, 13.0
"""Of the page's labels, in pixels; a little more than most fonts need."""
_RADIUS = 4.5
_BAR_DISTANCE = 8.0


class Box(NamedTuple):
    """A rectangle in pixels; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "Box") -> float:
        """Area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A named point with an interval in y; `is_reference` marks the one that others are compared with."""

    label: str
    x: float
    y: Interval
    is_reference: bool = False


def svg(width: float, height: float, title: str, elements: Sequence[str], css_class: str = "chart") -> str:
    """A picture with a title that is read aloud."""
    return (
        f'<svg class="{css_class}" role="img" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">'
        f"<title>{escape(title)}</title>{''.join(elements)}</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, css_class: str) -> str:
    return f'<line class="{css_class}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, content: str, css_class: str = "", anchor: str = "start") -> str:
    return f'<text class="{css_class}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover a range: 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


# Accuracy against tokens


def accuracy_against_tokens(points: Sequence[Point], *, width: float = 860, height: float = 440) -> str:
    """Accuracy in per cent over tokens per image on a logarithmic axis, bars: 95 % intervals; "" without points."""
    if not points:
        return ""
    frame = Box(58, 14, width - 16, height - 46)
    to_x = _token_scale([point.x for point in points], frame)
    bounds = [bound for point in points for bound in (point.y.value, point.y.low, point.y.high) if bound is not None]
    margin = 0.06 * (max(bounds) - min(bounds)) + 0.01
    low, high = max(0.0, min(bounds) - margin), min(1.0, max(bounds) + margin)
    to_y = _scale(low, high, frame.bottom, frame.top)
    elements = _accuracy_axis(low, high, to_y, frame)
    elements += _token_axis(sorted({point.x for point in points}), to_x, frame)
    columns = _columns(points, to_x)
    places = [(column.x, to_y(point.y.value)) for column, point in zip(columns, points, strict=True)]
    for point, (x, y) in zip(points, places, strict=True):
        if point.y.low is not None and point.y.high is not None:
            elements.append(_line(x, to_y(point.y.low), x, to_y(point.y.high), "whisker"))
        name = "point reference" if point.is_reference else "point"
        elements.append(f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="{_RADIUS}"/>')
    boxes = place_labels(places, [len(point.label) * _CHARACTER_WIDTH for point in points], frame, columns)
    for point, (x, y), box in zip(points, places, boxes, strict=True):
        elements.append(_leader(x, y, box))
        elements.append(_text(box.left + 2, box.bottom - 3, point.label, "label"))
    return svg(width, height, "Accuracy against tokens per image", elements)


class Column(NamedTuple):
    """Where a point stands among those with equally many tokens: its own place, and the outermost ones."""

    x: float
    left: float
    right: float


def _columns(points: Sequence[Point], to_x: Callable[[float], float]) -> list[Column]:
    """Points with equally many tokens stand beside each other, the highest first, so that each has its own bar."""
    columns = []
    for point in points:
        same = sorted((other for other in points if other.x == point.x), key=lambda other: -other.y.value)
        width = _BAR_DISTANCE * (len(same) - 1)
        left = to_x(point.x) - width / 2
        columns.append(Column(left + _BAR_DISTANCE * same.index(point), left, left + width))
    return columns


def _token_scale(tokens: Sequence[float], frame: Box) -> Callable[[float], float]:
    logs = [math.log2(max(count, 1)) for count in tokens]
    if min(logs) == max(logs):
        return lambda _: (frame.left + frame.right) / 2
    scale = _scale(min(logs), max(logs), frame.left + 70, frame.right - 170)
    return lambda count: scale(math.log2(max(count, 1)))


def _accuracy_axis(low: float, high: float, to_y: Callable[[float], float], frame: Box) -> list[str]:
    elements = []
    for tick in nice_ticks(100 * low, 100 * high):
        y = to_y(tick / 100)
        elements += [_line(frame.left, y, frame.right, y, "grid"), _text(frame.left - 8, y + 4, f"{tick:g}", "", "end")]
    middle = (frame.top + frame.bottom) / 2
    name = f'<text transform="translate(16 {middle:.0f}) rotate(-90)" text-anchor="middle">accuracy, %</text>'
    return [*elements, name]


def _token_axis(counts: Sequence[float], to_x: Callable[[float], float], frame: Box) -> list[str]:
    elements = [_line(frame.left, frame.bottom, frame.right, frame.bottom, "axis")]
    last = -math.inf
    for count in counts:
        x = to_x(count)
        elements.append(_line(x, frame.bottom, x, frame.bottom + 5, "axis"))
        if x - last > 22:  # else two numbers would touch
            elements.append(_text(x, frame.bottom + 19, f"{count:g}", "", "middle"))
            last = x
    middle = (frame.left + frame.right) / 2
    return [*elements, _text(middle, frame.bottom + 38, "tokens per image (logarithmic)", "", "middle")]


def _leader(x: float, y: float, box: Box) -> str:
    """A line from a point to its label, where the label is not right beside it."""
    end_x = min(max(x, box.left), box.right)
    end_y = min(max(y, box.top), box.bottom)
    return "" if math.hypot(end_x - x, end_y - y) < 3 * _RADIUS else _line(x, y, end_x, end_y, "leader")


def place_labels(
    places: Sequence[tuple[float, float]], widths: Sequence[float], frame: Box, columns: Sequence[Column]
) -> list[Box]:
    """A box for each point's label, beside its column: the nearest place that covers least of labels and points."""
    points = [Box(x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS) for x, y in places]
    lines = [Box(x - 1, y - 30, x + 1, y + 30) for x, y in places]
    placed: dict[int, Box] = {}
    for index in sorted(range(len(places)), key=lambda index: places[index][1]):
        taken = [*points, *lines, *placed.values()]
        candidates = _candidates(columns[index], places[index][1], widths[index] + 4)
        placed[index] = min(candidates, key=lambda found: _cost(*found, taken, frame))[0]
    return [placed[index] for index in range(len(places))]


def _candidates(column: Column, y: float, width: float) -> list[tuple[Box, float]]:
    found = []
    for (side, distance), rise in product(product((1, -1), (10, 24, 44)), range(-14, 15)):
        left = column.right + distance if side > 0 else column.left - distance - width
        top = y + rise * _LINE_HEIGHT / 2 - _LINE_HEIGHT / 2 - 1
        found.append((Box(left, top, left + width, top + _LINE_HEIGHT + 2), distance + 3 * abs(rise) + (side < 0)))
    return found


def _cost(box: Box, distance: float, taken: Sequence[Box], frame: Box) -> float:
    area = (box.right - box.left) * (box.bottom - box.top)
    covered = sum(box.overlap(other) for other in taken) + area - box.overlap(frame)
    return 1000 * covered / area + distance


# Differences


def differences(
    rows: Sequence[tuple[str, float, tuple[float, float] | None, tuple[float, float] | None]], *, width: float = 860
) -> str:
    """Points with two intervals around the line of no difference.

    Args:
        rows: label, difference, its intervals over seeds and over images or None; shares.
    """
    if not rows:
        return ""
    left = 24 + max(len(row[0]) for row in rows) * _CHARACTER_WIDTH
    bottom = 18 + 30 * len(rows)
    bounds = [bound for _, value, *intervals in rows for bound in (value, *(b for i in intervals if i for b in i))]
    low, high = min(0.0, *bounds) - 0.005, max(0.0, *bounds) + 0.005
    to_x = _scale(low, high, left, width - 24)
    elements = []
    for tick in nice_ticks(100 * low, 100 * high, 8):
        x = to_x(tick / 100)
        elements += [_line(x, 8, x, bottom, "grid"), _text(x, bottom + 17, f"{tick:+g}" if tick else "0", "", "middle")]
    elements.append(_line(to_x(0), 8, to_x(0), bottom, "axis"))
    for index, (label, value, over_seeds, over_images) in enumerate(rows):
        y = 24 + 30 * index
        elements.append(_text(left - 12, y + 4, label, "label", "end"))
        if over_seeds is not None:
            elements.append(_line(to_x(over_seeds[0]), y, to_x(over_seeds[1]), y, "whisker"))
        if over_images is not None:
            elements.append(_line(to_x(over_images[0]), y, to_x(over_images[1]), y, "thick"))
        elements.append(f'<circle class="point" cx="{to_x(value):.1f}" cy="{y:.1f}" r="{_RADIUS}"/>')
    elements.append(_text((left + width) / 2, bottom + 36, "percentage points", "", "middle"))
    return svg(width, bottom + 46, "Differences in accuracy from the reference", elements)


# Learning curves


def curve_panels(
    curves: Mapping[str, Sequence[Curve]], *, unit: str, as_percent: bool = False, width: float = 200
) -> list[str]:
    """One small picture per label on common axes: its own runs in the foreground, everybody's behind them.

    Args:
        curves: runs by label.
        unit: what the values are.
    """
    everything = [curve for own in curves.values() for curve in own]
    values = sorted(value for curve in everything for value in curve.values if math.isfinite(value))
    if not values:
        return []
    # The first losses are so much higher than the rest that one would see nothing else.
    high = values[-1] if as_percent else values[min(len(values) - 1, int(0.97 * len(values)))]
    frame = Box(38, 24, width - 8, 120)
    to_x = _scale(0, max(curve.steps[-1] for curve in everything), frame.left, frame.right)
    to_y = _scale(values[0], high, frame.bottom, frame.top)
    axes = _panel_axes(values[0], high, to_x, to_y, frame, max(curve.steps[-1] for curve in everything), as_percent)
    background = [_curve(curve, to_x, to_y, frame, "others") for curve in everything]
    return [
        svg(
            width,
            150,
            f"{label}: {unit}",
            [_text(frame.left, 14, label, "label"), *axes, *background]
            + [_curve(curve, to_x, to_y, frame, "own") for curve in own],
            "panel",
        )
        for label, own in curves.items()
    ]


def _panel_axes(
    low: float,
    high: float,
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    frame: Box,
    last_step: int,
    as_percent: bool,
) -> list[str]:
    elements = [_line(frame.left, frame.bottom, frame.right, frame.bottom, "axis")]
    for tick in nice_ticks(low, high, 3):
        label = f"{100 * tick:g}" if as_percent else f"{tick:g}"
        elements += [_line(frame.left, to_y(tick), frame.right, to_y(tick), "grid")]
        elements += [_text(frame.left - 5, to_y(tick) + 4, label, "", "end")]
    elements.append(_text(frame.left, frame.bottom + 16, "0"))
    return [*elements, _text(to_x(last_step), frame.bottom + 16, f"step {last_step:,}", "", "end")]


def _curve(
    curve: Curve, to_x: Callable[[float], float], to_y: Callable[[float], float], frame: Box, css_class: str
) -> str:
    pairs = [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if math.isfinite(value)]
    places = [(to_x(step), min(max(to_y(value), frame.top), frame.bottom)) for step, value in pairs]
    return f'<polyline class="{css_class}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'
