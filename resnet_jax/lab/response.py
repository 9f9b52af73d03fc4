"""Measures how close blocks are to the identity: outputs of branches against their inputs (He et al. 2015, Fig. 7)."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np

from resnet_jax.lab.fit import cifar_net, fit, load, pixels, recipe, variables_of
from resnet_jax.lab.record import COLOURS, Notebook, Rows, axes_of
from resnet_jax.models.blocks import ResidualBlock


def rows(book: Notebook) -> Rows:
    """Trains networks; returns for each block `kind`, `depth`, `seed`, `block`, and the columns of `responses`."""
    options = book.options
    data = load(options.dataset)
    depths = options.depths or ((8, 20) if options.quick else (20, 56, 110))
    found: Rows = []
    for seed in options.seeds or (0,):
        for depth in depths:

            def one(depth: int = depth, seed: int = seed) -> Rows:
                config = recipe(data, 6.0 if options.quick else 30.0, seed)
                model = cifar_net("residual", depth, data)
                state, _ = fit(model, data, config, points=1)
                images, _ = pixels(data, 256, config)
                about = {"kind": "residual", "depth": depth, "seed": seed}
                return [about | row for row in responses(model, variables_of(state), images)]

            found += book.part(f"residual {depth}, seed {seed}", one)
    return found


def responses(model: Any, variables: Any, images: jax.Array) -> Rows:
    """Returns for each block the `mean` and standard `deviation` of its branch's output, the standard deviation of its
    `input`, and the `ratio` of the two deviations.

    Args:
      model: a CIFAR ResNet.
      variables: of the model.
      images: float [batch, height, width, 3].
    """
    seen: dict[str, Any] = {}

    def tap(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            name = "/".join(context.module.path)
            if isinstance(context.module, ResidualBlock):
                seen.setdefault(name, {})["input"] = args[0].std()
            if name.endswith("/norm2"):
                seen.setdefault(name.removesuffix("/norm2"), {}).update(mean=out.mean(), deviation=out.std())
        return out

    def forward(variables: Any, images: jax.Array) -> Any:
        with nn.intercept_methods(tap):
            model.apply(variables, images, train=False)
        return dict(seen)

    measured = jax.device_get(jax.jit(forward)(variables, images))
    order = sorted(measured, key=lambda name: [int(word.strip("stageblock")) for word in name.split("/")])
    return [
        {"block": i} | {key: float(value) for key, value in measured[name].items()}
        | {"ratio": float(measured[name]["deviation"] / measured[name]["input"])}
        for i, name in enumerate(order, start=1)
    ]  # fmt: skip


def draw(found: Rows) -> Any:
    """Draws the deviation of the branches over the blocks, and its ratio to the input's; returns the figure."""
    figure, axes = axes_of(2)
    for colour, depth in zip(COLOURS, sorted({row["depth"] for row in found}), strict=False):
        of = [row for row in found if row["depth"] == depth]
        blocks = sorted({row["block"] for row in of})
        for axis, name in zip(axes, ("deviation", "ratio"), strict=True):
            middle = [np.mean([row[name] for row in of if row["block"] == b]) for b in blocks]
            axis.plot(
                [b / blocks[-1] for b in blocks], middle, "o-", color=colour, markersize=3, label=f"{depth} layers"
            )
    axes[0].set(title="deviation of what a branch puts out", xlabel="block, share of the depth")
    axes[1].set(title="the same over that of the block's input", xlabel="block, share of the depth")
    for axis in axes:
        axis.legend(frameon=False)
    return figure
