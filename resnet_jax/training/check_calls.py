"""The checks of `check` that call a module without jit, operation by operation, and record what submodules return."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_jax.training.check_report import Case, Finding, Notes
from resnet_jax.training.check_tracing import apply
from resnet_jax.training.state import PyTree, TrainState, create_state, path_map
from resnet_jax.training.step import step_key

OPTIMIZER = optax.sgd(1e-3, momentum=0.9)
"""After a first step its momentum is the gradient."""


@dataclass(frozen=True)
class Call:
    """A call of a module without jit.

    Attributes:
      output: of the module.
      updated: collections that it updated.
      results: path and output of each module within, in the order in which they ended.
      frozen: paths of modules with `frozen=True`, as our batch norm may have: neither gradients nor statistics there.
      idle: paths of dropouts that let everything through, though their rate is above 0.
    """

    output: Any
    updated: PyTree
    results: list[tuple[str, Any]]
    frozen: tuple[str, ...]
    idle: tuple[str, ...]


def run(case: Case, variables: PyTree, images: Any, key: Any = None, train: bool = False) -> Call:
    """Calls the module as the steps do, and records what happens within."""
    results: list[tuple[str, Any]] = []
    frozen, idle = [], []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        module, path = context.module, "/".join(context.module.path) or case.name
        if context.method_name == "__call__":
            results.append((path, result))
            if getattr(module, "frozen", False) is True:
                frozen.append(path)
            if (
                isinstance(module, nn.Dropout)
                and module.rate > 0
                and any(result is x for x in (*args, *kwargs.values()))
            ):
                idle.append(path)
        return result

    with nn.intercept_methods(record):
        output, updated = apply(case.module, variables, images, key, train)
    return Call(output, updated, results, tuple(frozen), tuple(idle))


@dataclass(frozen=True)
class Called:
    """What the calls without jit leave for the compiled steps.

    Attributes:
      first_state: key -> a new state.
      initial, state: a new state, and the same with other parameters (`perturbed`).
      batch: of `case.images(0)`, with the number of each image as its label.
      key: that the first training step gives to dropout.
      before, after: variables of `state`, and those after a training call.
      call, alone: that call, and one in evaluation with `after`.
    """

    first_state: Callable[[jax.Array], TrainState]
    initial: TrainState
    state: TrainState
    batch: dict[str, np.ndarray]
    key: jax.Array
    before: PyTree
    after: PyTree
    call: Call
    alone: Call


def by_calling(case: Case, notes: Notes) -> Called | None:
    """Makes the checks that need no compiled step; returns None where a step would tell nothing more."""
    first_state, findings = state_program(case)
    notes.add("key", findings)
    initial = first_state(jax.random.key(case.seed))
    state = initial.replace(params=perturbed(initial.params, case.seed))
    before = state.variables
    images, half = case.images(0), case.size // 2
    key = jax.random.split(step_key(0, state.step), 4)[3]
    call, again = (run(case, before, images, key, train=True) for _ in range(2))
    if not notes.add("pure", impure(call, again)):
        return None
    after = before | {name: values for name, values in call.updated.items() if name in before}
    notes.add("collections", idle_statistics(before["batch_stats"], after["batch_stats"], call.frozen))
    notes.add("train", idle_dropout(call))
    alone = run(case, after, images)
    if not notes.add("", not_finite(call, "in training") or not_finite(alone, "in evaluation")):
        return None
    notes.add("output", probabilities(case, call, alone))
    among = run(case, after, np.concatenate([images[:half], 3 * case.images(1)[half:] + 1]))
    if differ(alone.output[:half], among.output[:half]):
        place = first_difference(alone, among, slice(half)) or case.name
        problem = "with train=False the result for an image depends on the other images of its batch"
        remedy = "use running statistics where train is False (use_running_average=not train), and no mean over a batch"
        notes.add("evaluation", [Finding("evaluation", (place,), problem, remedy)])
    notes.add("evaluation", [])
    batch = {"image": images, "label": np.arange(case.size, dtype=np.int32)}
    return Called(first_state, initial, state, batch, key, before, after, call, alone)


def state_program(case: Case) -> tuple[Callable[[jax.Array], TrainState], list[Finding]]:
    """Returns a compiled `create_state`, and the variables in which tracing it again makes another program."""
    key = jax.random.key(case.seed)
    first, second = (
        jax.jit(lambda key: create_state(case.module, OPTIMIZER, key, case.image_shape)).lower(key) for _ in range(2)
    )
    program = first.compile()
    if first.as_text() == second.as_text():
        return program, []
    one, two = flat(program(key).variables), flat(second.compile()(key).variables)
    differ = tuple(path.partition("/")[2] for path in one if not np.array_equal(one[path], two[path], equal_nan=True))
    remedy = "draw initial values from the key that an initializer is given, not from random or numpy"
    problem = "two calls of init with the same key give different values"
    return program, [Finding("key", differ, problem, remedy)] if differ else []


def impure(call: Call, again: Call) -> list[Finding]:
    """Finds the first module whose result differs between two equal calls."""
    place = first_difference(call, again)
    problem = "two calls with the same variables, images and key give different results"
    remedy = "draw random numbers from self.make_rng('dropout'), not from random or numpy, and keep no state outside"
    return [Finding("pure", (place,), problem, f"{remedy} of the variables")] if place else []


def first_difference(call: Call, other: Call, rows: slice = slice(None), tolerance: float = 1e-4) -> str | None:
    """Returns the path of the first module whose results differ in those rows of a batch; None where none does.

    Args:
      tolerance: of the norm of a difference, relative to that of the result.
    """
    size = len(call.output)
    for (path, x), (_, y) in zip(call.results, other.results, strict=False):
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=False):
            if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer) or np.ndim(a) == 0:
                continue
            if rows != slice(None) and len(a) != size:
                continue
            if differ(np.asarray(a)[rows], np.asarray(b)[rows], tolerance):
                return path
    return None


def differ(array: Any, other: Any, tolerance: float = 1e-4) -> bool:
    """Returns whether the norm of a difference is more than `tolerance` of that of the array; equal NaN are equal."""
    a, b = np.asarray(array, np.float64), np.asarray(other, np.float64)
    if a.shape == b.shape and np.array_equal(a, b, equal_nan=True):
        return False
    return a.shape != b.shape or not np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a)


def idle_statistics(before: PyTree, after: PyTree, frozen: Sequence[str]) -> list[Finding]:
    """Finds running statistics that a training call leaves as they were."""
    old, new = flat(before), flat(after)
    idle = [path for path in old if path not in new or np.array_equal(old[path], new[path])]
    idle = [path for path in idle if not within(path, frozen)]
    remedy = "pass train on (use_running_average=not train), and assign the new value to the variable"
    return [Finding("collections", tuple(idle), "training does not update it", remedy)] if idle else []


def idle_dropout(call: Call) -> list[Finding]:
    """Finds dropouts that drop nothing in training."""
    remedy = "pass deterministic=not train"
    return [Finding("train", call.idle, "it drops nothing with train=True", remedy)] if call.idle else []


def not_finite(call: Call, when: str) -> list[Finding]:
    """Finds the first module whose result is not finite, where the output is not."""
    if all_finite(call.output):
        return []
    leaves = [(path, leaf) for path, result in call.results for leaf in jax.tree.leaves(result)]
    known = [(path, leaf) for path, leaf in leaves if not isinstance(leaf, jax.core.Tracer)]
    place = next((path for path, leaf in known if not all_finite(leaf)), call.results[-1][0])
    remedy = "look there for a division, root or logarithm of 0, as a black image may give, or a sum that overflows"
    return [Finding("finite", (place,), f"its result {when} is not finite", remedy)]


def probabilities(case: Case, call: Call, alone: Call) -> list[Finding]:
    """Finds a module that returns probabilities, in training or in evaluation."""
    train, evaluation = (are_probabilities(found.output) for found in (call, alone))
    if not train and not evaluation:
        return []
    when = "" if train and evaluation else f" with train={train}"
    problem = f"it returns probabilities{when}: the rows of all images sum to 1, and no number is negative"
    remedy = "return logits, which losses and metrics expect: leave the softmax out"
    return [Finding("output", (case.name,), problem, remedy)]


def are_probabilities(output: Any) -> bool:
    """Returns whether an output [batch, ..., classes] has several classes and is what a softmax returns."""
    values = np.asarray(output, np.float64)
    has_classes = values.ndim > 1 and values.shape[-1] > 1
    return has_classes and bool((values >= 0).all() and (abs(values.sum(-1) - 1) < 1e-5).all())


def all_finite(values: Any) -> bool:
    """Returns whether all numbers of an array are finite."""
    values = np.asarray(values)
    return not jnp.issubdtype(values.dtype, jnp.floating) or bool(np.isfinite(values.astype(np.float64)).all())


def perturbed(params: PyTree, seed: int) -> PyTree:
    """Returns parameters with noise of a tenth of each array's root mean square, or of 0.1 where it is 0.

    So every branch counts, also one whose last norm starts at zero.
    """
    rng = np.random.default_rng(seed)

    def shake(leaf: jax.Array) -> jax.Array:
        values = np.asarray(leaf, np.float64)
        scale = math.sqrt(np.square(values).mean()) if values.size else 1.0
        return jnp.asarray(values + 0.1 * (scale or 1.0) * rng.normal(size=values.shape), leaf.dtype)

    return jax.tree.map(shake, params)


def flat(tree: PyTree) -> dict[str, np.ndarray]:
    """Returns the arrays of a tree by their paths."""
    found: dict[str, np.ndarray] = {}
    path_map(found.__setitem__, tree)
    keys = {path for path, leaf in found.items() if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)}
    return {path: np.asarray(jax.random.key_data(leaf) if path in keys else leaf) for path, leaf in found.items()}


def within(path: str, modules: Sequence[str]) -> bool:
    """Returns whether a path lies in one of some modules."""
    return any(path.startswith(f"{module}/") for module in modules)
