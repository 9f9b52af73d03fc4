"""Panels: the charts that an experiment's figure consists of, drawn into one picture or each into a page."""

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from resnet_jax.lab.captions import WORDS
from resnet_jax.runs.charts import GRID, PAGE_COLOURS, TEXT, as_svg, log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Text = tuple[str, str]
"""In English and Japanese."""

COLOURS = ("#0b62a4", "#d1495b", "#3a7d44", "#e59f1c", "#6b4fa0", "#4f5d73", "#1aa6a6", "#b06f4d")
ON_DARK = ("#5aaef0", "#f07d8c", "#7cc48a", "#f0b955", "#ab92e0", "#a4b1c6", "#4fd0d0", "#d79b7c")
LIGHT, DARK = ("; ".join(f"--c{i}: {colour}" for i, colour in enumerate(row)) for row in (COLOURS, ON_DARK))
"""The colours as variables of the page's style, on white and on dark."""
VARIABLES = PAGE_COLOURS | {colour: f"--c{i}" for i, colour in enumerate(COLOURS)}
"""Colour in a panel -> the variable of the page's style that takes its place, since the page may be dark."""
STYLE: Any = {
    "text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT, "axes.edgecolor": GRID,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID,
    "grid.linewidth": 0.8, "legend.frameon": False, "legend.fontsize": 8.5, "legend.handlelength": 1.6,
    "lines.linewidth": 1.6, "lines.markersize": 4.5, "errorbar.capsize": 2.5, "axes.labelsize": 9.5,
    "xtick.labelsize": 9, "ytick.labelsize": 9,
}  # fmt: skip
WIDTH, HEIGHT = 4.0, 2.8
"""Of a panel without its title and legend, in inches."""
LINE = 0.19
"""The height of a line of a title or legend, in inches."""


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
      finding: what it shows, with its figures, in English and Japanese; it is the panel's title.
      draw: draws it into a `matplotlib.axes.Axes`, with a label on each axis. What has a label of its own is named in
        a legend below.
    """

    finding: Text
    draw: Callable[[Any], None]


def draw_panels(panels: list[Panel]) -> Any:
    """Returns a figure with the panels side by side, at most three in a row, each below its finding in English."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained", dpi=110)
        places = figure.subfigures(lines, columns, squeeze=False).flat
        text = 0
        for place, panel in zip(places, panels, strict=False):
            title = textwrap.wrap(panel.finding[0].replace(" %", "\u00a0%"), 50)
            place.suptitle("\n".join(title), x=0.02, ha="left", fontsize=10)
            text = max(text, len(title) + _fill(place, panel))
        figure.set_size_inches(WIDTH * columns, (HEIGHT + LINE * text) * lines)
        FigureCanvasAgg(figure).draw()
    return figure


def panel_svg(panel: Panel) -> str:
    """Returns a panel as an SVG element for the page, in its colours, with its words in both languages."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        figure.set_size_inches(WIDTH, HEIGHT + LINE * _fill(figure, panel))
        svg = as_svg(figure, panel.finding[0], VARIABLES)
    return re.sub(r"(<text[^>]*>)([^<]+)(?=</text>)", lambda match: match[1] + in_both(match[2]), svg)


def in_both(text: str) -> str:
    """Returns the markup of a chart's text: a `tspan` for each language where they differ."""
    from html import unescape

    japanese = translated(unescape(text))
    if japanese == unescape(text):
        return text
    return f'<tspan lang="en">{text}</tspan><tspan lang="ja">{japanese}</tspan>'


def translated(text: str) -> str:
    """Returns a chart's or table's word in Japanese, the word itself where `WORDS` has none. What follows a number, as
    in `20 layers`, is looked up alone.
    """
    if text in WORDS:
        return WORDS[text]
    number, _, rest = text.partition(" ")
    return f"{number} {WORDS[rest]}" if number.replace(",", "").isdigit() and rest in WORDS else text


def _fill(place: Any, panel: Panel) -> int:
    """Draws a panel and its legend into a figure or a part of one; returns how many lines the legend has."""
    axes = place.subplots()
    panel.draw(axes)
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return 0
    longest = max(map(len, labels))
    columns = 1 if longest > 26 else 2 if longest > 14 else 3
    place.legend(handles, labels, loc="outside lower left", ncols=columns, columnspacing=1.2, labelcolor=TEXT)
    return -(-len(labels) // columns)


def log_axis(axis: Any, places: Iterable[float] | None = None) -> None:
    """Makes an axis of a chart logarithmic, with plain numbers as ticks.

    Args:
      axis: `axes.xaxis` or `axes.yaxis`, with everything drawn.
      places: of the ticks; by default round numbers.
    """
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    axis.set_ticks(list(places) if places is not None else log_ticks(low, high))
    axis.set_major_formatter(short)
    axis.axes.minorticks_off()


def plot_spread(
    axes: "Axes", x: Any, groups: Iterable[Iterable[float]], style: str, colour: str, label: str | None = None
) -> None:
    """Draws means of groups of values with their standard deviations, which a group of one value does not have."""
    arrays = [np.asarray(list(values), float) for values in groups]
    spread = [values.std() if len(values) > 1 else np.nan for values in arrays]
    means = [values.mean() if len(values) else np.nan for values in arrays]
    if np.isnan(spread).all():
        axes.plot(x, means, style, color=colour, label=label)
    else:
        axes.errorbar(x, means, spread, fmt=style, color=colour, label=label)


def with_spread(values: Iterable[float], digits: int = 1) -> str:
    """Returns `mean ± standard deviation` of values, and of one value that value alone."""
    array = np.asarray(list(values), float)
    mean = f"{array.mean():.{digits}f}"
    return mean if len(array) == 1 else f"{mean} ± {array.std():.{digits}f}"


def seeds_of(rows: Sequence[Mapping[str, Any]]) -> Text:
    """Returns how many seeds rows are of, in parentheses."""
    count = len({row["seed"] for row in rows})
    return ("(one seed)" if count == 1 else f"({count} seeds)"), f"（シード {count} 個）"


def listed(names: Iterable[str]) -> Text:
    """Returns names as a list: `a, b and c`."""
    *first, last = names
    japanese = "、".join(map(translated, (*first, last)))
    return (f"{', '.join(first)} and {last}" if first else last), japanese


def short(value: float, position: object = None) -> str:
    """Returns a number as people say it: 3,440, 14.5, 0.34, 3.7e-13, 2e6; a dash for what is not finite.

    It formats ticks too, whose `position` has no effect.
    """
    if not np.isfinite(value):
        return "–"
    if value and not 0.01 <= abs(value) < 1e6:
        return re.sub(r"\.0(?=e)|(?<=e)\+0?|(?<=e-)0", "", f"{value:.1e}")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
