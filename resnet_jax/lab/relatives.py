"""Compares a plain network, GoogLeNet, ResNets, DenseNet, attention and a small transformer of about equal size.

Models of a user's own (`register_model`) stand beside them.
"""

import time
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from resnet_jax.config import OptimizerConfig
from resnet_jax.lab.fit import EVALUATED, evaluator, fit_seeds, load, network, pixels, recipe
from resnet_jax.lab.panels import COLOURS, Panel, Text, listed, log_axis, plot_spread, seeds_of, short, with_spread
from resnet_jax.lab.record import Notebook, Rows
from resnet_jax.models.registry import cost, own_models

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE = {"stage_sizes": (3, 3, 3)}
RELATIVES: dict[str, tuple[str, dict[str, Any], int]] = {
    "plain": ("cifar_plain20", WIDE, 20),
    "GoogLeNet": ("cifar_googlenet", {}, 19),
    "ResNet": ("cifar_resnet20", WIDE, 20),
    "ResNet, activation first": ("cifar_resnet20", WIDE | {"preact": True, "shortcut": "B"}, 20),
    "DenseNet-BC": ("cifar_densenet_bc_100_12", {"stage_sizes": (6, 6, 6), "growth": 16}, 40),
    "ResNet with attention": ("cifar_botnet20", {}, 29),
    "transformer": ("cifar_vit", {"patch": 4, "width": 84, "mlp": 168, "depth": 5}, 11),
}
"""Name -> registered model, fields of the model, number of weighted layers on the longest path."""


def rows(book: Notebook) -> Rows:
    """Trains each network, and each that `register_model` was given; returns a row for each and each seed.

    Columns: `name`, `seed`, `parameters`, `macs` (multiply-adds per image), `layers` (None for a user's own), `kept`
    (bytes per image that are kept for the backward pass), `images_per_second` in evaluation, `train_error` and
    `test_error`, fractions.
    """
    options = book.options
    data = load(options.dataset)
    epochs = 8.0 if options.quick else 40.0
    found: Rows = []
    seeds = options.seeds or ((0,) if options.quick else (0, 1, 2))
    for name, network_of in RELATIVES.items():
        found += book.part(f"{name}, seeds {seeds}", partial(rows_of, name, *network_of, data, epochs, seeds))
    for name in own_models():  # always anew, since its source may have changed
        found += rows_of(f"{name} (own)", name, {}, None, data, epochs, seeds)
    return found


def rows_of(
    name: str,
    model_name: str,
    fields: dict[str, Any],
    layers: int | None,
    data: Any,
    epochs: float,
    seeds: Sequence[int],
) -> Rows:
    """Returns the rows of one network, one for each seed."""
    fields = fields | ({"patch": data.size // 8 * 2} if model_name == "cifar_vit" else {})
    model = network(model_name, data, **fields)
    changes: dict[str, Any] = {}
    if model_name == "cifar_vit":  # transformers need Adam
        changes["optimizer"] = OptimizerConfig(name="adamw", learning_rate=2e-3, weight_decay=0.05)
    config = recipe(data, epochs, **changes)
    runs = fit_seeds(model, data, config, seeds, points=1)
    variables = runs[0][0].variables
    evaluate = evaluator(model, config)
    evaluate(variables, data.test)
    began = time.perf_counter()
    for _ in range(3):
        evaluate(variables, data.train)
    rate = 3 * min(EVALUATED, len(data.train["label"])) / (time.perf_counter() - began)
    images, _ = pixels(data, 8, config)
    parameters, macs = cost(model, data.size)
    about = {"parameters": parameters, "macs": macs, "layers": layers,
             "kept": kept_bytes(model, variables, images) / 8, "images_per_second": rate}  # fmt: skip
    return [
        {"name": name, "seed": seed} | about | {split: curve[-1][split] for split in ("train_error", "test_error")}
        for seed, (_, curve) in zip(seeds, runs, strict=True)
    ]


def kept_bytes(model: Any, variables: Any, images: jax.Array) -> int:
    """Returns how many bytes of activations are kept between forward and backward pass, computed from shapes alone."""

    def backward(params: optax.Params, images: jax.Array) -> Any:
        def loss(params: optax.Params) -> jax.Array:
            given = variables | {"params": params}
            rngs = {"dropout": jax.random.key(0)}
            return model.apply(given, images, train=True, mutable=["batch_stats"], rngs=rngs)[0].sum()

        return jax.vjp(loss, params)[1]

    shapes = jax.eval_shape(backward, variables["params"], images)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes) if x.shape[:1] == images.shape[:1])


def table(found: Rows) -> Rows:
    """Returns the means over the seeds, with the standard deviation of the test error where there are several."""
    lines: Rows = []
    for name in dict.fromkeys(row["name"] for row in found):
        of = [row for row in found if row["name"] == name]
        mean = {key: float(np.mean([row[key] for row in of])) for key in of[0] if key not in ("name", "layers")}
        lines.append({
            "network": name, "layers": of[0]["layers"] or "?", "parameters": of[0]["parameters"],
            "MMACs an image": f"{mean['macs'] / 1e6:.1f}", "KiB kept": round(mean["kept"] / 2**10),
            "images/s": round(mean["images_per_second"]), "train error, %": f"{100 * mean['train_error']:.1f}",
            "test error, %": with_spread(100 * row["test_error"] for row in of), "seeds": len(of),
        })  # fmt: skip
    return lines


def means_of(found: Rows, key: str, unit: float = 1.0) -> dict[str, float]:
    """Returns the mean over the seeds of a column, for each network."""
    names = dict.fromkeys(row["name"] for row in found)
    return {name: float(np.mean([row[key] for row in found if row["name"] == name])) / unit for name in names}


def extremes(means: dict[str, float]) -> tuple[Text, Text]:
    """Returns the names of those with the lowest and with the highest value."""
    low, high = (
        listed(name for name, mean in means.items() if np.isclose(mean, best))
        for best in (min(means.values()), max(means.values()))
    )
    return low, high


def takeaway(found: Rows) -> Text:
    """Returns what the experiment found."""
    errors, (seeds, seeds_ja) = means_of(found, "test_error", 0.01), seeds_of(found)
    (best, best_ja), (worst, worst_ja) = extremes(errors)
    low, high = (f"{end(errors.values()):.1f}" for end in (min, max))
    return (
        f"Of about equal size, after equally many epochs, the lowest test error ({low} %) is that of {best}, the "
        f"highest ({high} %) that of {worst} {seeds}.",
        f"ほぼ同じ大きさ、同じエポック数で、テスト誤差が最も低いのは {best_ja} ({low} %)、"
        f"最も高いのは {worst_ja} ({high} %) である{seeds_ja}。",
    )


def panels(found: Rows) -> list[Panel]:
    """Returns test error against arithmetic, memory and speed."""
    names = list(dict.fromkeys(row["name"] for row in found))

    def against(axes: "Axes", key: str, unit: float, label: str) -> None:
        places = means_of(found, key, unit)
        for colour, marker, name in zip(cycle(COLOURS), cycle("osD^vPX*"), names, strict=False):
            errors = [100 * row["test_error"] for row in found if row["name"] == name]
            plot_spread(axes, [places[name]], [errors], marker, colour, name)
        axes.set(xlabel=label, ylabel="test error, %", xscale="log")
        axes.margins(0.1)
        log_axis(axes.xaxis)
        if min(row["test_error"] for row in found) > 0:
            log_axis(axes.yaxis)

    def panel(key: str, unit: float, label: str, what: Text) -> Panel:
        means = means_of(found, key, unit)
        (low, low_ja), (high, high_ja) = extremes(means)
        least, most = (short(end(means.values())) for end in (min, max))
        finding = (
            f"{what[0]}: {least} ({low}) to {most} ({high})",
            f"{what[1]}: {least} ({low_ja}) から {most} ({high_ja})",
        )
        return Panel(finding, partial(against, key=key, unit=unit, label=label))

    return [
        panel("macs", 1e6, "million multiply-adds an image", ("Million multiply-adds", "積和 (百万)")),
        panel("kept", 2**10, "KiB kept an image, in training", ("KiB kept", "保持する KiB")),
        panel("images_per_second", 1, "images a second, evaluated", ("Images a second", "毎秒の枚数")),
    ]
