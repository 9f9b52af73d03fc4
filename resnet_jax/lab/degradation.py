"""Shows that depth raises the training error of plain networks, not of residual ones (He et al. 2015, section 4.2)."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from resnet_jax.config import OptimizerConfig
from resnet_jax.lab.fit import cifar_net, fit_seeds, load, recipe
from resnet_jax.lab.panels import COLOURS, Panel, Text, plot_spread, seeds_of, translated, with_spread
from resnet_jax.lab.record import Notebook, Rows
from resnet_jax.runs.charts import TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("plain", "residual")


def rows(book: Notebook) -> Rows:
    """Trains networks of several depths; returns their curves: `kind`, `depth`, `seed`, and the columns of `fit`."""
    options = book.options
    data = load(options.dataset)
    depths = options.depths or ((20, 56) if options.quick else (20, 32, 44, 56, 110))
    seeds = options.seeds or ((0,) if options.quick else (0, 1, 2))
    epochs = 10.0 if options.quick else 40.0
    gentle = OptimizerConfig(learning_rate=0.03)  # at 0.1 the loss of a plain net of 56 layers explodes for good
    found: Rows = []
    for depth in depths:
        for kind in KINDS:

            def train(kind: str = kind, depth: int = depth) -> Rows:
                model = cifar_net(kind, depth, data, zero_init_last=False)  # as in the paper
                runs = fit_seeds(model, data, recipe(data, epochs, optimizer=gentle), seeds, points=8)
                about = [{"kind": kind, "depth": depth, "seed": seed} for seed in seeds]
                return [of | row for of, (_, curve) in zip(about, runs, strict=True) for row in curve]

            found += book.part(f"{kind} {depth}, seeds {seeds}", train)
    return found


def last_errors(found: Rows, kind: str, depth: int, split: str = "train") -> list[float]:
    """Returns the last error of each seed, as fractions."""
    runs: dict[int, float] = {}
    for row in found:
        if (row["kind"], row["depth"]) == (kind, depth):
            runs[row["seed"]] = row[f"{split}_error"]
    return list(runs.values())


def table(found: Rows) -> Rows:
    """Returns for each network the mean and standard deviation of its last errors over the seeds, in percent."""
    lines: Rows = []
    for kind, depth in dict.fromkeys((row["kind"], row["depth"]) for row in found):
        line: dict[str, Any] = {"network": kind, "layers": depth}
        for split in ("train", "test"):
            errors = last_errors(found, kind, depth, split)
            line[f"{split} error, %"] = with_spread(100 * error for error in errors)
        lines.append(line | {"seeds": len(errors)})
    return lines


def percent(found: Rows, kind: str, depth: int, split: str = "train") -> str:
    """Returns the mean of the last errors, in percent."""
    return f"{100 * np.mean(last_errors(found, kind, depth, split)):.1f}"


def takeaway(found: Rows) -> Text:
    """Returns what the experiment found."""
    depths, (seeds, seeds_ja) = sorted({row["depth"] for row in found}), seeds_of(found)
    plain, residual = (percent(found, kind, depths[-1]) for kind in KINDS)
    english = f"With {depths[-1]} layers the plain network errs on {plain} % of its own training images, the residual "
    japanese = f"{depths[-1]} 層では、plain ネットワークは訓練画像自体の {plain} % を、残差は {residual} % を誤る"
    if len(depths) == 1:
        return f"{english}one on {residual} % {seeds}.", f"{japanese}{seeds_ja}。"
    before, after = (percent(found, kind, depths[0]) for kind in KINDS)
    shallow, deep = (percent(found, "residual", depth, "test") for depth in (depths[0], depths[-1]))
    return (
        f"{english}one on {residual} %; with {depths[0]} layers it is {before} % and {after} %. On test images the "
        f"residual one errs on {shallow} % with {depths[0]} layers, on {deep} % with {depths[-1]} {seeds}.",
        f"{japanese}。{depths[0]} 層ではそれぞれ {before} % と {after} % である。残差のテスト誤差は {depths[0]} 層で "
        f"{shallow} %、{depths[-1]} 層で {deep} % である{seeds_ja}。",
    )


def panels(found: Rows) -> list[Panel]:
    """Returns errors over the epochs of either kind, and the last errors against the depth."""
    depths = sorted({row["depth"] for row in found})
    ends = {kind: " → ".join(percent(found, kind, depth) for depth in depths) for kind in KINDS}
    layers = " → ".join(map(str, depths))

    def curves(axes: "Axes", kind: str) -> None:
        for colour, depth in zip(COLOURS, depths, strict=False):
            of = [row for row in found if (row["kind"], row["depth"]) == (kind, depth)]
            epochs = sorted({row["epoch"] for row in of})
            for split, style in (("train", "-"), ("test", ":")):
                middle = [100 * np.mean([row[f"{split}_error"] for row in of if row["epoch"] == e]) for e in epochs]
                axes.plot(epochs, middle, style, color=colour, label=f"{depth} layers" if split == "train" else None)
        for split, style in (("training images", "-"), ("test images", ":")):
            axes.plot([], [], style, color=TEXT, label=split)
        axes.set(xlabel="epoch", ylabel="error, %", ylim=(0, 100))

    def ending(axes: "Axes") -> None:
        for colour, kind in zip(COLOURS, KINDS, strict=False):
            for split, style, of in (("train", "o-", "training images"), ("test", "s:", "test images")):
                values = [[100 * error for error in last_errors(found, kind, depth, split)] for depth in depths]
                plot_spread(axes, depths, values, style, colour, f"{kind}, {of}")
        axes.set(xlabel="layers", ylabel="error at the end, %", xticks=depths, ylim=(0, None))

    return [
        *(
            Panel(
                (f"{kind}, {layers} layers: training error {ends[kind]} % at the end",
                 f"{translated(kind)}、{layers} 層: 最後の訓練誤差 {ends[kind]} %"),
                partial(curves, kind=kind),
            )
            for kind in KINDS
        ),
        Panel(
            (f"{layers} layers: training error of plain {ends['plain']} %, of residual {ends['residual']} %",
             f"{layers} 層の訓練誤差: plain {ends['plain']} %、残差 {ends['residual']} %"),
            ending,
        ),
    ]  # fmt: skip
