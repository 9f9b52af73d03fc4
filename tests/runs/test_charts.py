import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from resnet_jax.runs.charts import draw_curves, line_chart, log_ticks, reliability_chart

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
