"""Maps the loss around a trained network, on a plane of two random directions (Li et al. 2018, arXiv:1712.09913).

Each filter of a direction has the norm of the network's own filter; biases and norms do not change. Batch norms take
the statistics of the batch at every point, so that the statistics fit the changed filters.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.typing import VariableDict

from resnet_jax.lab.fit import cifar_net, fit, load, pixels, recipe
from resnet_jax.lab.panels import COLOURS, Panel, Text, log_axis, short, translated
from resnet_jax.lab.record import Notebook, Rows
from resnet_jax.runs.charts import log_ticks, plain_number
from resnet_jax.training.losses import cross_entropy
from resnet_jax.training.state import path_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("plain", "residual")


def rows(book: Notebook) -> Rows:
    """Trains a plain and a residual network; returns points of the plane: `kind`, `depth`, `x`, `y`, `loss`."""
    options = book.options
    data = load(options.dataset)
    depth = (options.depths or ((20,) if options.quick else (56,)))[0]
    side = np.linspace(-1, 1, 13 if options.quick else 31)
    found: Rows = []
    for kind in KINDS:
        trained: list[Any] = []

        def network(kind: str = kind, trained: list[Any] = trained) -> Any:
            """Returns the loss on the plane, after training; it trains only if a row of points is missing."""
            if not trained:
                config = recipe(data, 8.0 if options.quick else 30.0, (options.seeds or (0,))[0])
                model = cifar_net(kind, depth, data)
                state, _ = fit(model, data, config, points=1)
                variables = state.variables
                keys = jax.random.split(jax.random.key(0))
                directions = [filter_normalised(key, variables["params"]) for key in keys]
                trained.append(plane(model, variables, directions, pixels(data, 256, config), data.classes))
            return trained[0]

        for y in side:

            def line(kind: str = kind, y: float = float(y), network: Any = network) -> Rows:
                losses = network()(side, y)
                about = {"kind": kind, "depth": depth, "y": y}
                return [about | {"x": float(x), "loss": float(loss)} for x, loss in zip(side, losses, strict=True)]

            found += book.part(f"{kind} {depth}, y {y:.3f}", line)
    return found


def filter_normalised(key: jax.Array, params: optax.Params) -> Any:
    """Returns a random direction, a tree as `params`, whose filters have the norms of those of `params`.

    It is 0 for all leaves that are no kernels.
    """
    leaves = iter(jax.random.split(key, len(jax.tree.leaves(params))))

    def direction(path: str, leaf: jax.Array) -> jax.Array:
        drawn = jax.random.normal(next(leaves), leaf.shape)
        if leaf.ndim < 2:
            return jnp.zeros_like(leaf)
        axes = tuple(range(leaf.ndim - 1))
        own, others = (jnp.sqrt((x**2).sum(axes, keepdims=True)) for x in (leaf, drawn))
        return drawn * own / (others + 1e-10)

    return path_map(direction, params)


def plane(model: nn.Module, variables: VariableDict, directions: list[Any], batch: Any, classes: int) -> Any:
    """Returns `losses(xs, y)`, which computes the loss at the points of a line, spread over all devices.

    Args:
      model: the network.
      variables: its trained variables, at x = y = 0.
      directions: two trees as the parameters.
      batch: images, float [batch, height, width, 3], and labels, int [batch].
      classes: number of classes.
    """
    devices = jax.devices()
    images, labels = batch

    @jax.jit
    def loss(given: Any, first: Any, second: Any, images: jax.Array, x: float, y: float) -> jax.Array:
        params = jax.tree.map(lambda p, a, b: p + x * a + y * b, given["params"], first, second)
        logits, _ = model.apply(given | {"params": params}, images, train=True, mutable=["batch_stats"])
        return cross_entropy(logits, {"label": jnp.asarray(labels)}).mean()

    copies = [jax.device_put((variables, *directions, images), device) for device in devices]

    def losses(xs: np.ndarray, y: float) -> list[float]:
        return jax.device_get([loss(*copies[i % len(devices)], x, y) for i, x in enumerate(xs)])

    return losses


def heights_of(found: Rows, kind: str) -> tuple[list[float], list[float], np.ndarray]:
    """Returns the x and the y of the points, and the loss at each, [y, x]."""
    xs, ys = (sorted({row[name] for row in found}) for name in ("x", "y"))
    of = {(row["x"], row["y"]): row["loss"] for row in found if row["kind"] == kind}
    return xs, ys, np.asarray([[of[x, y] for x in xs] for y in ys])


def share_below(found: Rows, kind: str) -> str:
    """Returns the share of the plane on which the loss is below 1, in percent."""
    return f"{100 * np.mean(heights_of(found, kind)[2] < 1):.0f} %"


def middle(found: Rows, kind: str) -> float:
    """Returns the loss of the trained network itself."""
    xs, ys, heights = heights_of(found, kind)
    return float(heights[np.argmin(np.abs(ys)), np.argmin(np.abs(xs))])


def takeaway(found: Rows) -> Text:
    """Returns what the experiment found."""
    depth, (plain, residual) = found[0]["depth"], (share_below(found, kind) for kind in KINDS)
    return (
        f"With {depth} layers the loss stays below 1 on {plain} of the plane around the plain network and on "
        f"{residual} of that around the residual one.",
        f"{depth} 層では、損失が 1 より小さいのは plain の周りの平面の {plain}、"
        f"残差ネットワークの周りの平面の {residual} である。",
    )


def panels(found: Rows) -> list[Panel]:
    """Returns contours of each network on one scale, and the loss along the first direction."""
    least, most = min(row["loss"] for row in found), max(row["loss"] for row in found)
    levels = np.geomspace(max(1e-4, least), most + 1e-3, 18)

    def contours(axes: "Axes", kind: str) -> None:
        xs, ys, heights = heights_of(found, kind)
        drawn = axes.contourf(xs, ys, heights, levels=levels, norm="log", cmap="viridis")
        axes.contour(xs, ys, heights, levels=levels, colors="white", linewidths=0.4)
        axes.set(xlabel="first direction", ylabel="second direction", aspect="equal")
        axes.set(xticks=[-1, -0.5, 0, 0.5, 1], yticks=[-1, -0.5, 0, 0.5, 1])
        axes.grid(False)
        bar = axes.figure.colorbar(drawn, ax=axes, label="loss", ticks=log_ticks(levels[0], levels[-1]))
        bar.ax.yaxis.set_major_formatter(plain_number)
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)

    def slices(axes: "Axes") -> None:
        for colour, marker, kind in zip(COLOURS, "os", KINDS, strict=False):
            xs, ys, heights = heights_of(found, kind)
            axes.plot(xs, heights[np.argmin(np.abs(ys))], f"{marker}-", color=colour, label=kind)
        axes.set(xlabel="first direction", ylabel="loss", yscale="log", xticks=[-1, -0.5, 0, 0.5, 1])
        log_axis(axes.yaxis)

    values = {kind: (short(middle(found, kind)), share_below(found, kind)) for kind in KINDS}
    depth, plain, residual = found[0]["depth"], values["plain"][0], values["residual"][0]
    return [
        *(
            Panel(
                (f"{kind}, {depth} layers: loss {loss} in the middle, below 1 on {share} of the plane",
                 f"{translated(kind)}、{depth} 層: 中央の損失 {loss}、1 より小さい範囲 {share}"),
                partial(contours, kind=kind),
            )
            for kind, (loss, share) in values.items()
        ),
        Panel(
            (f"Along the first direction, from {plain} (plain) and {residual} (residual) in the middle",
             f"一つ目の方向に沿った損失: 中央で plain {plain}、残差 {residual}"),
            slices,
        ),
    ]  # fmt: skip
