"""Charts of a run, drawn by matplotlib: `curves.png`, and SVG for report.html in the colours of that page."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from resnet_jax.files import write_whole
from resnet_jax.runs.trackers import points, read_lines

Points = Sequence[tuple[float, float]]

GREY, BLUE, RED, TEXT, GRID = "#7a8699", "#0b62a4", "#d1495b", "#667084", "#dfe3ea"
PAGE_COLOURS = {GREY: "--grey", BLUE: "--blue", RED: "--red", TEXT: "--soft", GRID: "--rule"}
"""Colour in a chart -> the variable of the page's style that takes its place, since the page may be dark."""
ROUND = [1, 2, 2.5, 5, 10]
"""Ticks are these times a power of ten apart."""


def draw_curves(workdir: Path) -> Path:
    """Draws loss and accuracy of a run over its steps into `curves.png` in the run's folder; returns the file's path.

    Raises:
      InputError: `metrics.jsonl` cannot be read.
      OSError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    lines = read_lines(workdir / "metrics.jsonl")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    styles = (
        ("train", "train", GREY),
        ("validation", "validation", BLUE),
        ("ema/validation", "validation, moving average", RED),
        ("test", "test, at the end", BLUE),
        ("ema/test", "test, moving average", RED),
    )
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        log = quantity == "loss"
        for prefix, label, colour in styles:
            drawn = [point for point in points(lines, f"{prefix}/{quantity}") if not log or point[1] > 0]
            if drawn:
                marker = "D" if prefix.endswith("test") else "o" if len(drawn) == 1 else "-"
                x, y = zip(*drawn, strict=True)
                axes.plot(x, y, marker, label=label, color=colour, linewidth=1.5)
        tidy(axes, "step", log)
        axes.set_title(quantity, loc="left")
        if axes.lines and not log:
            axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(workdir / "curves.png", picture.getvalue())
    return workdir / "curves.png"


def line_chart(title: str, series: Mapping[str, Points], x_name: str, log: bool = False) -> str:
    """Returns an SVG element with up to three lines over a common x axis of whole numbers; "" without a point.

    Args:
      title: read out by screen readers.
      series: name in the legend -> points (x, y) with rising x; a single point is drawn as a dot.
      x_name: the label of the x axis.
      log: whether the y axis is logarithmic; points at 0 and below are then left out.
    """
    drawn = {name: [point for point in line if not log or point[1] > 0] for name, line in series.items()}
    if not any(drawn.values()):
        return ""
    figure, axes = chart()
    for (name, line), colour in zip(drawn.items(), (GREY, BLUE, RED), strict=False):
        if line:
            x, y = zip(*line, strict=True)
            axes.plot(x, y, "o" if len(line) == 1 else "-", label=name, color=colour, linewidth=1.6, markersize=5)
    tidy(axes, x_name, log)
    if len(series) > 1:
        figure.legend(loc="outside lower left", ncols=2, frameon=False, labelcolor=TEXT, handlelength=1.2)
    return as_svg(figure, title)


def reliability_chart(rows: Sequence[Mapping[str, float]]) -> str:
    """Returns an SVG element with accuracy against confidence; a calibrated network lies on the diagonal.

    Args:
      rows: groups of predictions, each with `confidence`, `accuracy` and `count`; a dot's area grows with the count.
    """
    figure, axes = chart()
    most = max(row["count"] for row in rows)
    axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.5)
    for row in rows:
        size = math.sqrt(15 + 120 * row["count"] / most)
        axes.plot(row["confidence"], row["accuracy"], "o", color=BLUE, markersize=size, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    tidy(axes, "confidence", whole=False)
    return as_svg(figure, "Accuracy against confidence")


def chart() -> tuple[Any, Any]:
    """Returns a figure of the size of a chart in the page, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.7), layout="constrained")
    return figure, figure.subplots()


def tidy(axes: Any, x_name: str, log: bool = False, whole: bool = True) -> None:
    """Gives axes with lines in them ticks at round numbers, a light grid and no frame.

    Args:
      axes: a `matplotlib.axes.Axes`.
      x_name: the label of the x axis.
      log: whether the y axis is logarithmic.
      whole: whether ticks of the x axis lie at whole numbers alone.
    """
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x_name)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND, integer=whole))
    axes.xaxis.set_major_formatter(whole_number if whole else plain_number)
    if log:
        axes.set_yscale("log")
        axes.set_yticks(log_ticks(*axes.get_ylim()))
        axes.minorticks_off()
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.yaxis.set_major_formatter(plain_number)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=TEXT)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(TEXT)


def whole_number(value: float, position: object = None) -> str:
    """Returns the text of a tick at a whole number, as 20,000, and "" for a tick between two of them."""
    if abs(value) >= 1e9:
        return plain_number(value)
    return f"{round(value):,}" if abs(value - round(value)) < 1e-6 else ""


def plain_number(value: float, position: object = None) -> str:
    """Returns the text of a tick, to four digits; 0 has no sign."""
    return f"{value or 0:.4g}"


def log_ticks(low: float, high: float) -> list[float]:
    """Returns round numbers in [low, high], 0 < low < high, for an axis that is logarithmic, smallest first.

    They are powers of ten; or 1, 2 and 5 times those, if that makes fewer than three; or else equally far apart.
    """
    from matplotlib.ticker import MaxNLocator

    powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for factors in ((1,), (1, 2, 5)):
        ticks = [power * factor for power in powers for factor in factors if low <= power * factor <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 9)]
    return [float(tick) for tick in MaxNLocator(4, steps=ROUND).tick_values(low, high) if low <= tick <= high]


def as_svg(figure: Any, title: str, colours: Mapping[str, str] = PAGE_COLOURS) -> str:
    """Returns a figure as an SVG element to be put into HTML, its font that of the page.

    Args:
      figure: a `matplotlib.figure.Figure`.
      title: read out by screen readers.
      colours: colour in the figure -> the variable of the page's style that takes its place.
    """
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r"font-family: [^;]*; ", "", svg)  # that of the page
    svg = re.sub(
        r' xmlns(:xlink)?="[^"]*"|(?<=<g) id="[^"]*"', "", svg
    )  # in HTML one is needless, the other not unique
    for colour, name in colours.items():
        svg = svg.replace(colour, f"var({name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
