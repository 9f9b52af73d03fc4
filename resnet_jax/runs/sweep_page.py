"""`sweep.html`: what a sweep came to, in one file that needs nothing else."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.data.folders import printable
from resnet_jax.files import write_whole
from resnet_jax.runs.charts import BLUE, GREY, RED, TEXT, as_svg, chart, plain_number, spoken, tidy
from resnet_jax.runs.report_page import page_template
from resnet_jax.training.parts import parts_in_words

SHARES = ("accuracy", "macro_recall", "macro_f1", "map", "top5")
"""Metrics that are fractions."""


def spoken_value(metric: str, value: float) -> str:
    """Returns a metric's value as text: a fraction in percent, else four digits."""
    return f"{100 * value:.2f}\N{NO-BREAK SPACE}%" if metric in SHARES else f"{value:.4g}"


def write_page(folder: Path, found: Mapping[str, Any]) -> Path:
    """Writes `sweep.html` into a sweep's folder; returns its path.

    Args:
      found: as `sweep` returns it.
    """
    metric = found["metric"] or "accuracy"
    shown = spoken_value if found["chosen"] else lambda *_: ""
    settings = [
        {"words": worded(s["values"]) or "all members", "count": s["count"], "diverged": s["diverged"]}
        | {"mean": "" if s["mean"] is None else shown(metric, s["mean"])}
        | {"spread": "" if s["spread"] is None else shown(metric, s["spread"])}
        for s in found["settings"]
    ]
    members = [
        row | {"words": worded(row["values"]), "text": "" if row["value"] is None else shown(metric, row["value"])}
        for row in found["members"]
    ]
    page = page_template(Path(__file__).with_name("sweep_page.html")).render(
        title=f"{len(members)} runs over {' and '.join(map(last_of, found['varied']))}",
        folder=folder.name,
        verdict=verdict(found),
        metric=spoken_metric(found),
        settings=settings,
        members=members,
        chosen=found["chosen"],
        seeds="train.seed" in found["varied"],
        own_validation=found["own_validation"],
        charts={name: effect_chart(found, name) for name in found["varied"]} if found["chosen"] else {},
        own=parts_in_words(folder),
        recipe=json.dumps(found["recipe"], indent=2),
    )
    write_whole(folder / "sweep.html", printable(page))
    return folder / "sweep.html"


def spoken_metric(found: Mapping[str, Any]) -> str:
    """Returns what members are compared by, as people say it."""
    return spoken(next((row["metric"] for row in found["members"] if row["metric"]), "validation/accuracy"))


def last_of(name: str) -> str:
    """Returns a field as people say it: `optimizer.learning_rate` is `learning rate`."""
    return name.rpartition(".")[2].replace("_", " ") if not name.endswith(".name") else name.partition(".")[0]


def worded(values: Mapping[str, Any]) -> str:
    """Returns values with the names of their fields."""
    return ", ".join(f"{last_of(name)} {value}" for name, value in values.items())


def verdict(found: Mapping[str, Any]) -> str:
    """Returns a sentence or two on what a sweep came to."""
    if found["chosen"] is None:
        return "No member came to its end."
    best, metric = found["settings"][0], found["metric"]
    spread = "" if best["spread"] is None else f" ± {spoken_value(metric, best['spread'])} (standard deviation)"
    over = f" over {best['count'] - best['diverged']} seeds" if best["count"] > 1 else ""
    first = f"Best is {worded(best['values']) or 'the recipe'}: {spoken_metric(found)} "
    first += f"{spoken_value(metric, best['mean'])}{spread}{over}."
    test = found["test"]
    if test is None:
        return first
    name = "ema/test" if "ema/test" in test else "test"
    main = "accuracy" if "accuracy" in test[name] else "loss"
    value = spoken_value(main, test[name][main])
    of = spoken(f"{name}/{main}")
    return f"{first} The chosen member: {of} {value} on {test[name]['count']:,} images."


def effect_chart(found: Mapping[str, Any], name: str) -> str:
    """Returns an SVG element with the validation metric against the values of a field.

    A dot is a member; the line goes through the best setting of each value, with the standard deviation over its seeds.
    Of the seed, whose effect is chance, there are dots alone.
    """
    metric, values = found["metric"], found["varied"][name]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    log = numbers and min(values) > 0 and max(values) / min(values) >= 8 and name != "train.seed"
    place = {to_key(v): (v if numbers else i) for i, v in enumerate(values)}
    figure, axes = chart()
    rows = [row for row in found["members"] if row["value"] is not None]
    x = [place[to_key(row["values"][name])] for row in rows]
    axes.plot(x, [row["value"] for row in rows], "o", color=GREY, markersize=4, alpha=0.7, label="a member")
    if name != "train.seed":
        best = best_settings(found, name)
        line = sorted((place[to_key(s["values"][name])], s["mean"], s["spread"] or 0.0) for s in best)
        at, mean, spread = (np.asarray(part) for part in zip(*line, strict=True))
        form = "o-" if numbers else "o"
        axes.errorbar(at, mean, spread, fmt=form, color=BLUE, linewidth=1.6, markersize=5, label="best setting")
    of_chosen = [(a, row) for a, row in zip(x, rows, strict=True) if row["name"] == found["chosen"]]
    for at_x, row in of_chosen:
        axes.plot(at_x, row["value"], "D", color=RED, markersize=6, label="chosen")
    tidy(axes, last_of(name), whole=False, y_name=f"validation {metric}", share=metric in SHARES)
    if log:
        axes.set_xscale("log")
    ticks = list(place.values()) if len(place) <= 8 else list(place.values())[:: -(-len(place) // 8)]
    words = [v if isinstance(v, str) else "none" if v is None else plain_number(v) for v in values]
    labels = dict(zip(place.values(), words, strict=True))
    axes.set_xticks(ticks, [labels[tick] for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.08)
    figure.legend(loc="outside lower left", ncols=3, frameon=False, labelcolor=TEXT, handlelength=1.2)
    return as_svg(figure, f"Validation {metric} against {last_of(name)}")


def to_key(value: Any) -> str:
    """Returns a value, which may be a list, as a key."""
    return json.dumps(value)


def best_settings(found: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    """Returns the best setting of each value of a field; settings stand with the best first."""
    best: dict[str, Mapping[str, Any]] = {}
    for setting in found["settings"]:
        if setting["mean"] is not None:
            best.setdefault(to_key(setting["values"][name]), setting)
    return list(best.values())
