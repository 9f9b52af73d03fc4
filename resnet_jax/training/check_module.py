"""A contract for modules: what training, several devices and resumption assume of a module, each tried on the module.

`check` asks first what tracing tells (`check_tracing.py`), then calls without jit (`check_calls.py`), then the compiled
steps, here. Comparisons allow for rounding: for what changes where parameters and images change in their last digits.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from resnet_jax.config import InputError, OptimizerConfig
from resnet_jax.models.layers import DropPath
from resnet_jax.models.registry import create_model
from resnet_jax.ops import sharded_batch
from resnet_jax.recipe_files import load_named
from resnet_jax.training.check_calls import (
    OPTIMIZER,
    Called,
    all_finite,
    by_calling,
    first_difference,
    flat,
    perturbed,
    run,
    within,
)
from resnet_jax.training.check_report import Case, CheckReport, Finding, Notes, Shape, has_field
from resnet_jax.training.check_tracing import (
    MESSAGE_SAYS,
    apply,
    by_tracing,
    first_line,
    multiply_adds,
    with_line,
)
from resnet_jax.training.optimizers import Rules
from resnet_jax.training.sharding import make_mesh, memory_of, put_everywhere, shard_batch
from resnet_jax.training.state import PyTree, TrainState
from resnet_jax.training.step import AUXILIARY, TrainStep, make_train_step

MOST_DEVICES = 8
ROUNDING = 2.0**-18
"""Relative change of parameters and images by which rounding in float32 is imitated."""
HALF_ROUNDING = 2.0**-8
"""The same for bfloat16."""


def check(module: nn.Module, image_shape: Shape, *, decay_rules: Rules | None = None, seed: int = 0) -> CheckReport:
    """Tries whether a module keeps what training, several devices and resumption assume; compiles some seven programs.

    It is tried on the devices that JAX sees, at most eight. On a computer without several, start Python with the
    environment variable XLA_FLAGS=--xla_force_host_platform_device_count=8, or use `resnet-jax check`; with one device
    the checks `devices` and `shard_map` are left out, and the report says so.

    Args:
      module: called as `module(images, train=...)`, with images float32 [batch, height, width, channel]; may keep
        `batch_stats`, draw from `dropout`, and sow `auxiliary_logits`. A field `dtype` is tried with bfloat16; a field
        `axis_name` is set to the mesh's axis for `shard_map`.
      image_shape: height, width, channel of an image.
      decay_rules: as `optimizer.decay_rules` of a recipe; None for its default.
      seed: of images and parameters.

    Raises:
      InputError: the module is none of `flax.linen`, or the shape is none of images.

    Example::

      report = rj.check(MyNet(), (32, 32, 3))
      print(report)  # what was tried, what was found, and what to do
      assert report.ok
    """
    if not isinstance(module, nn.Module):
        came = f"the class {module.__name__}" if isinstance(module, type) else f"an object of {type(module).__name__}"
        raise InputError(
            f"check takes a flax.linen.Module, not {came}: give an object such as MyNet(), and bring a module of "
            "flax.nnx over with flax.nnx.bridge.to_linen"
        )
    shape = tuple(image_shape)
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise InputError(f"image_shape {image_shape} must be (height, width, channel), such as (224, 224, 3)")
    rules = OptimizerConfig().decay_rules if decay_rules is None else decay_rules
    devices = min(MOST_DEVICES, len(jax.devices()))
    exact = module.clone(dtype=jnp.float32) if has_field(module, "dtype") else module
    case = Case(exact, module, shape, rules, seed, devices, max(4, 2 * devices))
    notes = Notes(case)
    with jax.default_matmul_precision("highest"):
        if by_tracing(case, notes):
            called = by_calling(case, notes)
            if called:
                by_compiling(case, notes, called)
    return notes.report()


def module_of(target: str, size: int | None = None, channels: int | None = None) -> tuple[nn.Module, Shape]:
    """Returns a module and the shape of its images: height, width, channel.

    Args:
      target: name of a named model, or FILE:NAME of a Python file and what it calls a module, a class of modules, or a
        function without arguments that returns one.
      size: pixels; None takes the module's field `image_size`, or 32.
      channels: None takes the module's field `in_channels`, or 3.

    Raises:
      InputError: there is no such model, file or name, the file cannot be run, or gives something else.
    """
    module: Any = create_model(target) if ":" not in target else load_named(target)
    if isinstance(module, type) or (callable(module) and not isinstance(module, nn.Module)):
        try:
            module = module()
        except Exception as error:
            raise InputError(f"{target}() raises {first_line(error)}; name a function without arguments") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{target} gives {type(module).__name__}, not a flax.linen.Module such as MyNet()")
    wanted = {"image_size": size, "in_channels": channels}
    fields: dict[str, Any] = {name: n for name, n in wanted.items() if n is not None and has_field(module, name)}
    module = module.clone(**fields)
    side = size or getattr(module, "image_size", None) or 32
    return module, (side, side, channels or getattr(module, "in_channels", None) or 3)


def probe(outputs: jax.Array, batch: Mapping[str, Any]) -> jax.Array:
    """Computes a linear loss, float32 [batch], with other weights for each image (its `label`) and each output."""
    values = outputs.reshape(outputs.shape[0], -1).astype(jnp.float32)
    weights = jnp.cos(1.7 * batch["label"][:, None] + 2.3 * jnp.arange(values.shape[1]))
    return (values * weights).sum(-1) / math.sqrt(values.shape[1])


def outcome(before: TrainState, result: tuple[TrainState, PyTree]) -> dict[str, np.ndarray]:
    """Returns by their paths what a first step with `OPTIMIZER` gives.

    Returns:
      `gradient/...`, which is the momentum, `batch_stats/...` and other collections: by how much they changed, and
      `loss`.
    """
    after, sums = result
    old, new = (flat({"batch_stats": state.batch_stats} | state.collections) for state in (before, after))
    changes = {path: np.asarray(new[path], np.float64) - old[path] for path in old}
    return flat({"gradient": after.opt_state[0].trace, "loss": sums["loss"]}) | changes


def rounded(tree: PyTree, amount: float, seed: int) -> PyTree:
    """Returns arrays whose floats are changed by a normal random share of `amount`."""
    rng = np.random.default_rng(seed)

    def change(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return (x * (1 + amount * rng.normal(size=np.shape(x)))).astype(x.dtype)

    return jax.tree.map(change, tree)


@dataclass(frozen=True)
class Steps:
    """A compiled step on one device and what it gave: with the state of `Called`, and that with rounded inputs."""

    run: Callable[[TrainState, PyTree], dict[str, np.ndarray]]
    result: dict[str, np.ndarray]
    noisy: dict[str, np.ndarray]


def tried(called: Called, step: Callable[[TrainState, PyTree], Any]) -> Steps:
    """Returns what a step on one device gives."""

    def run(state: TrainState, batch: PyTree) -> dict[str, np.ndarray]:
        return outcome(state, step(state, batch))

    rough = called.state.replace(params=rounded(called.state.params, ROUNDING, 0))
    images = rounded(called.batch["image"], ROUNDING, 1)
    return Steps(run, run(called.state, called.batch), run(rough, called.batch | {"image": images}))


def by_compiling(case: Case, notes: Notes, called: Called) -> None:
    """Makes the checks that need compiled steps."""
    train_step = make_train_step(case.module, OPTIMIZER, loss=probe, classes=False)
    start = time.perf_counter()
    try:
        step = jax.jit(train_step).lower(called.state, called.batch).compile()
    except Exception as error:  # the forward pass has been tried before
        remedy = "use operations that have a gradient, such as lax.scan in place of lax.while_loop"
        found = Finding("gradients", (case.name,), f"its gradient raises {first_line(error)}", remedy)
        notes.add("gradients", [with_line(found, error)])
        return
    notes.figures |= {"compile_seconds": time.perf_counter() - start, "memory": memory_of(step)}
    one = tried(called, step)
    notes.add("finite", broken := broken_gradient(case, called, one))
    notes.add("gradients", unreached(case, called, one))
    evaluate = jax.jit(partial(case.module.apply, train=False))
    notes.add("jit", unlike_jit(case, called, one, evaluate))
    notes.add("resume", not_resumed(case, called, step))
    if has_field(case.given, "dtype"):
        notes.add("bfloat16", unlike_bfloat16(case, called, evaluate))
    else:
        notes.left_out["bfloat16"] = "the module has no field dtype"
    if broken or case.devices == 1:
        alone = "JAX sees one device; resnet-jax check imitates eight"
        notes.left_out |= dict.fromkeys(("devices", "shard_map"), "it needs finite gradients" if broken else alone)
        return
    mesh = make_mesh(case.devices)
    if not notes.add("devices", unlike("devices", called, one, train_step, mesh)):
        return
    module = case.module.clone(axis_name="data") if has_field(case.module, "axis_name") else case.module
    mapped = make_train_step(module, OPTIMIZER, loss=probe, classes=False, mesh=mesh)
    draws, elsewhere = draws_random_numbers(case, called)
    if elsewhere:
        why = "it draws random numbers elsewhere than in Dropout and DropPath, and each device draws its own"
        notes.left_out["shard_map"] = why
        return
    if draws:  # each device draws its own numbers, so they are left out on both sides
        mapped, one = without_chance(mapped), tried(called, jax.jit(without_chance(train_step)))
    notes.add("shard_map", unlike("shard_map", called, one, mapped, mesh))


def draws_random_numbers(case: Case, called: Called) -> tuple[bool, bool]:
    """Returns whether training depends on the key, and whether it does so where dropouts let everything through."""
    run_with = partial(run, case, called.before, called.batch["image"], train=True)
    other = jax.random.key(case.seed + 1)
    if not first_difference(called.call, run_with(key=other)):
        return False, False
    with nn.intercept_methods(without_dropout):
        return True, bool(first_difference(run_with(key=called.key), run_with(key=other)))


def without_dropout(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Intercepts dropouts, which then return what they are given."""
    if isinstance(context.module, (nn.Dropout, DropPath)) and context.method_name == "__call__":
        return args[0] if args else next(iter(kwargs.values()))
    return call(*args, **kwargs)


def without_chance(step: TrainStep) -> TrainStep:
    """Returns a step in which dropouts let everything through."""

    def calm_step(state: TrainState, batch: Any) -> Any:
        with nn.intercept_methods(without_dropout):
            return step(state, batch)

    return calm_step


def differing(
    expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], noisy: Mapping[str, np.ndarray]
) -> list[str]:
    """Returns the paths of arrays that differ by more than rounding explains.

    Args:
      noisy: what was expected, of inputs that were changed in their last digits.
    """
    norms = {path: float(np.linalg.norm(np.asarray(leaf, np.float64))) for path, leaf in expected.items()}
    largest: dict[str, float] = {}
    for path, norm in norms.items():
        group = path.partition("/")[0]
        largest[group] = max(largest.get(group, 0.0), norm)

    def excess(path: str) -> float:
        reference = np.asarray(expected[path], np.float64)
        off, noise = (np.linalg.norm(np.asarray(x[path], np.float64) - reference) for x in (found, noisy))
        allowed = 1e-4 * norms[path] + 20 * noise + 1e-6 * largest[path.partition("/")[0]]
        return math.inf if not np.isfinite(off) else float(off / allowed) if allowed else float(off)

    return [path for path in expected if excess(path) > 1]


def broken_gradient(case: Case, called: Called, one: Steps) -> list[Finding]:
    """Finds the module in whose backward pass a gradient stops being finite."""
    for state in (called.state, called.initial):
        gradient = gradient_of(one.run(state, called.batch))
        if broken := [path for path, leaf in gradient.items() if not all_finite(leaf)]:
            place = gradient_breaks_in(case, called, state) or broken[0]
            problem = f"the gradient is not finite: of {len(broken)} parameters, such as {broken[0]}"
            remedy = "look there for a root, norm, logarithm or division of 0, and add a small number inside of it"
            return [Finding("finite", (place,), problem, remedy)]
    return []


def gradient_of(result: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the gradient in an `outcome`, by the paths of parameters."""
    return {path.partition("/")[2]: leaf for path, leaf in result.items() if path.startswith("gradient/")}


def gradient_breaks_in(case: Case, called: Called, state: TrainState) -> str | None:
    """Returns the innermost module which a finite gradient enters and one that is not leaves; None where none does."""
    ended: list[tuple[str, str]] = []

    def loss(zeros: dict[str, Any], shapes: dict[str, Any] | None = None) -> jax.Array:
        calls = 0
        ended.clear()

        def watched(name: str, value: object) -> Any:
            if not (isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)):
                return value
            if shapes is not None:
                shapes[name] = jax.ShapeDtypeStruct(value.shape, value.dtype)
            return value + zeros[name] if name in zeros else value

        def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            nonlocal calls
            if context.method_name != "__call__" or not args:
                return call(*args, **kwargs)
            calls += 1
            name = str(calls)
            result = watched(f"{name} out", call(watched(f"{name} in", args[0]), *args[1:], **kwargs))
            ended.append(("/".join(context.module.path) or case.name, name))
            return result

        with nn.intercept_methods(watch):
            output, _ = apply(case.module, state.variables, called.batch["image"], called.key, train=True)
        return probe(output, called.batch).mean()

    shapes: dict[str, Any] = {}
    jax.eval_shape(partial(loss, {}, shapes))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    finite = {name: all_finite(values) for name, values in jax.grad(loss)(zeros).items()}
    broken = (path for path, name in ended if finite.get(f"{name} out") and finite.get(f"{name} in") is False)
    return next(broken, None)


def unreached(case: Case, called: Called, one: Steps) -> list[Finding]:
    """Finds parameters whose gradient is 0, whatever the parameters are."""
    idle = {path for path, leaf in gradient_of(one.result).items() if not np.any(leaf)}
    idle -= {path for path in idle if within(path, called.call.frozen)}
    for seed in range(8) if idle else ():  # one rectifier may be closed for all images by chance
        state = called.first_state(jax.random.key(case.seed + seed))
        gradient = gradient_of(one.run(state.replace(params=perturbed(state.params, seed + 1)), called.batch))
        idle -= {path for path in idle if np.any(gradient[path])}
    if not idle:
        return []
    remedy = "use the layer's result, or take the layer out; look for lax.stop_gradient"
    return [Finding("gradients", tuple(sorted(idle)), "no gradient reaches it", remedy)]


def unlike_jit(case: Case, called: Called, one: Steps, evaluate: Callable[..., Any]) -> list[Finding]:
    """Finds where compiled calls give something else than calls without jit."""
    losses = probe(called.call.output, called.batch)
    for auxiliary in jax.tree.leaves(called.call.updated.get("auxiliary_logits", {})):
        losses += AUXILIARY * probe(auxiliary, called.batch)
    for more in jax.tree.leaves(called.call.updated.get("losses", {})):
        losses += more
    old, new = (flat({k: v for k, v in x.items() if k != "params"}) for x in (called.before, called.after))
    plain = {path: np.asarray(new[path], np.float64) - old[path] for path in old} | {"loss": np.asarray(losses.sum())}
    in_training = differing({path: one.result[path] for path in plain}, plain, one.noisy)
    inputs = called.after, called.batch["image"]
    compiled, noisy = evaluate(*inputs), evaluate(*rounded(inputs, ROUNDING, 2))
    in_evaluation = differing({"output": compiled}, {"output": called.alone.output}, {"output": noisy})
    if not in_training and not in_evaluation:
        return []
    place = jit_differs_in(case, called, bool(in_training)) or case.name
    problem = f"in {'training' if in_training else 'evaluation'} jit gives something else than a call without jit"
    remedy = "look for Python code that depends on whether it is traced, on time, or on what was called before"
    return [Finding("jit", (place,), problem, remedy)]


def jit_differs_in(case: Case, called: Called, train: bool) -> str | None:
    """Returns the first module whose result is another under jit; None where it cannot be told."""
    variables, call = (called.before, called.call) if train else (called.after, called.alone)
    paths: list[str] = []

    def within_jit(variables: PyTree, images: Any, key: Any) -> tuple[Any, list[Any]]:
        traced = run(case, variables, images, key, train)
        paths[:] = [path for path, _ in traced.results]
        return traced.output, [result for _, result in traced.results]

    try:
        output, results = jax.jit(within_jit)(variables, called.batch["image"], called.key)
    except jax.errors.UnexpectedTracerError:  # a module within remat or a loop
        return None
    return first_difference(call, replace(call, output=output, results=list(zip(paths, results, strict=True))))


def not_resumed(case: Case, called: Called, step: Any) -> list[Finding]:
    """Finds what differs where a state is stored and read between two steps."""
    batch = called.batch
    after = jax.device_get(step(called.state, batch)[0])
    try:
        read = flax.serialization.from_bytes(after, flax.serialization.to_bytes(after))
        went_on, again, resumed = (flat(step(s, batch)[0].variables) for s in (after, after, read))
    except Exception as error:
        problem = f"its variables cannot be stored and read ({type(error).__name__}: {error})"
        remedy = "keep plain arrays in variables, under names that are strings"
        return [Finding("resume", (case.name,), problem, remedy)]
    if any(went_on[path].tobytes() != again[path].tobytes() for path in went_on):
        problem = "the same compiled step with the same state gives other bits the second time"
        remedy = "look for a callback with a state of its own; on a GPU set XLA_FLAGS=--xla_gpu_deterministic_ops=true"
        return [Finding("resume", (case.name,), problem, remedy)]
    differ = [path.partition("/")[2] for path in went_on if went_on[path].tobytes() != resumed[path].tobytes()]
    problem, remedy = "a state that was stored and read goes on otherwise", "keep plain arrays in variables"
    return [Finding("resume", tuple(differ), problem, remedy)] if differ else []


def unlike(check: str, called: Called, one: Steps, step: TrainStep, mesh: Mesh) -> list[Finding]:
    """Finds where a step over several devices gives something else than on one device.

    Args:
      check: `devices` or `shard_map`.
    """
    inputs = put_everywhere(called.state, mesh), shard_batch(called.batch, mesh)
    try:
        found = outcome(called.state, jax.jit(sharded_batch()(step))(*inputs))
    except Exception as error:
        problem = f"over {mesh.size} devices the step raises {first_line(error)}"
        return [with_line(Finding(check, ("the training step",), problem, MESSAGE_SAYS), error)]
    differ = differing(one.result, found, one.noisy)
    if not differ:
        return []
    statistics = [path for path in sorted(differ) if path.partition("/")[0] not in ("gradient", "loss")]
    norms = dict.fromkeys(path.rpartition("/")[0] for path in statistics)
    places = tuple(path.partition("/")[2] for path in norms) or tuple(path.partition("/")[2] or path for path in differ)
    if check == "devices":
        problem = f"jit over {mesh.size} devices gives something else than on one"
        return [Finding(check, places, problem, "look for code that asks where arrays lie, or how many devices are")]
    if norms:
        problem = "in shard_map its running statistics are those of one device's images, not of the whole batch"
        remedy = "give it axis_name=self.axis_name, a field of the module that is None by default; or train with jit"
        return [Finding(check, places, problem, remedy)]
    problem = "in shard_map its gradient differs from that under jit"
    remedy = "look for a mean over the batch, of which a device sees its share: use jax.lax.pmean, or train with jit"
    return [Finding(check, places, problem, remedy)]


def unlike_bfloat16(case: Case, called: Called, evaluate: Callable[..., Any]) -> list[Finding]:
    """Finds a module that does not compute in bfloat16, or whose output is then off by more than rounding."""
    half = case.module.clone(dtype=jnp.bfloat16)
    macs = multiply_adds(half, jax.eval_shape(lambda: called.after), case.image_shape)
    if macs and "bfloat16" not in macs:
        problem = "with dtype=bfloat16 no convolution or product computes in bfloat16"
        return [Finding("bfloat16", (case.name,), problem, "pass dtype=self.dtype to the layers")]
    inputs = called.after, called.batch["image"]
    output, noisy = (np.asarray(evaluate(*x), np.float64) for x in (inputs, rounded(inputs, HALF_ROUNDING, 3)))
    found = np.asarray(jax.jit(partial(half.apply, train=False))(*inputs), np.float64)
    off = float(np.linalg.norm(found - output))
    allowed = float(4 * np.linalg.norm(noisy - output) + HALF_ROUNDING * np.linalg.norm(output))
    if off <= allowed:
        return []
    place = first_difference(called.alone, run(replace(case, module=half), *inputs), tolerance=0.1) or case.name
    problem = f"with dtype=bfloat16 the output is off by {off:.2g}, where rounding explains {allowed:.2g}"
    remedy = "compute sums, means, variances and differences of large numbers in float32 there"
    return [Finding("bfloat16", (place,), problem, remedy)]
