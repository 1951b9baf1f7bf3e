"""Attention drawn over an image: the hottest cell lies where the hottest token lies, and the legend says how hot."""

import numpy as np
import pytest
from PIL import Image

from llava_saep.data.images import ImageSize
from llava_saep.model.token_layout import TILES, WHOLE, Span, TokenLayout, TokenMap
from llava_saep.serve.demo.heat_map import LONGER_SIDE, colours, draw_attention, draw_bars, percent

GREY = (120, 120, 120)
LEGEND = 48


def spans(start, end, count):
    edges = np.linspace(start, end, count + 1)
    return tuple(Span(*pair) for pair in zip(edges[:-1], edges[1:], strict=True))


def layout(rows, columns, size, part=WHOLE):
    return TokenLayout(size, len(rows) * len(columns), (TokenMap(part, rows, columns, 0, len(columns)),))


def image(size):
    return Image.new("RGB", (size.width, size.height), GREY)


def hottest_place(drawing):
    """Centre, (x, y), of what is most yellow."""
    pixels = np.asarray(drawing).astype(int)[:-LEGEND]
    yellow = pixels[..., 0] + pixels[..., 1] - 2 * pixels[..., 2]
    rows, columns = np.nonzero(yellow >= yellow.max() - 3)
    return columns.mean(), rows.mean()


@pytest.mark.parametrize("token", range(6))
def test_hottest_cell_is_drawn_where_its_token_lies(token):
    size = ImageSize(40, 60)
    values = np.full(6, 0.01)
    values[token] = 0.2
    tokens = layout(spans(0, 40, 2), spans(0, 60, 3), size)
    drawing = draw_attention(image(size), tokens, values, part=WHOLE, with_grid=False)
    row, column = divmod(token, 3)
    scale = LONGER_SIDE / 60
    assert hottest_place(drawing) == pytest.approx(((column + 0.5) * 20 * scale, (row + 0.5) * 20 * scale), abs=2)


def test_padding_is_drawn_beside_the_image_and_what_was_cut_off_stays_bare():
    size = ImageSize(40, 80)
    padded = layout(spans(-20, 60, 2), spans(0, 80, 2), size)
    drawing = draw_attention(image(size), padded, np.array([1.0, 0, 0, 0]), part=WHOLE, with_grid=False)
    assert (drawing.width, drawing.height - LEGEND) == (LONGER_SIDE, LONGER_SIDE)
    cut = layout(spans(0, 40, 2), spans(20, 60, 2), size)
    drawing = draw_attention(image(size), cut, np.array([1.0, 0, 0, 0]), part=WHOLE, with_grid=False)
    assert drawing.getpixel((10, 10)) == GREY
    assert drawing.getpixel((LONGER_SIDE // 2 - 10, 10)) != GREY


def test_only_the_asked_part_is_drawn():
    size = ImageSize(40, 40)
    whole = TokenMap(WHOLE, spans(0, 40, 1), spans(0, 40, 1), 0, 1)
    tile = TokenMap(TILES, spans(0, 20, 1), spans(0, 20, 1), 1, 1)
    tokens = TokenLayout(size, 2, (whole, tile))
    drawing = draw_attention(image(size), tokens, np.array([0.0, 1.0]), part=TILES, with_grid=False)
    assert drawing.getpixel((LONGER_SIDE - 5, LONGER_SIDE - 5)) == GREY
    assert drawing.getpixel((5, 5)) != GREY


def test_grid_alone_changes_lines_and_nothing_else():
    size = ImageSize(40, 40)
    drawing = draw_attention(
        image(size), layout(spans(0, 40, 4), spans(0, 40, 4), size), None, part=WHOLE, with_grid=True
    )
    changed = (np.asarray(drawing) != GREY).any(axis=-1)
    assert drawing.size == (LONGER_SIDE, LONGER_SIDE)
    assert changed[:, LONGER_SIDE // 2].all() and changed[LONGER_SIDE // 2].all()
    assert not changed[20:140, 20:140].any()


def test_bars_stand_for_tokens_without_a_place():
    drawing = draw_bars(image(ImageSize(40, 80)), ImageSize(40, 80), np.array([0.0, 0.5, 1.0, 0.25]))
    heights = [
        sum(drawing.getpixel((round((index + 0.5) * LONGER_SIDE / 4), y)) == tuple(colours(np.array(value)).astype(int))
            for y in range(LONGER_SIDE // 2, LONGER_SIDE // 2 + 160))
        for index, value in enumerate((0.0, 0.5, 1.0, 0.25))
    ]  # fmt: skip
    assert heights[2] == pytest.approx(148, abs=3) and heights[1] == pytest.approx(74, abs=3)
    assert heights[3] == pytest.approx(37, abs=3) and heights[0] <= 2


def test_colours_grow_in_lightness():
    """What makes a scale readable without colour vision."""
    lightness = colours(np.linspace(0, 1, 50)) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > 0).all()


def test_nothing_to_show_is_drawn_too():
    size = ImageSize(4, 4)
    draw_attention(image(size), layout(spans(0, 4, 2), spans(0, 4, 2), size), np.zeros(4), part=WHOLE, with_grid=True)
    draw_bars(image(size), size, np.zeros(3))


@pytest.mark.parametrize(("share", "text"), [(0.159, "15.9 %"), (0.0012, "0.12 %"), (0, "0.0 %"), (1, "100.0 %")])
def test_shares_are_written_with_digits_that_say_something(share, text):
    assert percent(share) == text
