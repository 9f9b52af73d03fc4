"""Charts as inline SVG, in the colours of the page that holds them."""

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 60, 12, 14, 34


def line_chart(title: str, series: dict[str, Points], x_name: str, log: bool = False) -> str:
    """Lines over a common x; each series is called by its name in the legend below.

    Args:
      series: name -> points (x, y) with rising x; without points it is left out.
      log: the y axis is logarithmic; points at 0 and below are left out.
    """
    drawn = {name: [p for p in points if not log or p[1] > 0] for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [math.log10(y) if log else y for points in drawn.values() for _, y in points]
    x_range, y_range = _range(xs), _range(ys)
    marks = [_line(f"line s{i}", points, x_range, y_range, log) for i, points in enumerate(drawn.values())]
    legend = "".join(f'<span class="key s{i}">{escape(name)}</span>' for i, name in enumerate(drawn))
    axes = _axes(x_range, y_range, log, x_name)
    return _figure(title, axes + "".join(marks), legend)


def reliability_chart(rows: Sequence[dict[str, float]]) -> str:
    """Accuracy against confidence; a calibrated network lies on the diagonal. The dots grow with their count."""
    most = max(row["count"] for row in rows)
    unit = (0.0, 1.0)
    dots = [
        f'<circle class="dot" cx="{_x(row["confidence"], unit):.1f}" cy="{_y(row["accuracy"], unit):.1f}" '
        f'r="{2.5 + 6 * math.sqrt(row["count"] / most):.1f}"><title>{row["count"]} predictions: confidence '
        f"{row['confidence']:.3f}, accuracy {row['accuracy']:.3f}</title></circle>"
        for row in rows
    ]
    diagonal = f'<line class="grid" x1="{_x(0, unit)}" y1="{_y(0, unit)}" x2="{_x(1, unit)}" y2="{_y(1, unit)}"/>'
    return _figure("Accuracy against confidence", _axes(unit, unit, False, "confidence") + diagonal + "".join(dots), "")


def _figure(title: str, marks: str, legend: str) -> str:
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{marks}</svg>'
    return f'<figure><figcaption>{escape(title)}</figcaption>{svg}<div class="legend">{legend}</div></figure>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    around = 0 if high > low else abs(low) / 2 or 0.5
    return low - around, high + around


def _x(x: float, x_range: tuple[float, float]) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (x - x_range[0]) / (x_range[1] - x_range[0])


def _y(y: float, y_range: tuple[float, float]) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y_range[0]) / (y_range[1] - y_range[0])


def _line(kind: str, points: Points, x_range: tuple[float, float], y_range: tuple[float, float], log: bool) -> str:
    places = [(_x(x, x_range), _y(math.log10(y) if log else y, y_range)) for x, y in points]
    if len(places) == 1:
        return f'<circle class="{kind}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>'
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'


def _tick(y: float, y_range: tuple[float, float], log: bool) -> str:
    return f"{10**y:.3g}" if log else "0" if abs(y) < 1e-3 * (y_range[1] - y_range[0]) else f"{y:.3g}"


def _axes(x_range: tuple[float, float], y_range: tuple[float, float], log: bool, x_name: str) -> str:
    marks = []
    for i in range(5):
        x, y = (low + (high - low) * i / 4 for low, high in (x_range, y_range))
        at_x, at_y = _x(x, x_range), _y(y, y_range)
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y:.1f}" y2="{at_y:.1f}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{at_y + 4:.1f}" text-anchor="end">{_tick(y, y_range, log)}</text>')
        anchor = "end" if i == 4 else "middle"
        marks.append(f'<text x="{at_x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}">{x:.4g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    marks.append(f'<text x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_name)}</text>')
    return "".join(marks)
