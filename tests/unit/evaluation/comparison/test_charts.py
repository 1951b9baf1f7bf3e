"""Pictures: round ticks, labels that cover nothing, points in their places."""

import re
from xml.etree import ElementTree

import pytest

from llava_saep.evaluation.comparison.charts import (
    Box,
    Column,
    Point,
    accuracy_against_tokens,
    curve_panels,
    differences,
    nice_ticks,
    place_labels,
)
from llava_saep.evaluation.comparison.results import Curve
from llava_saep.evaluation.comparison.statistics import Interval


@pytest.mark.parametrize(
    ("low", "high", "ticks"), [(0, 100, [0, 20, 40, 60, 80, 100]), (97.2, 99.9, [98, 99]), (-3, 4, [-2, 0, 2, 4])]
)
def test_ticks_are_round_numbers_inside_the_range(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_one_value_is_its_own_tick():
    assert nice_ticks(5, 5) == [5]


def test_labels_of_ten_projectors_with_equal_tokens_cover_neither_each_other_nor_points():
    frame = Box(58, 14, 844, 394)
    places = [(98.0, 30.0 + 17 * index) for index in range(10)] + [(690.0, 100.0), (690.0, 104.0)]
    columns = [Column(x, x, x) for x, _ in places]
    boxes = place_labels(places, [120.0] * len(places), frame, columns)
    for index, box in enumerate(boxes):
        assert all(box.overlap(other) == 0 for other in boxes[index + 1 :])
        assert box.left >= frame.left and box.right <= frame.right
        assert not any(box.left < x < box.right and box.top < y < box.bottom for x, y in places)


def test_more_accurate_is_higher_and_more_tokens_is_farther_right():
    points = [
        Point(label="few", x=9, y=Interval(0.9, 0.8, 0.95)),
        Point(label="many & more", x=36, y=Interval(0.5, 0.4, 0.6), is_reference=True),
    ]
    root = ElementTree.fromstring(accuracy_against_tokens(points))
    few, many = root.findall("circle")
    assert float(few.get("cx")) < float(many.get("cx")) and float(few.get("cy")) < float(many.get("cy"))
    assert many.get("class") == "point reference"
    assert [label.text for label in root.findall("text[@class='label']")] == ["few", "many & more"]


def test_points_with_equal_tokens_and_no_interval_are_drawn():
    points = [Point(label=str(index), x=9, y=Interval(0.5)) for index in range(2)]
    circles = ElementTree.fromstring(accuracy_against_tokens(points)).findall("circle")
    assert len({circle.get("cx") for circle in circles}) == 2  # beside each other, not in one place
    assert accuracy_against_tokens([]) == ""


def test_differences_stand_on_their_side_of_zero():
    rows = [("better", 0.05, (0.01, 0.09), (0.03, 0.07)), ("worse", -0.02, None, (-0.04, 0.0))]
    root = ElementTree.fromstring(differences(rows))
    better, worse = (float(circle.get("cx")) for circle in root.findall("circle"))
    zero = float(root.findall("line[@class='axis']")[0].get("x1"))
    assert worse < zero < better
    assert len(root.findall("line[@class='whisker']")) == 1 and len(root.findall("line[@class='thick']")) == 2


def test_a_panel_shows_its_own_runs_over_everybodys():
    curves = {
        "a": (Curve(seed=0, steps=(1, 2), values=(3.0, 1.0)), Curve(seed=1, steps=(1, 2), values=(2.0, float("nan")))),
        "b<": (Curve(seed=0, steps=(1, 2), values=(2.5, 2.0)),),
    }
    panels = curve_panels(curves, unit="loss")
    assert len(panels) == 2
    assert panels[0].count('class="own"') == 2 and panels[0].count('class="others"') == 3
    assert panels[1].count('class="own"') == 1 and "b&lt;" in panels[1]
    numbers = [float(number) for number in re.findall(r"[\d.]+(?=,|\s|\")", panels[0])]
    assert all(number == number for number in numbers)
    assert "nan" not in panels[0]
    assert curve_panels({"a": ()}, unit="loss") == []


def test_curves_without_a_number_have_no_panels():
    curves = {"a": [Curve(seed=0, steps=(1, 2), values=(float("nan"), float("nan")))]}
    assert curve_panels(curves, unit="loss") == []
