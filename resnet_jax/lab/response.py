"""Measures how close blocks are to the identity: outputs of branches against their inputs (He et al. 2015, Fig. 7)."""

from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import numpy as np
from flax.typing import VariableDict

from resnet_jax.lab.fit import cifar_net, fit_seeds, load, pixels, recipe
from resnet_jax.lab.panels import COLOURS, Panel, Text, seeds_of, short
from resnet_jax.lab.record import Notebook, Rows
from resnet_jax.models.blocks import ResidualBlock

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def rows(book: Notebook) -> Rows:
    """Trains networks; returns for each block `kind`, `depth`, `seed`, `block`, and the columns of `responses`."""
    options = book.options
    data = load(options.dataset)
    depths = options.depths or ((8, 20) if options.quick else (20, 56, 110))
    found: Rows = []
    seeds = options.seeds or (0,)
    for depth in depths:

        def of_depth(depth: int = depth) -> Rows:
            config = recipe(data, 6.0 if options.quick else 30.0)
            model = cifar_net("residual", depth, data)
            runs = fit_seeds(model, data, config, seeds, points=1)
            images, _ = pixels(data, 256, config)
            return [
                {"kind": "residual", "depth": depth, "seed": seed} | row
                for seed, (state, _) in zip(seeds, runs, strict=True)
                for row in responses(model, state.variables, images)
            ]

        found += book.part(f"residual {depth}, seeds {seeds}", of_depth)
    return found


def responses(model: nn.Module, variables: VariableDict, images: jax.Array) -> Rows:
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

    def forward(variables: VariableDict, images: jax.Array) -> Any:
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


def mean_ratios(found: Rows) -> dict[int, str]:
    """Returns the mean of `ratio` over the blocks of each depth, as text."""
    depths = sorted({row["depth"] for row in found})
    return {depth: short(np.mean([row["ratio"] for row in found if row["depth"] == depth])) for depth in depths}


def takeaway(found: Rows) -> Text:
    """Returns what the experiment found."""
    means, (seeds, seeds_ja) = mean_ratios(found), seeds_of(found)
    return (
        "What a block adds, over what it is given, is on average "
        + ", ".join(f"{value} with {depth} layers" for depth, value in means.items())
        + f" {seeds}.",
        "ブロックが加える量の入力に対する比は平均して、"
        + "、".join(f"{depth} 層で {value}" for depth, value in means.items())
        + f" である{seeds_ja}。",
    )


def panels(found: Rows) -> list[Panel]:
    """Returns the deviation of the branches over the blocks, and its ratio to the input's."""
    means = mean_ratios(found)

    def over_blocks(axes: "Axes", name: str, label: str) -> None:
        for colour, marker, depth in zip(COLOURS, "osD^vPX*", means, strict=False):
            of = [row for row in found if row["depth"] == depth]
            blocks = sorted({row["block"] for row in of})
            middle = [np.mean([row[name] for row in of if row["block"] == b]) for b in blocks]
            share = [100 * b / blocks[-1] for b in blocks]
            axes.plot(share, middle, f"{marker}-", color=colour, label=f"{depth} layers")
        axes.set(xlabel="place of the block, % of the depth", ylabel=label, xlim=(0, 103), ylim=(0, None))

    deviations = [row["deviation"] for row in found]
    low, high = short(min(deviations)), short(max(deviations))
    layers, values = ", ".join(map(str, means)), ", ".join(means.values())
    return [
        Panel(
            (f"What a branch adds deviates by {low} to {high}", f"枝が加える量の標準偏差は {low} から {high}"),
            partial(over_blocks, name="deviation", label="deviation of what the branch adds"),
        ),
        Panel(
            (f"Mean ratio to the block's input: {values} with {layers} layers",
             f"ブロックの入力に対する比の平均: {layers} 層で {values}"),
            partial(over_blocks, name="ratio", label="the same over the input's"),
        ),
    ]  # fmt: skip
