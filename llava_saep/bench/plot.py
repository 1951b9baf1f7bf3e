"""Tokens against latency as a picture, PNG or SVG. matplotlib is imported only here, when a plot is asked for."""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from llava_saep.bench.projectors import Measurement
from llava_saep.errors import UserError

SUFFIXES = (".png", ".svg")

_WIDTH_INCHES, _HEIGHT_INCHES, _DPI = 12.0, 6.4, 130
_FONT_SIZE, _MARKER_SIZE = 8.5, 6.0
_HIGHLIGHT, _OTHERS = "#c1121f", "#33658a"
_LEADER_COLOUR = "#9aa5b1"
_MARGIN_X, _MARGIN_Y = 0.25, 0.06
"""Room around the outermost points for their labels, as a share of the range (in log units)."""
_FEW_DIGITS, _MANY_DIGITS, _NARROW_RANGE = "125", "1234568", 8.0
"""First digits that are written on the axis of latencies; more of them where it spans less than that factor."""
_LABEL_PADDING = 2.0
_TICK_RATIO = 1.4

_DISTANCES = (7.0, 13.0, 20.0, 28.0, 37.0, 47.0, 60.0)
_DIRECTIONS = ((1.0, 0.0), (1.0, 0.7), (1.0, -0.7), (-1.0, 0.0), (-1.0, 0.7), (-1.0, -0.7), (0.0, 1.0), (0.0, -1.0))


class Box(NamedTuple):
    """A rectangle on the canvas, in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """Area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


def check_plot_path(path: str) -> Path:
    """Find out before a long measurement whether a plot can be written.

    Raises:
        UserError: matplotlib is missing, the name does not end in .png or .svg, or its folder does not exist.
    """
    checked = Path(path)
    if checked.suffix.lower() not in SUFFIXES:
        raise UserError(f"--plot {path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if not checked.parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {str(checked.parent)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib, which is not installed; in the repository: pip install -e '.[bench]'")
    return checked


def plot_measurements(rows: Sequence[Measurement], path: Path, *, title: str, highlighted: str = "saep") -> int:
    """Draw forward, and forward with backward, each as latency over tokens.

    Args:
        highlighted: prefix of the names in another colour.
    Returns:
        Number of projectors drawn; with 0 no file is written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.num_tokens and row.forward_backward.seconds]
    if not timed:
        return 0
    figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), dpi=_DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_panel(left, timed, "forward", highlighted)
    _draw_panel(right, timed, "forward_backward", highlighted)
    figure.suptitle(title, fontsize=9.5)
    FigureCanvasAgg(figure).draw()  # settles the layout, from which the labels' places follow
    figure.set_layout_engine("none")
    for axes, kind in ((left, "forward"), (right, "forward_backward")):
        _label_points(axes, timed, kind, highlighted)
    # Text as text, and nothing that changes from run to run: an SVG may be put under version control.
    is_svg = path.suffix.lower() == ".svg"
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "llava-saep"}):
        figure.savefig(path, metadata={"Date": None} if is_svg else None)
    return len(timed)


def _milliseconds(row: Measurement, kind: str) -> float:
    return 1000 * getattr(row, kind).median


def _colour(name: str, highlighted: str) -> str:
    return _HIGHLIGHT if name.startswith(highlighted) else _OTHERS


def _draw_panel(axes: Any, rows: Sequence[Measurement], kind: str, highlighted: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for row in rows:
        colour, tokens = _colour(row.name, highlighted), row.num_tokens
        layer = 3 + (colour == _HIGHLIGHT)  # on top of the others where points meet
        low, high = (1000 * bound for bound in getattr(row, kind).quartiles)
        axes.vlines(tokens, low, high, color=colour, linewidth=1.2, zorder=layer)
        axes.plot(tokens, _milliseconds(row, kind), "o", color=colour, markersize=_MARKER_SIZE, zorder=layer)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.margins(x=_MARGIN_X, y=_MARGIN_Y)
    ticks = readable_ticks([row.num_tokens for row in rows])
    axes.set_xticks(ticks, [str(count) for count in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(axes.xaxis.get_major_locator())
    latencies = [_milliseconds(row, kind) for row in rows]
    digits = _MANY_DIGITS if max(latencies) < _NARROW_RANGE * min(latencies) else _FEW_DIGITS
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: plain_number(value, digits)))
    axes.tick_params(labelsize=_FONT_SIZE, which="both")
    axes.set_xlabel("visual tokens per image (log scale)", fontsize=_FONT_SIZE + 0.5)
    axes.set_ylabel("milliseconds per batch (log scale); bars: quartiles", fontsize=_FONT_SIZE + 0.5)
    axes.set_title(kind.replace("_", " + "), fontsize=_FONT_SIZE + 2)
    axes.grid(which="major", color="#e4e7eb", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def readable_ticks(counts: Sequence[int]) -> list[int]:
    """Token counts that fit beside each other as ticks on the log axis, those of most projectors first."""
    kept: list[int] = []
    for count, _ in Counter(sorted(counts)).most_common():
        if all(max(count, other) >= _TICK_RATIO * min(count, other) for other in kept):
            kept.append(count)
    return sorted(kept)


def plain_number(value: float, digits: str) -> str:
    """A tick's label without an exponent where its first digit is one of `digits`, otherwise nothing."""
    return f"{value:g}" if f"{value:e}"[0] in digits else ""


def _label_points(axes: Any, rows: Sequence[Measurement], kind: str, highlighted: str) -> None:
    """Write each name beside its point, where it covers neither another name nor a point."""
    renderer = axes.figure.canvas.get_renderer()
    points = [axes.transData.transform((row.num_tokens, _milliseconds(row, kind))) for row in rows]
    sizes = [_text_size(axes, row.name, renderer) for row in rows]
    frame = axes.get_window_extent(renderer)
    boxes = place_labels(points, sizes, Box(frame.x0, frame.y0, frame.x1, frame.y1), _MARKER_SIZE * _DPI / 72 / 2)
    to_figure = axes.figure.transFigure.inverted()
    for row, box in zip(rows, boxes, strict=True):
        # As a share of the figure, because a file may have other pixels than this canvas.
        middle = to_figure.transform(((box.left + box.right) / 2, (box.bottom + box.top) / 2))
        axes.annotate(
            row.name,
            xy=(row.num_tokens, _milliseconds(row, kind)),
            xytext=middle,
            textcoords="figure fraction",
            ha="center",
            va="center",
            fontsize=_FONT_SIZE,
            color=_colour(row.name, highlighted),
            arrowprops={"arrowstyle": "-", "color": _LEADER_COLOUR, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2},
            annotation_clip=False,
        )


def _text_size(axes: Any, text: str, renderer: Any) -> tuple[float, float]:
    artist = axes.text(0.5, 0.5, text, fontsize=_FONT_SIZE)
    extent = artist.get_window_extent(renderer)
    artist.remove()
    return extent.width + _LABEL_PADDING, extent.height + _LABEL_PADDING


def place_labels(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], frame: Box, point_radius: float
) -> list[Box]:
    """Choose a box for each label: the nearest of some places around its point that covers least.

    Args:
        points: what the labels belong to, in pixels.
        sizes: width and height of each label.
        frame: labels stay inside if they can.
        point_radius: no label covers a point of this size if it can be helped.
    """
    obstacles = [Box(x - point_radius, y - point_radius, x + point_radius, y + point_radius) for x, y in points]
    placed: dict[int, Box] = {}
    # From the top down, so that the labels of a column keep its order.
    for index in sorted(range(len(points)), key=lambda index: -points[index][1]):
        taken = [*obstacles, *placed.values()]
        placed[index] = min(
            _candidates(points[index], sizes[index], point_radius),
            key=lambda candidate: _cost(*candidate, taken, frame),
        )[0]
    return [placed[index] for index in range(len(points))]


def _candidates(point: tuple[float, float], size: tuple[float, float], radius: float) -> list[tuple[Box, float]]:
    """Boxes around a point, each with its distance, the preferred ones first."""
    (x, y), (width, height) = point, size
    candidates = []
    for distance, (right, up) in product(_DISTANCES, _DIRECTIONS):
        centre_x = x + right * (radius + distance + width / 2)
        centre_y = y + up * (radius + distance + height / 2)
        box = Box(centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2)
        candidates.append((box, distance))
    return candidates


def _cost(box: Box, distance: float, taken: Sequence[Box], frame: Box) -> float:
    area = (box.right - box.left) * (box.top - box.bottom)
    covered = sum(box.overlap(other) for other in taken)
    outside = area - box.overlap(frame)
    return 100.0 * (covered + outside) / area + distance / 10.0
