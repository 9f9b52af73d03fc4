"""Charts of a run, drawn by matplotlib: `curves.png`, and SVG for report.html in the colours of that page."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_jax.files import write_whole
from resnet_jax.runs.folder import read_summary
from resnet_jax.runs.trackers import points, read_lines
from resnet_jax.training.manifest import best_of
from resnet_jax.training.metrics import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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

    lines, summary, chosen = read_lines(workdir / "metrics.jsonl"), read_summary(workdir) or {}, chosen_step(workdir)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    styles = (
        ("train", "train", GREY),
        ("validation", "validation", BLUE),
        ("ema/validation", "validation, moving average", RED),
        ("test", "test, at the end", BLUE),
        ("ema/test", "test, moving average", RED),
    )
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        log, counted = quantity == "loss", False
        for prefix, label, colour in styles:
            drawn = [point for point in points(lines, f"{prefix}/{quantity}") if not log or point[1] > 0]
            if drawn:
                x, y = zip(*(means_over_steps(drawn) if prefix == "train" else drawn), strict=True)
                style = "steps-pre" if prefix == "train" else "default"
                count = 0 if log or prefix == "train" else summary.get(prefix, {}).get("count", 0)
                counted = counted or bool(count)
                name = f"{label}, {count:,} images" if count else label
                marker = "D" if prefix.endswith("test") else "o" if len(x) == 1 else "-"
                axes.plot(x, y, marker, label=name, color=colour, linewidth=1.5, drawstyle=style)
                draw_intervals(axes, drawn, count, colour)
        if chosen is not None and axes.lines:
            draw_choice(axes, *chosen)
        tidy(axes, "step", log, y_name=f"{quantity} (95 % interval)" if counted else quantity, share=not log)
    if axes.lines:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(workdir / "curves.png", picture.getvalue())
    return workdir / "curves.png"


def chosen_step(workdir: Path) -> tuple[int, str] | None:
    """Returns the step that a run selected, and by which split and metric; None where it selected none."""
    best = best_of(workdir)
    return None if best is None else (best["step"], f"chosen by {spoken(best['metric']).removesuffix(AVERAGE)}")


AVERAGE = " (moving average)"


def spoken(metric: str) -> str:
    """Returns the name of a metric as people say it: `ema/validation/macro_f1` is `validation macro f1 (moving
    average)`.
    """
    *average, split, name = metric.split("/")
    return f"{split} {name.replace('_', ' ')}" + AVERAGE * bool(average)


def means_over_steps(line: Points) -> Points:
    """Returns a line of means over the steps since the point before, which is drawn as steps, with a point at step 1,
    where the first of them begins.
    """
    first, value = line[0]
    return [(1, value), *line] if first > 1 else line


def draw_choice(axes: "Axes", step: int, words: str) -> None:
    """Draws a line where the step was chosen."""
    axes.axvline(step, color=TEXT, linewidth=1, linestyle=(0, (2, 3)), label=words, zorder=0)


def draw_intervals(axes: "Axes", line: Points, count: int, colour: str) -> None:
    """Draws the 95 % interval about each point of a line of shares that were counted on `count` images; none for 0."""
    if not count:
        return
    low, high = zip(*(wilson(min(1.0, max(0.0, y)), count) for _, y in line), strict=True)
    x = [x for x, _ in line]
    if len(line) == 1:
        axes.vlines(x, low, high, color=colour, linewidth=1.2)
    else:
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def line_chart(
    title: str,
    series: Mapping[str, Points],
    x_name: str,
    log: bool = False,
    y_name: str = "",
    share: bool = False,
    counts: Mapping[str, int] | None = None,
    chosen: tuple[int, str] | None = None,
    stepped: str | None = None,
) -> str:
    """Returns an SVG element with up to three lines over a common x axis of whole numbers; "" without a point.

    Args:
      title: read out by screen readers.
      series: name in the legend -> points (x, y) with rising x; a single point is drawn as a dot.
      x_name: the label of the x axis.
      log: whether the y axis is logarithmic; points at 0 and below are then left out.
      y_name: the label of the y axis.
      share: whether y are fractions, written in percent.
      counts: name of a line -> how many images its shares were counted on; their 95 % interval is drawn.
      chosen: an x where something was chosen, and the words for the legend.
      stepped: name of a line whose points are means over the steps since the point before, drawn as steps.
    """
    drawn = {name: [point for point in line if not log or point[1] > 0] for name, line in series.items()}
    if not any(drawn.values()):
        return ""
    figure, axes = chart()
    for (name, line), colour in zip(drawn.items(), (GREY, BLUE, RED), strict=False):
        if line:
            x, y = zip(*(means_over_steps(line) if name == stepped else line), strict=True)
            style = "steps-pre" if name == stepped else "default"
            look: dict[str, Any] = {"color": colour, "linewidth": 1.6, "markersize": 5, "drawstyle": style}
            axes.plot(x, y, "o" if len(x) == 1 else "-", label=name, **look)
            draw_intervals(axes, line, (counts or {}).get(name, 0), colour)
    if chosen is not None:
        draw_choice(axes, *chosen)
    named = f"{y_name} (95 % interval)" if any((counts or {}).values()) else y_name
    tidy(axes, x_name, log, y_name=named, share=share)
    if len(series) > 1:
        figure.legend(loc="outside lower left", ncols=2, frameon=False, labelcolor=TEXT, handlelength=1.2)
    return as_svg(figure, title)


def reliability_chart(rows: Sequence[Mapping[str, float]]) -> str:
    """Returns an SVG element with accuracy against confidence; a calibrated network lies on the diagonal.

    Args:
      rows: groups of predictions, each with `confidence`, `accuracy` and `count`; a dot's area grows with the count,
        which is written above, and a line is the 95 % interval of its accuracy.
    """
    figure, axes = chart()
    most = max(row["count"] for row in rows)
    axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.5)
    for row in rows:
        size = math.sqrt(15 + 120 * row["count"] / most)
        axes.plot(row["confidence"], row["accuracy"], "o", color=BLUE, markersize=size, clip_on=False)
        draw_intervals(axes, [(row["confidence"], row["accuracy"])], int(row["count"]), BLUE)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    for place, count in spread_out([(row["confidence"], int(row["count"])) for row in rows]):
        text = str(count) if count < 1000 else f"{count / 1000:.3g}k"
        axes.text(place, 1.04, text, ha="center", va="bottom", fontsize=6.5, color=TEXT)
    axes.text(-0.03, 1.04, "count", ha="right", va="bottom", fontsize=6.5, color=TEXT)
    tidy(axes, "confidence", whole=False, y_name="accuracy (95 % interval)", share=True)
    axes.xaxis.set_major_formatter(percent)
    axes.tick_params(axis="x", pad=7)
    return as_svg(figure, "Accuracy against confidence")


def spread_out(places: Sequence[tuple[float, int]], least: float = 0.066) -> list[tuple[float, int]]:
    """Returns texts with their places in [0, 1], of rising x, moved so that neighbours are at least `least` apart."""
    moved = [x for x, _ in places]
    for _ in range(100):
        for i in range(len(moved) - 1):
            if (lack := least - (moved[i + 1] - moved[i])) > 0:
                moved[i], moved[i + 1] = moved[i] - lack / 2, moved[i + 1] + lack / 2
        moved = [min(x, 1 - least * (len(moved) - 1 - i)) for i, x in enumerate(moved)]
        moved = [max(x, least * i) for i, x in enumerate(moved)]
    return [(x, text) for x, (_, text) in zip(moved, places, strict=True)]


def chart() -> tuple[Any, Any]:
    """Returns a figure of the size of a chart in the page, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.7), layout="constrained")
    return figure, figure.subplots()


def tidy(
    axes: "Axes", x_name: str, log: bool = False, whole: bool = True, y_name: str = "", share: bool = False
) -> None:
    """Gives axes with lines in them ticks at round numbers, a light grid and no frame.

    Args:
      axes: a `matplotlib.axes.Axes`.
      x_name: the label of the x axis.
      log: whether the y axis is logarithmic.
      whole: whether ticks of the x axis lie at whole numbers alone.
      y_name: the label of the y axis.
      share: whether y are fractions, written in percent.
    """
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel=x_name, ylabel=f"{y_name} (log scale)" if log and y_name else y_name)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=ROUND, integer=whole, min_n_ticks=3))
    axes.xaxis.set_major_formatter(whole_number if whole else plain_number)
    if log:
        axes.set_yscale("log")
        axes.set_yticks(log_ticks(*axes.get_ylim()))
        axes.minorticks_off()
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.yaxis.set_major_formatter(percent if share else plain_number)
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


def percent(value: float, position: object = None) -> str:
    """Returns the text of a tick at a fraction, in percent."""
    return f"{plain_number(round(100 * value, 9))} %"


def log_ticks(low: float, high: float) -> list[float]:
    """Returns round numbers in [low, high], 0 < low < high, for an axis that is logarithmic, smallest first.

    They are powers of ten; or 1, 2 and 5 times those, if that makes fewer than three; or else equally far apart, three
    at least where the range allows.
    """
    from matplotlib.ticker import MaxNLocator

    powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for factors in ((1,), (1, 2, 5)):
        ticks = [power * factor for power in powers for factor in factors if low <= power * factor <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 9)]
    ticks = []
    for most in (4, 6, 8):
        ticks = [float(tick) for tick in MaxNLocator(most, steps=ROUND).tick_values(low, high) if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks


def as_svg(figure: "Figure", title: str, colours: Mapping[str, str] = PAGE_COLOURS) -> str:
    """Returns a figure as an SVG element to be put into HTML, its font that of the page.

    Args:
      figure: a `matplotlib.figure.Figure`.
      title: read out by screen readers.
      colours: colour in the figure -> the variable of the page's style that takes its place.
    """
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters are not drawn as paths
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r"font-family: [^;]*; ", "", svg)  # the page sets it
    svg = re.sub(
        r' xmlns(:xlink)?="[^"]*"|(?<=<g) id="[^"]*"', "", svg
    )  # in HTML one is needless, the other not unique
    for colour, name in colours.items():
        svg = svg.replace(colour, f"var({name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
