"""Follows the Hessian of the loss through full-batch gradient descent: its largest eigenvalues and its trace (Ghorbani
et al. 2019, arXiv:1901.10159), and the edge of stability (Cohen et al. 2021, arXiv:2103.00065).

On a quadratic, gradient descent with a step of size r diverges in each direction whose curvature exceeds 2 / r. The
largest eigenvalue is called the sharpness. The loss is the squared error: with the cross-entropy the sharpness falls
again as soon as the network is sure of its images. Activations are smooth (SiLU), and there is no augmentation, so that
the loss is one function, differentiable twice.
"""

from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_jax.analysis import hessian_trace, lanczos
from resnet_jax.lab.fit import Data, cifar_net, load, pixels, recipe
from resnet_jax.lab.panels import COLOURS, Panel, Text, log_axis
from resnet_jax.lab.record import Notebook, Rows
from resnet_jax.runs.charts import TEXT
from resnet_jax.training.sharding import compiler_options
from resnet_jax.training.state import create_state
from resnet_jax.training.step import make_train_step

KINDS = ("plain", "residual")
RATES = {"none": (0.2, 0.1), "batch": (0.5, 0.25)}
"""Norm -> learning rates, the largest first; in the quick run that one alone."""
NAMES = {"none": ("Without norms", "正規化なしでは"), "batch": ("With batch norm", "バッチ正規化では")}
IMAGES = 256
ITERATIONS = 10
"""Of Lanczos' method."""
SAMPLES = 4
"""Of the estimate of the trace."""
LARGEST = 3
"""How many eigenvalues are recorded from the top."""
REACHED = 0.95
"""From this share of 2 / learning rate on, the sharpness counts as having reached it."""
Programs = tuple[Any, Any, Any, Any]
"""Model, batch, step, and measures, as `network_and_programs` returns them."""


def rows(book: Notebook) -> Rows:
    """Trains each network by gradient descent at each learning rate; returns measures along the training.

    Columns: `kind`, `norm`, `depth`, `learning_rate`, `step`; `loss` over all images; `eigenvalue1` (the sharpness) to
    `eigenvalue3`, `smallest`, and `bound`, within which of `eigenvalue1` an eigenvalue lies; `trace` and
    `trace_error`, its standard error.
    """
    options = book.options
    data = load(options.dataset)
    depth, seed = (options.depths or (8,))[0], (options.seeds or (0,))[0]
    steps, points = (160, 8) if options.quick else (300, 15)
    found: Rows = []
    for norm, kind in product(RATES, KINDS):
        programs: list[Programs] = []
        for rate in RATES[norm][: 1 if options.quick else None]:

            def one(
                kind: str = kind, norm: str = norm, rate: float = rate, programs: list[Programs] = programs
            ) -> Rows:
                if not programs:
                    programs.append(network_and_programs(kind, norm, depth, data))
                about = {"kind": kind, "norm": norm, "depth": depth, "learning_rate": rate}
                return [about | row for row in descent(*programs[0], rate, seed, steps, points)]

            found += book.part(f"{kind} {depth}, norm {norm}, learning rate {rate}, seed {seed}", one)
    return found


def squared_error(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Computes half the squared distance of logits to the label's one-hot vector, float32 [batch]."""
    return 0.5 * jnp.square(logits - jax.nn.one_hot(batch["label"], logits.shape[-1])).sum(-1)


def network_and_programs(kind: str, norm: str, depth: int, data: Data) -> Programs:
    """Returns a narrow network, all images as one batch, a compiled training step, and the compiled measures.

    The step takes its learning rate from the state of the optimizer, so that it is compiled once for all rates.
    """
    model: Any = cifar_net(kind, depth, data, norm=norm, act="silu", widths=(8, 16, 32), stem_width=8)
    images, labels = pixels(data, IMAGES, recipe(data, 1.0))
    batch = {"image": images, "label": jnp.asarray(labels)}
    step = make_train_step(model, descent_with(0.0), loss=squared_error)

    def measured(variables: Any) -> dict[str, jax.Array]:
        def loss(params: Any) -> jax.Array:  # with the statistics of the batch, as the step has it
            logits, _ = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
            return squared_error(logits, batch).mean()

        params = variables["params"]
        found = lanczos(loss, params, jax.random.key(0), ITERATIONS)
        trace = hessian_trace(loss, params, jax.random.key(1), SAMPLES)
        largest = {f"eigenvalue{i}": found.values[-i] for i in range(1, LARGEST + 1)}
        ends = {"smallest": found.values[0], "bound": found.errors[-1]}
        return {"loss": loss(params)} | largest | ends | {"trace": trace.mean, "trace_error": trace.standard_error}

    compiled = [jax.jit(function, compiler_options=compiler_options()) for function in (step, measured)]
    return model, batch, *compiled


def descent_with(rate: float) -> optax.GradientTransformation:
    """Returns gradient descent without momentum, whose learning rate lies in its state."""
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)


def descent(model: Any, batch: Any, step: Any, measured: Any, rate: float, seed: int, steps: int, points: int) -> Rows:
    """Returns the measures before training and at evenly spaced steps; they end where the loss is no longer finite."""
    state = create_state(model, descent_with(rate), jax.random.key(seed), batch["image"].shape[1:])
    made: Rows = []
    for i in range(steps + 1):
        if i * points % steps < points:
            row = {name: float(value) for name, value in measured(state.variables).items()}
            if not np.isfinite(list(row.values())).all():
                break
            made.append({"step": i} | row)
        if i < steps:
            state, _ = step(state, batch)
    return made


def of_network(found: Rows, kind: str, norm: str, rate: float) -> Rows:
    """Returns the rows of one training."""
    return [row for row in found if (row["kind"], row["norm"], row["learning_rate"]) == (kind, norm, rate)]


def rates_of(found: Rows, norm: str) -> list[float]:
    """Returns the learning rates of the networks with a norm, the largest first."""
    return sorted({row["learning_rate"] for row in found if row["norm"] == norm}, reverse=True)


def at_the_edge(found: Rows, norm: str) -> tuple[int, int, list[float]]:
    """Returns of the networks with a norm how many trainings reached 2 / learning rate, how many there are, and the
    sharpness over 2 / learning rate at each point of them: of those that reached it from there on, or of all where none
    did.
    """
    trainings = [
        [row["eigenvalue1"] * rate / 2 for row in of_network(found, kind, norm, rate)]
        for kind, rate in product(KINDS, rates_of(found, norm))
    ]
    firsts = [next((i for i, ratio in enumerate(ratios) if ratio >= REACHED), None) for ratios in trainings]
    after = [ratio for ratios, i in zip(trainings, firsts, strict=True) if i is not None for ratio in ratios[i:]]
    reached = sum(i is not None for i in firsts)
    return reached, len(trainings), after or [ratio for ratios in trainings for ratio in ratios]


def edge_of(found: Rows, norm: str) -> Text:
    """Returns what the sharpness did of networks with a norm."""
    reached, count, ratios = at_the_edge(found, norm)
    if not reached:
        return (
            f"in none of {count} trainings does the sharpness reach 2 / learning rate; at most it is {max(ratios):.2f} "
            "of it",
            f"{count} 回の学習のどれでも鋭さは 2 / 学習率に届かず、最大でその {max(ratios):.2f} 倍である",
        )
    low, high = np.percentile(ratios, (25, 75))
    return (
        f"in {reached} of {count} trainings the sharpness reaches 2 / learning rate; from there on half of its values "
        f"lie between {low:.2f} and {high:.2f} times that",
        f"{count} 回中 {reached} 回の学習で鋭さが 2 / 学習率に届き、その後は値の半分がその {low:.2f} 倍から "
        f"{high:.2f} 倍の間にある",
    )


def takeaway(found: Rows) -> Text:
    """Returns what the experiment found."""
    texts = [(NAMES[norm], edge_of(found, norm)) for norm in NAMES]
    return (
        ". ".join(name[0] + " " + text[0] for name, text in texts) + ".",
        "。".join(name[1] + "、" + text[1] for name, text in texts) + "。",
    )


def ends_of(found: Rows, name: str, digits: int) -> Text:
    """Returns a measure before training and at the last step, of each network at its largest learning rate."""

    def ends(kind: str, norm: str) -> str:
        of = of_network(found, kind, norm, rates_of(found, norm)[0])
        return f"{of[0][name]:.{digits}f} → {of[-1][name]:.{digits}f}"

    english, japanese = (("no norm", "batch norm"), ("正規化なし", "バッチ正規化"))
    return (
        "; ".join(
            f"{english[i]}, plain {ends('plain', n)}, residual {ends('residual', n)}" for i, n in enumerate(RATES)
        ),
        "、".join(f"{japanese[i]} plain {ends('plain', n)}、残差 {ends('residual', n)}" for i, n in enumerate(RATES)),
    )


def last_spectrum(found: Rows, norm: str) -> tuple[str, str]:
    """Returns the third over the first and the smallest eigenvalue of the residual network at the last step."""
    last = of_network(found, "residual", norm, rates_of(found, norm)[0])[-1]
    return f"{last['eigenvalue3'] / last['eigenvalue1']:.2f}", f"{last['smallest']:.3f}"


def panels(found: Rows) -> list[Panel]:
    """Returns sharpness against 2 / learning rate without and with batch norm; loss, trace, and eigenvalues."""
    most = max(row["step"] for row in found)

    def edge(axes: Any, norm: str) -> None:
        for rate, style in zip(rates_of(found, norm), ("-", "--"), strict=False):
            for colour, marker, kind in zip(COLOURS, "os", KINDS, strict=False):
                of = of_network(found, kind, norm, rate)
                values = [row["eigenvalue1"] for row in of]
                axes.plot([row["step"] for row in of], values, marker + style, color=colour, markersize=3)
            axes.axhline(2 / rate, color=TEXT, linestyle=style, linewidth=1)
            axes.text(1.25 * most, 2 / rate, f"2 / {rate:g}", ha="right", va="bottom", fontsize=8.5)
        for colour, marker, kind in zip(COLOURS, "os", KINDS, strict=False):
            axes.plot([], [], f"{marker}-", color=colour, label=kind)
        axes.plot([], [], color=TEXT, label="2 / learning rate")
        axes.set(xlabel="step", ylabel="sharpness", xlim=(-0.04 * most, 1.26 * most), ylim=(0, None))

    def along(axes: Any, name: str, label: str) -> None:
        for colour, marker, (norm, kind) in zip(COLOURS, "osD^", product(RATES, KINDS), strict=False):
            of = of_network(found, kind, norm, rates_of(found, norm)[0])
            spread = [row["trace_error"] for row in of] if name == "trace" else None
            text = f"{kind}, no norm" if norm == "none" else f"{kind}, batch norm"
            steps, values = ([row[column] for row in of] for column in ("step", name))
            axes.errorbar(steps, values, spread, fmt=f"{marker}-", color=colour, markersize=3, label=text)
        axes.set(xlabel="step", ylabel=label)
        if name == "loss":
            log_axis(axes.yaxis)

    def spectrum(axes: Any, norm: str) -> None:
        of = of_network(found, "residual", norm, rates_of(found, norm)[0])
        names = {"eigenvalue1": "largest", "eigenvalue2": "second", "eigenvalue3": "third", "smallest": "smallest"}
        for colour, marker, (name, label) in zip(COLOURS, "osD^", names.items(), strict=False):
            values = [row[name] for row in of]
            axes.plot([row["step"] for row in of], values, f"{marker}-", color=colour, markersize=3, label=label)
        axes.set(xlabel="step", ylabel="eigenvalue of the Hessian")

    (loss, loss_ja), (trace, trace_ja) = ends_of(found, "loss", 3), ends_of(found, "trace", 0)
    made = []
    for norm, (name, name_ja) in NAMES.items():
        text, text_ja = edge_of(found, norm)
        made.append(Panel((f"{name} {text}", f"{name_ja}、{text_ja}"), partial(edge, norm=norm)))
    made += [
        Panel((f"Loss: {loss}", f"損失: {loss_ja}"), partial(along, name="loss", label="training loss")),
        Panel((f"Trace: {trace}", f"トレース: {trace_ja}"), partial(along, name="trace", label="trace of the Hessian")),
    ]
    for norm, (name, name_ja) in NAMES.items():
        share, low = last_spectrum(found, norm)
        finding = (
            f"{name} the residual network's third eigenvalue is {share} of the first at the end, the smallest {low}",
            f"{name_ja}、残差ネットワークの最後の 3 番目の固有値は 1 番目の {share} 倍、最小の固有値は {low}",
        )
        made.append(Panel(finding, partial(spectrum, norm=norm)))
    return made
