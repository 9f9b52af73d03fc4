"""Measures the gradient of the loss at the output of every block, and the identity in a block's Jacobian.

Each plain layer multiplies the gradient, so that with depth it vanishes or explodes. Batch norm removes the dependence
on the initial scale of the kernels, not that on the depth. A block y = F(x) + x passes it on
unchanged besides, whatever F does (He et al. 2016, eq. 5).
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_jax.lab.fit import cifar_net, fit, load, network, pixels, recipe
from resnet_jax.lab.panels import COLOURS, Panel, Text, log_axis, short, translated
from resnet_jax.lab.record import Notebook, Rows
from resnet_jax.models.blocks import PreactBlock
from resnet_jax.models.densenet import DenseLayer
from resnet_jax.models.layers import ACTIVATIONS, Conv, make_norm
from resnet_jax.models.resnet import Stem
from resnet_jax.runs.charts import TEXT
from resnet_jax.training.state import TrainState, path_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INITS = {"LeCun": 1.0, "He": 2.0, "twice He": 4.0}
"""Name -> variance of a kernel times its fan-in."""
IMAGES = 32
CASES = (
    ("plain", "none", False),
    ("plain", "batch", False),
    ("residual", "none", False),
    ("residual", "batch", False),
    ("residual", "batch", True),
    ("preact", "batch", True),
)
"""Kind, norm, and whether branches start at zero (`zero_init_last`), as is the default of this package."""
CASE_NAMES = {
    ("plain", "none", False): "plain, no norm",
    ("plain", "batch", False): "plain",
    ("residual", "none", False): "residual, no norm",
    ("residual", "batch", False): "residual",
    ("residual", "batch", True): "residual from zero",
    ("preact", "batch", True): "preact from zero",
}
"""Case -> how a legend calls it; without another word it has batch norm."""


def rows(book: Notebook) -> Rows:
    """Returns rows of three kinds.

    Gradients before training: `kind`, `norm`, `zero_init_last`, `init`, `depth`, `block`, `gradient`. In training:
    `step`, and `first` and `last` for the gradient at the first and the last block. Of `identity`: `difference`.
    """
    options = book.options
    data = load(options.dataset)
    images, labels = pixels(data, IMAGES, recipe(data, 1.0))
    depths = options.depths or ((56, 1004) if options.quick else (20, 56, 110, 1004))
    found: Rows = []
    for depth in depths:
        for kind, norm, zero in CASES if depth < 1000 or not options.quick else CASES[3:]:

            def at_start(kind: str = kind, norm: str = norm, zero: bool = zero, depth: int = depth) -> Rows:
                model: Any = cifar_net(kind, depth, data, norm=norm, zero_init_last=zero)
                variables = jax.jit(model.init)(jax.random.key(0), images[:1])
                gradients = jax.jit(partial(gradients_along, model))
                made: Rows = []
                for init in INITS:
                    norms = gradients(with_variance(variables, INITS[init]), images, labels)
                    about = {"kind": kind, "norm": norm, "zero_init_last": zero, "init": init, "depth": depth}
                    made += [about | {"block": i, "gradient": finite(g)} for i, g in enumerate(norms, start=1)]
                return made

            found += book.part(f"{kind} {depth}, norm {norm}, branches from zero {zero}", at_start)
    found += book.part("densenet", partial(of_densenet, data, images, labels))
    for kind in ("plain", "residual"):
        found += book.part(f"{kind} in training", partial(in_training, kind, data, images, labels, options.quick))
    return found + book.part("identity", identity)


def finite(value: Any) -> float | None:
    """Returns a number as a float, None if it is not finite."""
    return float(value) if np.isfinite(value) else None


def with_variance(variables: Any, gain: float) -> Any:
    """Returns variables whose kernels, drawn with variance 2 / fan-out, are scaled to variance `gain` / fan-in."""

    def scaled(path: str, leaf: jax.Array) -> jax.Array:
        if leaf.ndim != 4:
            return leaf
        window, fan_in, fan_out = leaf.shape[0] * leaf.shape[1], leaf.shape[2], leaf.shape[3]
        return leaf * jnp.sqrt(gain / (window * fan_in) * (window * fan_out) / 2.0)

    return variables | {"params": path_map(scaled, variables["params"])}


def gradients_along(model: nn.Module, variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the norm of the gradient of the loss at the output of each block, [blocks].

    Norms take the statistics of the batch. The equal blocks of a stage run in a loop, in the forward and the backward
    pass, so that a thousand of them compile as fast as ten.

    Args:
      model: a CIFAR ResNet or plain network.
      variables: of the model.
      images: float [batch, height, width, 3].
      labels: int [batch].
    """
    params, act = variables["params"], ACTIVATIONS[model.act]
    conv, norm = partial(Conv, dtype=model.dtype), make_norm(model)

    def applied(module: Any, values: Any, x: jax.Array) -> jax.Array:
        return module.apply({"params": values}, x, True, mutable=["batch_stats"])[0]

    def forth(function: Any, x: jax.Array, values: Any) -> tuple[jax.Array, jax.Array]:
        return function(values, x), x

    def back(function: Any, gradient: jax.Array, of: Any) -> tuple[jax.Array, jax.Array]:
        values, x = of
        return jax.vjp(partial(function, values), x)[1](gradient)[0], jnp.linalg.norm(gradient)

    stem = Stem(model.stem, model.stem_width, model.preact, conv, norm, act)
    x = applied(stem, params["stem"], images)
    tape: list[Any] = []
    for i, size in enumerate(model.stage_sizes):
        block = partial(model._block(i), conv=conv, norm=norm, act=act)
        stage = params[f"stage{i + 1}"]
        first = partial(applied, block(strides=1 if i == 0 else 2))
        tape.append((first, stage["block1"], x, None))
        x = first(stage["block1"], x)
        if size > 1:
            later = jax.tree.map(lambda *v: jnp.stack(v), *(stage[f"block{b}"] for b in range(2, size + 1)))
            other = partial(applied, block(strides=1))
            x, inputs = jax.lax.scan(partial(forth, other), x, later)
            tape.append((other, later, None, inputs))

    def loss(x: jax.Array) -> jax.Array:
        if model.preact:
            x = act(applied(norm(), params["norm"], x) if "norm" in params else x)
        logits = x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradient, norms = jax.grad(loss)(x), []
    for function, values, x, inputs in reversed(tape):
        if inputs is None:
            gradient, size = back(function, gradient, (values, x))
            norms.append(size[None])
        else:
            gradient, sizes = jax.lax.scan(partial(back, function), gradient, (values, inputs), reverse=True)
            norms.append(sizes)
    return jnp.concatenate(norms[::-1])


def of_densenet(data: Any, images: jax.Array, labels: Any) -> Rows:
    """Returns rows with the norm of the gradient at the output of each layer of a DenseNet-BC of 40 layers."""
    model = network("cifar_densenet_bc_100_12", data, stage_sizes=(6, 6, 6))
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])

    def forward(deltas: dict[str, Any], variables: Any, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs: dict[str, jax.Array] = {}

        def tap(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            out = call(*args, **kwargs)
            if isinstance(context.module, DenseLayer) and context.method_name == "__call__":
                name = "/".join(context.module.path)
                out = outputs[name] = out + deltas.get(name, 0.0)
            return out

        with nn.intercept_methods(tap):
            logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), outputs

    _, shapes = jax.eval_shape(forward, {}, variables, images)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
    grads, _ = jax.jit(jax.grad(forward, has_aux=True))(zeros, variables, images)
    names = sorted(grads, key=lambda name: [int(word.strip("stageblock")) for word in name.split("/")])
    about = {"kind": "densenet", "norm": "batch", "zero_init_last": False, "init": "He", "depth": 40}
    return [about | {"block": i, "gradient": float(jnp.linalg.norm(grads[n]))} for i, n in enumerate(names, start=1)]


def in_training(kind: str, data: Any, images: jax.Array, labels: Any, quick: bool) -> Rows:
    """Returns rows with the gradients at the first and last block of a network of 20 layers during a short training."""
    model, found = cifar_net(kind, 20, data, norm="batch"), []
    gradients = jax.jit(partial(gradients_along, model))

    def watch(step: int, state: TrainState) -> None:
        norms = np.asarray(gradients(state.variables, images, labels))
        found.append({"kind": kind, "norm": "batch", "init": "He", "depth": 20, "step": step,
                      "first": float(norms[0]), "last": float(norms[-1])})  # fmt: skip

    fit(model, data, recipe(data, 4.0 if quick else 20.0), watch)
    return found


def identity() -> Rows:
    """Returns one row: the largest difference between a block's Jacobian and that of its branch plus the identity."""
    x = jax.random.normal(jax.random.key(1), (1, 4, 4, 3))
    block = PreactBlock(3, zero_init_last=False)
    variables = block.init(jax.random.key(0), x)

    def jacobian(module: Any) -> jax.Array:
        return jax.jacobian(lambda x: module.apply(variables, x, train=False).ravel())(x).reshape(48, 48)

    off = jnp.abs(jacobian(block) - jacobian(block.clone(shortcut="none")) - jnp.eye(48)).max()
    return [{"kind": "identity", "difference": float(off)}]


def ratios(found: Rows) -> Rows:
    """Returns for each network before training the gradient at the first block over that at the last, as `ratio`.

    It is nan where one of them is not finite.
    """
    groups: dict[tuple[Any, ...], list[float | None]] = {}
    for row in found:
        if "block" in row:
            groups.setdefault(about_of(row), []).append(row["gradient"])
    names = ("kind", "norm", "zero_init_last", "init", "depth")
    return [
        dict(zip(names, key, strict=True)) | {"ratio": (v[0] or np.nan) / (v[-1] or np.nan)}
        for key, v in groups.items()
    ]


def table(found: Rows) -> Rows:
    """Returns `ratios` as a table: a row for each network, a column for each initialisation."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in ratios(found):
        zero = "zero" if row["zero_init_last"] else "random"
        key = (row["kind"], row["norm"], zero, row["depth"])
        line = lines.setdefault(key, dict(zip(("network", "norm", "branches start", "layers"), key, strict=True)))
        line |= dict.fromkeys(INITS, "–") if len(line) == 4 else {}
        line[row["init"]] = row["ratio"]
    return list(lines.values())


def ratio_of(found: Rows, *about: Any) -> float:
    """Returns the ratio of the network that `about_of` describes; nan where it was not measured."""
    return next((row["ratio"] for row in ratios(found) if about_of(row) == about), np.nan)


def depth_shown(found: Rows) -> int:
    """Returns the depth at which blocks are drawn: 56 where it was measured, else the greatest."""
    depths = sorted({row["depth"] for row in found if "block" in row and row["kind"] != "densenet"})
    return 56 if 56 in depths else depths[-1]


def takeaway(found: Rows) -> Text:
    """Returns what the experiment found."""
    depth = depth_shown(found)
    plain = short(ratio_of(found, "plain", "batch", False, "He", depth))
    random, zero = (short(ratio_of(found, "residual", "batch", zero, "He", depth)) for zero in (False, True))
    return (
        f"Batch norm takes away the dependence on the initial scale, not that on the depth: at {depth} layers the "
        f"first block of the plain network gets {plain} times the gradient of the last, that of the residual one "
        f"{random} times, and {zero} times where branches start at zero.",
        "バッチ正規化が取り除くのは初期値の大きさへの依存であり、深さへの依存ではない。"
        f"{depth} 層で最初のブロックに届く勾配は最後のブロックの、plain で {plain} 倍、"
        f"残差で {random} 倍、枝を 0 から始めた残差で {zero} 倍である。",
    )


def panels(found: Rows) -> list[Panel]:
    """Returns gradients over the blocks without and with norms, first over last against depth, and in training."""
    depth = depth_shown(found)
    deepest = max(row["depth"] for row in found if "block" in row)
    names = {("plain", False): "plain", ("residual", False): "residual", ("residual", True): "residual from zero"}
    bare = [short(ratio_of(found, "plain", "none", False, init, depth)) for init in INITS]
    normed = [short(ratio_of(found, "plain", "batch", False, init, depth)) for init in INITS]
    deep = [short(ratio_of(found, "residual", "batch", zero, "He", deepest)) for zero in (False, True)]
    trained = {
        kind: [row["first"] / max(row["last"], 1e-30) for row in found if "step" in row and row["kind"] == kind]
        for kind in ("plain", "residual")
    }
    ends = {kind: f"{short(values[0])} → {short(values[-1])}" for kind, values in trained.items()}
    scales, scales_ja = ", ".join(INITS), "、".join(map(translated, INITS))

    def blocks(axes: "Axes", norm: str) -> None:
        for colour, ((kind, zero), name) in zip(COLOURS, names.items(), strict=False):
            for init, style in zip(INITS, (":", "-", "--"), strict=True):
                of = [row for row in found if "block" in row and about_of(row) == (kind, norm, zero, init, depth)]
                values = [row["gradient"] or np.nan for row in of]
                axes.plot([row["block"] for row in of], values, style, color=colour)
            if of:
                axes.plot([], [], color=colour, label=name)
        for init, style in zip(INITS, (":", "-", "--"), strict=True):
            axes.plot([], [], style, color=TEXT, label=init)
        axes.set(xlabel="block", ylabel="norm of the gradient", yscale="log")
        log_axis(axes.yaxis)

    def over_depth(axes: "Axes") -> None:
        table = ratios(found)
        for colour, marker, (kind, norm, zero) in zip(COLOURS, "osD^vP", CASES, strict=False):
            of = [row for row in table if about_of(row)[:4] == (kind, norm, zero, "He")]
            label = CASE_NAMES[kind, norm, zero]
            axes.plot([r["depth"] for r in of], [r["ratio"] for r in of], f"{marker}-", color=colour, label=label)
        axes.set(xlabel="layers", ylabel="gradient, first block over last", xscale="log", yscale="log")
        log_axis(axes.xaxis, sorted({row["depth"] for row in table if row["kind"] != "densenet"}))
        log_axis(axes.yaxis)

    def training(axes: "Axes") -> None:
        for colour, marker, (kind, values) in zip(COLOURS, "os", trained.items(), strict=False):
            steps = [row["step"] for row in found if "step" in row and row["kind"] == kind]
            axes.plot(steps, values, f"{marker}-", color=colour, label=kind)
        axes.set(xlabel="step", ylabel="gradient, first block over last", yscale="log")
        log_axis(axes.yaxis)

    return [
        Panel(
            (f"Without norms the initial scale decides: plain, first block over last {', '.join(bare)} ({scales})",
             f"正規化なしでは初期値の大きさが決める: plain の最初と最後の比は {'、'.join(bare)} ({scales_ja})"),
            partial(blocks, norm="none"),
        ),
        Panel(
            (f"With batch norm the scale hardly matters, the depth does: plain {', '.join(normed)} ({scales})",
             f"バッチ正規化では大きさはほぼ無関係、深さは効く: plain の比は {'、'.join(normed)} ({scales_ja})"),
            partial(blocks, norm="batch"),
        ),
        Panel(
            (f"At {deepest:,} layers: residual with batch norm {deep[0]}, with branches from zero {deep[1]}",
             f"{deepest:,} 層: バッチ正規化つき残差 {deep[0]}、枝を 0 から始めると {deep[1]}"),
            over_depth,
        ),
        Panel(
            (f"In training, 20 layers with batch norm: plain {ends['plain']}, residual {ends['residual']}",
             f"学習中 (20 層、バッチ正規化): plain {ends['plain']}、残差 {ends['residual']}"),
            training,
        ),
    ]  # fmt: skip


def about_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what identifies a row's network: kind, norm, whether branches start at zero, initialisation, depth."""
    return tuple(row[name] for name in ("kind", "norm", "zero_init_last", "init", "depth"))
