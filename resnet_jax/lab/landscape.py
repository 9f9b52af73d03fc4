"""Maps the loss around a trained network, on a plane of two random directions (Li et al. 2018, arXiv:1712.09913).

Each filter of a direction has the norm of the network's own filter; biases and norms do not change. Batch norms take
the statistics of the batch at every point, so that the statistics fit the changed filters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.lab.fit import cifar_net, fit, load, pixels, recipe, variables_of
from resnet_jax.lab.record import Notebook, Rows, axes_of
from resnet_jax.training.losses import cross_entropy
from resnet_jax.training.state import path_map

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
                variables = variables_of(state)
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


def filter_normalised(key: jax.Array, params: Any) -> Any:
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


def plane(model: Any, variables: Any, directions: list[Any], batch: Any, classes: int) -> Any:
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


def draw(found: Rows) -> Any:
    """Draws contours and a surface of each network, on one scale; returns the figure."""
    figure, axes = axes_of(2, 2)
    xs, ys = (sorted({row[name] for row in found}) for name in ("x", "y"))
    levels = np.geomspace(max(1e-4, min(row["loss"] for row in found)), max(row["loss"] for row in found) + 1e-3, 18)
    for i, kind in enumerate(KINDS):
        of = {(row["x"], row["y"]): row["loss"] for row in found if row["kind"] == kind}
        heights = np.asarray([[of[x, y] for x in xs] for y in ys])
        flat = axes[2 * i]
        drawn = flat.contourf(xs, ys, heights, levels=levels, norm="log", cmap="viridis")
        flat.contour(xs, ys, heights, levels=levels, colors="white", linewidths=0.4)
        flat.set(title=f"{kind}: loss around the trained network", aspect="equal")
        figure.colorbar(drawn, ax=flat, format="%.2g")
        place = axes[2 * i + 1].get_subplotspec()
        axes[2 * i + 1].remove()
        surface = figure.add_subplot(place, projection="3d")
        surface.plot_surface(*np.meshgrid(xs, ys), np.log10(heights), cmap="viridis", linewidth=0)
        surface.set(title=f"{kind}: log10 of the loss", zlim=(np.log10(levels[0]), np.log10(levels[-1])))
    return figure
