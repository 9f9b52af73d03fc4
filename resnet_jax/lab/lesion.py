"""Removes and swaps blocks of a trained network: residual ones survive it (Veit et al. 2016, arXiv:1605.06431)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.lab.fit import cifar_net, fit, load, recipe, variables_of
from resnet_jax.lab.record import COLOURS, Notebook, Rows, axes_of
from resnet_jax.models.blocks import ResidualBlock
from resnet_jax.training.programs import recipe_eval_step

KINDS = ("plain", "residual")


def rows(book: Notebook) -> Rows:
    """Trains a plain and a residual network; returns accuracies with blocks removed or swapped.

    Columns: `kind`, `depth`, `seed`, `lesion` (`none`, `remove`, `random`, `swap`), `blocks` (how many), `block` (which
    one, for `remove`), and `accuracy` on test images, a fraction.
    """
    options = book.options
    data = load(options.dataset)
    depth = (options.depths or ((20,) if options.quick else (56,)))[0]
    found: Rows = []
    for seed in options.seeds or (0,):
        for kind in KINDS:

            def one(kind: str = kind, seed: int = seed) -> Rows:
                model = cifar_net(kind, depth, data)
                state, _ = fit(model, data, recipe(data, 10.0 if options.quick else 30.0, seed), points=1)
                about = {"kind": kind, "depth": depth, "seed": seed}
                return [about | row for row in lesions(model, variables_of(state), data, depth)]

            found += book.part(f"{kind} {depth}, seed {seed}", one)
    return found


def lesions(model: Any, variables: Any, data: Any, depth: int) -> Rows:
    """Returns the accuracies of a trained network with blocks removed and swapped, as rows."""
    size = (depth - 2) // 6
    same = [
        (stage, block) for stage in (1, 2, 3) for block in range(1, size + 1) if (stage, block) not in ((2, 1), (3, 1))
    ]
    accuracy = gated_accuracy(model, data, same)
    rng = np.random.default_rng(0)

    def without(removed: list[int], values: Any = variables) -> float:
        return accuracy(values, np.asarray([0.0 if i in removed else 1.0 for i in range(len(same))]))

    found = [{"lesion": "none", "blocks": 0, "accuracy": without([])}]
    for i, (stage, block) in enumerate(same):
        place = {"block": (stage - 1) * size + block}
        found.append({"lesion": "remove", "blocks": 1, "accuracy": without([i])} | place)
    for count in range(1, len(same)):
        for _ in range(5):
            chosen = rng.permutation(len(same))[:count].tolist()
            found.append({"lesion": "random", "blocks": count, "accuracy": without(chosen)})
    for count in range(1, 1 + 3 * ((size - 1) // 2)):
        for _ in range(5):
            found.append(
                {"lesion": "swap", "blocks": count, "accuracy": without([], swapped(variables, size, count, rng))}
            )
    return found


def gated_accuracy(model: Any, data: Any, blocks: list[tuple[int, int]]) -> Any:
    """Returns `accuracy(variables, gates)` on test images, where a block with gate 0 returns its input.

    Args:
      model: a CIFAR ResNet or plain network.
      data: whose test images, at most 1000, are used.
      blocks: (stage, block) of each gate, from 1; their input and output have the same shape.
    """
    evaluate = recipe_eval_step(recipe(data, 1.0), model)
    names = {f"stage{stage}/block{block}": i for i, (stage, block) in enumerate(blocks)}
    count = min(1000, len(data.test["label"]))
    batch = {name: jnp.asarray(values[:count]) for name, values in data.test.items()} | {"mask": jnp.ones(count, bool)}

    @jax.jit
    def right(variables: Any, gates: jax.Array) -> jax.Array:
        def tap(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            out = call(*args, **kwargs)
            name = "/".join(context.module.path)
            if isinstance(context.module, ResidualBlock) and context.method_name == "__call__" and name in names:
                gate = gates[names[name]]
                return gate * out + (1.0 - gate) * args[0]
            return out

        with nn.intercept_methods(tap):
            return evaluate(variables, batch)[0]["accuracy"] / count

    return lambda variables, gates: float(right(variables, jnp.asarray(gates, jnp.float32)))


def swapped(variables: Any, size: int, pairs: int, rng: np.random.Generator) -> Any:
    """Returns variables in which random pairs of blocks of the same stage are swapped, each block at most once.

    Args:
      variables: of the model.
      size: blocks in a stage; the first one of each stage, which may have another shape, stays.
      pairs: how many pairs are swapped.
      rng: draws the pairs.
    """
    moved = {kind: dict(values) for kind, values in variables.items()}
    later = [rng.permutation(np.arange(2, size + 1)) for _ in range(3)]
    possible = [(s, row[i], row[i + 1]) for s, row in enumerate(later, start=1) for i in range(0, len(row) - 1, 2)]
    for chosen in rng.permutation(len(possible))[:pairs]:
        number, first, second = possible[chosen]
        stage, a, b = f"stage{number}", f"block{first}", f"block{second}"
        for values in moved.values():
            values[stage] = values[stage] | {a: values[stage][b], b: values[stage][a]}
    return moved


def draw(found: Rows) -> Any:
    """Draws accuracy without each block, without several, and with swapped blocks; returns the figure."""
    figure, axes = axes_of(3)
    for colour, kind in zip(COLOURS, KINDS, strict=False):
        of = [row for row in found if row["kind"] == kind]
        whole = np.mean([row["accuracy"] for row in of if row["lesion"] == "none"])
        for axis, lesion, by in (
            (axes[0], "remove", "block"),
            (axes[1], "random", "blocks"),
            (axes[2], "swap", "blocks"),
        ):
            points = sorted({row[by] for row in of if row["lesion"] == lesion})
            values = [[row["accuracy"] for row in of if row["lesion"] == lesion and row[by] == p] for p in points]
            axis.errorbar(points, [np.mean(v) for v in values], [np.std(v) for v in values], fmt="o-", color=colour,
                          capsize=2, label=kind)  # fmt: skip
            axis.axhline(whole, color=colour, linestyle=":", linewidth=1)
    titles = ("accuracy without one block", "without several at random", "with pairs of blocks swapped")
    for axis, title, name in zip(axes, titles, ("block", "blocks removed", "pairs"), strict=True):
        axis.set(title=title, xlabel=name, ylim=(0, 1.02))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False)
    return figure
