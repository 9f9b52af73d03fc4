import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from resnet_jax.runs.charts import (
    chart,
    chosen_step,
    draw_curves,
    draw_intervals,
    line_chart,
    log_ticks,
    means_over_steps,
    reliability_chart,
    spread_out,
)
from resnet_jax.training.metrics import wilson

ATTACK = '"><script>alert(1)</script>'


def marks(svg):
    """The chart, (x, y) of its dots, [x, y] of each line's points, and (left, top, right, bottom) of its axes."""
    chart = ElementTree.fromstring(svg)
    (area,) = chart.iter("rect")
    left, top, width, height = (float(area.get(name)) for name in ("x", "y", "width", "height"))
    dots = [(float(use.get("x")), float(use.get("y"))) for use in chart.iter("use") if "fill" in use.get("style", "")]
    lines = [
        np.reshape([float(x) for x in re.findall(r"[\d.]+", path.get("d"))], (-1, 2))
        for path in chart.iter("path")
        if path.get("clip-path") and "var(--rule)" not in path.get("style")
    ]
    return chart, dots, [line for line in lines if len(line) > 1], (left, top, left + width, top + height)


def numbers(chart):
    """Those written on the axes."""
    texts = [text.text.replace("\N{MINUS SIGN}", "-") for text in chart.iter("text")]
    return [float(text.replace(",", "")) for text in texts if re.fullmatch(r"[-\d.e,]+", text)]


@pytest.mark.parametrize("log", [False, True])
def test_a_single_point_is_seen_within_axes_that_fit_it(log):
    chart, dots, lines, (left, top, right, bottom) = marks(line_chart("rate", {"one": [(10, 0.002)]}, "step", log))
    ((x, y),) = dots
    assert x == pytest.approx((left + right) / 2) and top + 30 < y < bottom - 30 and not lines
    assert len(numbers(chart)) >= 4 and min(numbers(chart)) > 0 and 10 in numbers(chart)


def test_the_loss_of_few_steps_is_a_line_from_the_first_on():
    """It is the mean over the steps since the point before, and is drawn over them."""
    series = {"train": [(11, 0.5)], "validation": [(4, 0.6), (11, 0.4)]}
    _, dots, lines, _ = marks(line_chart("loss", series, "step", stepped="train"))
    assert not dots and len(lines) == 2 and means_over_steps([(11, 0.5)]) == [(1, 0.5), (11, 0.5)]
    assert means_over_steps([(1, 0.5), (2, 0.4)]) == [(1, 0.5), (2, 0.4)]
    _, dots, lines, _ = marks(line_chart("loss", series, "step"))
    assert len(dots) == 2 and len(lines) == 1  # one of them in the legend


def test_lines_span_their_axes_and_keep_their_colours():
    series = {"a": [], "b": [(0, 1.0), (5, 3.0)], "c": [(5, 2.0)]}
    svg = line_chart("loss", series, "step")
    _, dots, (line,), (left, top, right, bottom) = marks(svg)
    assert np.all(abs(line - [[left, bottom], [right, top]]) < 0.06 * (right - left)) and line[0, 0] < line[1, 0]
    assert dots[0] == pytest.approx((line[1, 0], line[:, 1].mean()))
    assert "stroke: var(--blue)" in svg and "fill: var(--red)" in svg and "stroke: var(--grey)" not in svg
    assert line_chart("loss", {"a": [], "b": []}, "step") == ""


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("scale", [0.00037, 0.71, 31.0])
def test_ticks_are_round_numbers(scale, log):
    points = [(step, scale * (1.1 + math.cos(step / 1000))) for step in range(7, 2900, 31)]
    found = numbers(ElementTree.fromstring(line_chart("loss", {"a": points}, "step", log)))
    assert len(found) >= 6
    for number in filter(None, found):
        digits = f"{abs(number):e}".split("e")[0].rstrip("0").replace(".", "")
        assert len(digits) <= 2 or digits[1:] in ("25", "75"), found


@pytest.mark.parametrize("high", [1.02, 1.9, 7.0, 40.0, 3e3, 1e9])
def test_a_logarithmic_axis_has_some_ticks_and_not_too_many(high):
    for low in (0.3, 1.1e-4, 5.0):
        ticks = log_ticks(low, low * high)
        assert 2 <= len(ticks) <= 9 and ticks == sorted(ticks) and low <= ticks[0] < ticks[-1] <= low * high


def test_a_chart_is_one_element_without_addresses_or_markup_of_its_names():
    svg = line_chart(ATTACK, {ATTACK: [(0, 1.0), (1, 2.0)], "b": [(0, 1.0)]}, ATTACK)
    for text in (svg, reliability_chart([{"confidence": 0.4, "accuracy": 0.5, "count": 3}])):
        assert ElementTree.fromstring(text).tag == "svg" and "http" not in text and "<script" not in text
    assert ElementTree.fromstring(svg).get("aria-label") == ATTACK


def test_a_calibrated_network_lies_on_the_diagonal():
    rows = [{"confidence": x, "accuracy": x, "count": n} for x, n in ((0.2, 1), (0.5, 30), (1.0, 400))]
    _, dots, _, (left, top, right, bottom) = marks(reliability_chart(rows))
    expected = [(left + x * (right - left), bottom - x * (bottom - top)) for x in (0.2, 0.5, 1.0)]
    np.testing.assert_allclose(dots, expected, atol=0.1)


@pytest.mark.parametrize(("step", "text"), [(5, "5"), (20_000, "20,000"), (9 * 10**299, "9e+299")])
@pytest.mark.parametrize("value", [2.0, 1e-320, 9e299])
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:constrained_layout not applied")
def test_charts_bear_any_number_of_a_metrics_file(step, text, value):
    for log in (False, True):
        assert f">{text}<" in line_chart("loss", {"a": [(step, value)]}, "step", log)
        assert line_chart("loss", {"a": [(0, 1.0), (step, value)]}, "step", log)


TRAINED = [{"step": step, "train/loss": 1.0, "train/accuracy": 0.1} for step in (1, 2)]


@pytest.mark.parametrize("lines", [[], [{"step": 3, "train/loss": 0.0, "validation/accuracy": 0.5}], TRAINED])
def test_curves_are_drawn_of_few_numbers_too(lines, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Image.open(draw_curves(tmp_path)) as picture:
        assert picture.size == (1080, 432)


def words(svg):
    return [text.text for text in ElementTree.fromstring(svg).iter("text")]


def test_an_axis_of_shares_is_in_percent_and_says_what_it_is():
    svg = line_chart("a", {"a": [(0, 0.25), (5, 1.0)]}, "step", y_name="accuracy", share=True)
    assert "100 %" in words(svg) and "accuracy" in words(svg) and "step" in words(svg)


@pytest.mark.parametrize("line", [[(3, 0.5)], [(0, 0.5), (5, 0.5)]])
def test_few_images_have_a_wide_interval(line):
    def height(count):
        _, axes = chart()
        draw_intervals(axes, line, count, "#0b62a4")
        return sum(drawn.get_paths()[0].get_extents().height for drawn in axes.collections)

    assert height(0) == 0.0 and height(10) == pytest.approx(0.5268, abs=1e-3) and 0.05 < height(1000) < 0.07
    for count in (0, 10):
        svg = line_chart("a", {"a": line}, "step", y_name="accuracy", share=True, counts={"a": count})
        assert ("accuracy (95 % interval)" in words(svg)) == bool(count)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(8, 8, 0.6756, 1.0), (0, 8, 0.0, 0.3244), (5, 10, 0.2366, 0.7634)]
)
def test_intervals_are_those_of_wilson(right, count, low, high):
    assert wilson(right / count, count) == pytest.approx((low, high), abs=1e-4)


def test_the_chosen_step_is_marked_with_the_split_that_chose_it(tmp_path):
    assert chosen_step(tmp_path) is None
    best = {"step": 3, "metric": "ema/validation/macro_f1", "value": 0.5}
    (tmp_path / "best.json").write_text(json.dumps(best))
    assert chosen_step(tmp_path) == (3, "chosen by validation macro f1")
    svg = line_chart("a", {"a": [(0, 1.0), (5, 2.0)], "b": []}, "step", chosen=chosen_step(tmp_path))
    assert "chosen by validation macro f1" in words(svg)


def test_calibration_says_how_many_predictions_each_dot_is_of():
    rows = [{"confidence": x, "accuracy": 0.5, "count": n} for x, n in ((0.4, 7), (0.41, 12345), (1.0, 300))]
    found = words(reliability_chart(rows))
    assert {"7", "12.3k", "300", "count", "accuracy (95 % interval)", "confidence"} <= set(found)


@pytest.mark.parametrize("places", [[0.0, 0.01, 0.02], [0.97, 0.98, 1.0], [i / 15 for i in range(15)], [0.5]])
def test_texts_of_neighbours_are_moved_apart(places):
    moved = [place for place, _ in spread_out([(place, 1) for place in places])]
    assert np.all(np.diff(moved) > 0.05) and min(moved) >= -1e-9 and max(moved) <= 1 + 1e-9
