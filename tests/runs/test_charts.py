import re
from xml.etree import ElementTree

import pytest

from resnet_jax.runs.charts import line_chart


@pytest.mark.parametrize("log", [False, True])
def test_a_single_point_is_seen_in_the_middle_of_axes_that_fit_it(log):
    figure = ElementTree.fromstring(line_chart("rate", {"one": [(10, 0.002)]}, "step", log))
    (mark,) = figure.iter("circle")
    assert (float(mark.get("cx")), float(mark.get("cy"))) == pytest.approx((234, 110), abs=0.1)
    numbers = [float(text.text) for text in figure.iter("text") if re.fullmatch(r"[-\d.e]+", text.text)]
    assert len(numbers) == 10 and min(numbers) > 0
    assert not list(figure.iter("polyline"))


def test_lines_span_their_axes():
    figure = ElementTree.fromstring(line_chart("loss", {"a": [(0, 1.0), (5, 3.0)], "b": [(5, 2.0)]}, "step"))
    (line,) = figure.iter("polyline")
    assert line.get("points") == "60.0,206.0 408.0,14.0"
    (mark,) = figure.iter("circle")
    assert (mark.get("cx"), mark.get("cy")) == ("408.0", "110.0")
