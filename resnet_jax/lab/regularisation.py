"""Measures training and test error of a deep network on a small training set, with and without regularisers."""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from resnet_jax.config import AugmentConfig, OptimizerConfig
from resnet_jax.lab.fit import cifar_net, fit_seeds, load, recipe
from resnet_jax.lab.panels import COLOURS, Panel, Text, listed, seeds_of
from resnet_jax.lab.record import Notebook, Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "weight decay": {"optimizer": {"weight_decay": 5e-3}},
    "drop path": {"model": {"drop_path_rate": 0.3}},
    "dropout": {"model": {"drop_rate": 0.5}},
    "mixup": {"augment": {"mixup": 0.4}},
    "label smoothing": {"train": {"label_smoothing": 0.2}},
}


def rows(book: Notebook) -> Rows:
    """Trains a network with each regulariser; returns `way`, `depth`, `seed`, and the last row of `fit`."""
    options = book.options
    data = load(options.dataset, train=150 if options.dataset == "digits" else 2000)
    depth = (options.depths or ((20,) if options.quick else (56,)))[0]
    epochs = 40.0 if options.quick else 120.0
    found: Rows = []
    seeds = options.seeds or ((0,) if options.quick else (0, 1, 2))
    for way, changes in WAYS.items():

        def of_way(way: str = way, changes: dict[str, Any] = changes) -> Rows:
            base = recipe(data, epochs)
            config = dataclasses.replace(
                base,
                optimizer=OptimizerConfig(
                    **({"learning_rate": 0.05, "weight_decay": 0.0} | changes.get("optimizer", {}))
                ),
                augment=AugmentConfig(crop="none", **changes.get("augment", {})),
                train=dataclasses.replace(base.train, batch_size=50, **changes.get("train", {})),
            )
            model = cifar_net("residual", depth, data, **changes.get("model", {}))
            runs = fit_seeds(model, data, config, seeds, points=1)
            about = [{"way": way, "depth": depth, "seed": seed} for seed in seeds]
            return [of | curve[-1] for of, (_, curve) in zip(about, runs, strict=True)]

        found += book.part(f"{way}, seeds {seeds}", of_way)
    return found


def means_of(found: Rows, name: str) -> dict[str, float]:
    """Returns the mean over the seeds of a column, for each regulariser."""
    ways = dict.fromkeys(row["way"] for row in found)
    return {way: float(np.mean([row[name] for row in found if row["way"] == way])) for way in ways}


def lowest(means: dict[str, float]) -> Text:
    """Returns the names of those with the lowest value."""
    return listed(way for way, mean in means.items() if np.isclose(mean, min(means.values())))


def takeaway(found: Rows) -> Text:
    """Returns what the experiment found."""
    errors, (seeds, seeds_ja) = means_of(found, "test_error"), seeds_of(found)
    (best, best_ja), low = lowest(errors), 100 * min(errors.values())
    none = 100 * errors["none"]
    return (
        f"The lowest test error, {low:.1f} %, is that of: {best}; without a regulariser it is {none:.1f} % {seeds}.",
        f"テスト誤差が最も低いのは {best_ja} の {low:.1f} % で、正則化なしでは {none:.1f} % である{seeds_ja}。",
    )


def panels(found: Rows) -> list[Panel]:
    """Returns the last errors and losses with each regulariser."""
    ways = list(dict.fromkeys(row["way"] for row in found))

    def bars(axes: "Axes", quantity: str, unit: float, label: str) -> None:
        for shift, colour, split in zip((-0.2, 0.2), COLOURS, ("train", "test"), strict=False):
            values = [[unit * row[f"{split}_{quantity}"] for row in found if row["way"] == way] for way in ways]
            spread = [np.std(v) for v in values] if len(values[0]) > 1 else None
            name = "training images" if split == "train" else "test images"
            place = np.arange(len(ways)) + shift
            axes.barh(place, [np.mean(v) for v in values], 0.38, xerr=spread, color=colour, label=name)
        axes.set(yticks=range(len(ways)), yticklabels=ways, xlabel=label, ylabel="regulariser")
        axes.invert_yaxis()

    errors, losses = means_of(found, "test_error"), means_of(found, "test_loss")
    (error, error_ja), (loss, loss_ja) = lowest(errors), lowest(losses)
    low, least = 100 * min(errors.values()), min(losses.values())
    return [
        Panel(
            (f"Lowest test error, {low:.1f} %: {error}", f"最も低いテスト誤差 {low:.1f} %: {error_ja}"),
            partial(bars, quantity="error", unit=100, label="error at the end, %"),
        ),
        Panel(
            (f"Lowest test loss, {least:.2f}: {loss}", f"最も低いテスト損失 {least:.2f}: {loss_ja}"),
            partial(bars, quantity="loss", unit=1, label="loss at the end"),
        ),
    ]
