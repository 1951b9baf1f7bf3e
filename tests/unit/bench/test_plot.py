"""The picture: labels that cover nothing, files of both kinds, and refusals before anything is measured."""

import importlib.util
from itertools import combinations

import pytest

from llava_saep.bench import plot
from llava_saep.bench.plot import Box, check_plot_path, place_labels, plain_number, plot_measurements, readable_ticks
from llava_saep.bench.projectors import Measurement
from llava_saep.bench.timing import Timing
from llava_saep.errors import UserError
from projectors import select_projector


def measurement(name, num_tokens, seconds):
    timing = Timing((seconds, 1.1 * seconds, 0.9 * seconds))
    return Measurement(
        name=name,
        selection=select_projector("linear"),
        num_tokens=num_tokens,
        forward=timing,
        forward_backward=timing,
    )


def test_labels_of_a_crowded_column_cover_neither_each_other_nor_a_point():
    points = [(300.0, 100.0 + 9.0 * index) for index in range(12)] + [(330.0, 150.0)]
    sizes = [(90.0, 14.0)] * len(points)
    frame = Box(0.0, 0.0, 800.0, 600.0)
    boxes = place_labels(points, sizes, frame, point_radius=4.0)
    assert all(left.overlap(right) == 0 for left, right in combinations(boxes, 2))
    for x, y in points:
        assert all(box.overlap(Box(x - 4, y - 4, x + 4, y + 4)) == 0 for box in boxes)
    assert all(box.overlap(frame) == pytest.approx(90.0 * 14.0) for box in boxes)


def test_lone_label_stands_to_the_right_of_its_point():
    (box,) = place_labels([(100.0, 100.0)], [(50.0, 10.0)], Box(0.0, 0.0, 400.0, 400.0), point_radius=4.0)
    assert box.left > 104.0 and (box.bottom + box.top) / 2 == 100.0


def test_label_at_the_right_edge_stands_to_the_left():
    (box,) = place_labels([(390.0, 100.0)], [(50.0, 10.0)], Box(0.0, 0.0, 400.0, 400.0), point_radius=4.0)
    assert box.right < 386.0


def test_ticks_that_would_run_into_each_other_are_left_out_by_popularity():
    assert readable_ticks([32, 144, 169, 169, 576, 576, 582]) == [32, 169, 576]


def test_latencies_are_written_without_exponents():
    assert [plain_number(value, "125") for value in (0.2, 10, 50, 2000, 30)] == ["0.2", "10", "50", "2000", ""]


def test_svg_names_every_projector_and_is_the_same_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [measurement("saep", 144, 0.1), measurement("mlp2x_gelu", 576, 0.4), measurement("qformer", 32, 0.3)]
    texts = []
    for name in ("first.svg", "second.svg"):
        assert plot_measurements(rows, tmp_path / name, title="a title") == 3
        texts.append((tmp_path / name).read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    for word in ("saep", "mlp2x_gelu", "qformer", "a title", "visual tokens per image"):
        assert word in texts[0]


def test_png_is_written_and_failed_projectors_are_left_out(tmp_path):
    pytest.importorskip("matplotlib")
    failed = Measurement(name="identity", selection=select_projector("identity"), error="does not fit")
    assert plot_measurements([measurement("saep", 144, 0.1), failed], tmp_path / "plot.png", title="") == 1
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_draws_nothing(tmp_path):
    failed = Measurement(name="identity", selection=select_projector("identity"), error="does not fit")
    assert plot_measurements([failed], tmp_path / "plot.png", title="") == 0
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(("name", "message"), [("plot.pdf", ".png or .svg"), ("absent/plot.png", "no folder")])
def test_plot_that_cannot_be_written_is_refused(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        check_plot_path(str(tmp_path / name))


def test_missing_matplotlib_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[bench\]'"):
        check_plot_path(str(tmp_path / "plot.png"))
    assert importlib.util.find_spec is plot.importlib.util.find_spec
