"""Measures training and test error of a deep network on a small training set, with and without regularisers."""

import dataclasses
from typing import Any

import numpy as np

from resnet_jax.config import AugmentConfig, OptimizerConfig
from resnet_jax.lab.fit import cifar_net, fit, load, recipe
from resnet_jax.lab.record import COLOURS, Notebook, Rows, axes_of

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
    for seed in options.seeds or ((0,) if options.quick else (0, 1, 2)):
        for way, changes in WAYS.items():

            def one(way: str = way, changes: dict[str, Any] = changes, seed: int = seed) -> Rows:
                base = recipe(data, epochs, seed)
                config = dataclasses.replace(
                    base,
                    optimizer=OptimizerConfig(
                        **({"learning_rate": 0.05, "weight_decay": 0.0} | changes.get("optimizer", {}))
                    ),
                    augment=AugmentConfig(crop="none", **changes.get("augment", {})),
                    train=dataclasses.replace(base.train, batch_size=50, **changes.get("train", {})),
                )
                model = cifar_net("residual", depth, data, **changes.get("model", {}))
                _, curve = fit(model, data, config, points=1)
                return [{"way": way, "depth": depth, "seed": seed} | curve[-1]]

            found += book.part(f"{way}, seed {seed}", one)
    return found


def draw(found: Rows) -> Any:
    """Draws the last errors and losses with each regulariser; returns the figure."""
    figure, axes = axes_of(2, width=5.6)
    ways = list(dict.fromkeys(row["way"] for row in found))
    for axis, names in zip(axes, (("train_error", "test_error"), ("train_loss", "test_loss")), strict=True):
        for shift, colour, name in zip((-0.2, 0.2), COLOURS, names, strict=False):
            values = [[row[name] for row in found if row["way"] == way] for way in ways]
            middle, spread = [np.mean(v) for v in values], [np.std(v) for v in values]
            place, label = np.arange(len(ways)) + shift, name.replace("_", " ")
            axis.barh(place, middle, 0.38, xerr=spread, color=colour, label=label)
        axis.set(yticks=range(len(ways)), yticklabels=ways, title=f"{names[0].split('_')[1]} at the end")
        axis.invert_yaxis()
        axis.legend(frameon=False)
    return figure
