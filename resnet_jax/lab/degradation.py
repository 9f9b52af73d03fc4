"""Shows that depth raises the training error of plain networks, not of residual ones (He et al. 2015, section 4.2)."""

from typing import Any

import numpy as np

from resnet_jax.config import OptimizerConfig
from resnet_jax.lab.fit import cifar_net, fit, load, recipe
from resnet_jax.lab.record import COLOURS, Notebook, Rows, axes_of

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
    for seed in seeds:
        for depth in depths:
            for kind in KINDS:

                def train(kind: str = kind, depth: int = depth, seed: int = seed) -> Rows:
                    model = cifar_net(kind, depth, data, zero_init_last=False)  # as in the paper
                    _, curve = fit(model, data, recipe(data, epochs, seed, optimizer=gentle), points=8)
                    return [{"kind": kind, "depth": depth, "seed": seed} | row for row in curve]

                found += book.part(f"{kind} {depth}, seed {seed}", train)
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
            errors = 100 * np.asarray(last_errors(found, kind, depth, split))
            line[f"{split} error, %"] = f"{errors.mean():.1f} ± {errors.std():.1f}"
        lines.append(line | {"seeds": len(errors)})
    return lines


def draw(found: Rows) -> Any:
    """Draws errors over the epochs, and the last errors against the depth; returns the figure."""
    figure, axes = axes_of(3)
    depths = sorted({row["depth"] for row in found})
    for axis, kind in zip(axes, KINDS, strict=False):
        for colour, depth in zip(COLOURS, depths, strict=False):
            of = [row for row in found if (row["kind"], row["depth"]) == (kind, depth)]
            epochs = sorted({row["epoch"] for row in of})
            for split, style in (("train", "-"), ("test", ":")):
                middle = [np.mean([row[f"{split}_error"] for row in of if row["epoch"] == e]) for e in epochs]
                axis.plot(epochs, middle, style, color=colour, label=f"{depth} layers" if split == "train" else None)
        axis.set(title=f"{kind}: training (line) and test error", xlabel="epoch", ylim=(0, 1))
        axis.legend(frameon=False)
    for colour, kind in zip(COLOURS, KINDS, strict=False):
        for split, style in (("train", "o-"), ("test", "o:")):
            values = [last_errors(found, kind, depth, split) for depth in depths]
            middle, spread = [np.mean(v) for v in values], [np.std(v) for v in values]
            axes[2].errorbar(depths, middle, spread, fmt=style, color=colour, capsize=3, label=f"{kind}, {split}")
    axes[2].set(title="error at the end", xlabel="layers", xticks=depths)
    axes[2].legend(frameon=False)
    return figure
