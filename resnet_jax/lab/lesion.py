"""Removes and swaps blocks of a trained network: residual ones survive it (Veit et al. 2016, arXiv:1605.06431)."""

from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import VariableDict

from resnet_jax.lab.fit import cifar_net, fit_seeds, load, recipe
from resnet_jax.lab.panels import COLOURS, Panel, Text, plot_spread, seeds_of
from resnet_jax.lab.record import Notebook, Rows
from resnet_jax.models.blocks import ResidualBlock
from resnet_jax.runs.charts import GRID, TEXT
from resnet_jax.training.programs import recipe_eval_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    seeds = options.seeds or (0,)
    for kind in KINDS:

        def of_kind(kind: str = kind) -> Rows:
            model = cifar_net(kind, depth, data)
            runs = fit_seeds(model, data, recipe(data, 10.0 if options.quick else 30.0), seeds, points=1)
            return [
                {"kind": kind, "depth": depth, "seed": seed} | row
                for seed, (state, _) in zip(seeds, runs, strict=True)
                for row in lesions(model, state.variables, data, depth)
            ]

        found += book.part(f"{kind} {depth}, seeds {seeds}", of_kind)
    return found


def lesions(model: nn.Module, variables: VariableDict, data: Any, depth: int) -> Rows:
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


def gated_accuracy(model: nn.Module, data: Any, blocks: list[tuple[int, int]]) -> Any:
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
    def right(variables: VariableDict, gates: jax.Array) -> jax.Array:
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


def swapped(variables: VariableDict, size: int, pairs: int, rng: np.random.Generator) -> Any:
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


def mean_accuracy(found: Rows, kind: str, lesion: str, blocks: int | None = None) -> float:
    """Returns the mean accuracy with a lesion, in percent; `blocks` is how many blocks or pairs it concerns."""
    of = [row for row in found if (row["kind"], row["lesion"]) == (kind, lesion) and blocks in (None, row["blocks"])]
    return float(100 * np.mean([row["accuracy"] for row in of])) if of else np.nan


def takeaway(found: Rows) -> Text:
    """Returns what the experiment found."""
    depth, (seeds, seeds_ja) = found[0]["depth"], seeds_of(found)
    plain, residual = (mean_accuracy(found, kind, "none") - mean_accuracy(found, kind, "remove") for kind in KINDS)
    return (
        f"One block taken out of {depth} layers costs the residual network {residual:.1f} points of accuracy in the "
        f"mean, the plain one {plain:.1f} {seeds}.",
        f"{depth} 層からブロックを一つ取り除くと、正解率は平均して残差ネットワークで {residual:.1f} ポイント、plain で "
        f"{plain:.1f} ポイント下がる{seeds_ja}。",
    )


def cannot_be_removed(depth: int) -> list[int]:
    """Returns the numbers of the blocks that cannot be removed: the first of the second and of the third stage."""
    size = (depth - 2) // 6
    return [size + 1, 2 * size + 1]


def panels(found: Rows) -> list[Panel]:
    """Returns the accuracy without each block, without several, and with swapped blocks."""
    depth = found[0]["depth"]
    missing = cannot_be_removed(depth)

    def lesioned(axes: "Axes", lesion: str, by: str, name: str) -> None:
        for colour, marker, kind in zip(COLOURS, "os", KINDS, strict=False):
            of = [row for row in found if (row["kind"], row["lesion"]) == (kind, lesion)]
            points = sorted({row[by] for row in of} | (set(missing) if lesion == "remove" else set()))
            values = [[100 * row["accuracy"] for row in of if row[by] == p] for p in points]
            plot_spread(axes, points, values, f"{marker}-", colour, kind)
            axes.axhline(mean_accuracy(found, kind, "none"), color=colour, linestyle=":", linewidth=1)
        axes.plot([], [], ":", color=TEXT, label="nothing changed")
        if lesion == "remove":
            for i, place in enumerate(missing):
                axes.axvspan(place - 0.4, place + 0.4, color=GRID, label=None if i else "cannot be removed")
        axes.set(xlabel=name, ylabel="accuracy, %", ylim=(0, 102))
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 5, 10]))

    from matplotlib.ticker import MaxNLocator

    made = []
    for lesion, by, name, (english, japanese) in (
        ("remove", "block", "number of the removed block", ("Without one block", "ブロックを一つ取り除く")),
        ("random", "blocks", "blocks removed at random", ("Without {} blocks", "ブロックを {} 個取り除く")),
        ("swap", "blocks", "pairs of blocks swapped", ("With {} pairs swapped", "{} 組を入れ替える")),
    ):
        counts = [row["blocks"] for row in found if row["lesion"] == lesion]
        if not counts:
            continue
        most = max(counts)
        plain, residual = (f"{mean_accuracy(found, kind, lesion, most):.0f} %" for kind in KINDS)
        whole = [f"{mean_accuracy(found, kind, 'none'):.0f} %" for kind in KINDS]
        finding = (
            f"{english.format(most)}: plain {whole[0]} → {plain}, residual {whole[1]} → {residual}",
            f"{japanese.format(most)}: plain {whole[0]} → {plain}、残差 {whole[1]} → {residual}",
        )
        made.append(Panel(finding, partial(lesioned, lesion=lesion, by=by, name=name)))
    return made
