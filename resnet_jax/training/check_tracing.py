"""The checks of `check` that compute nothing: signature, shapes, types, decay, and what the steps can call at all."""

import inspect
import math
import sysconfig
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.ops import use_custom_kernels
from resnet_jax.training.check_report import Case, Finding, Notes, Shape, carried, has_field
from resnet_jax.training.optimizers import Rules, rate_of
from resnet_jax.training.state import PyTree, path_map


def by_tracing(case: Case, notes: Notes) -> bool:
    """Makes the checks that compute nothing; returns whether the module can be called."""
    if not notes.add("call", wrong_signature(case.module)):
        return False
    shapes, findings = traced_shapes(case)
    if not notes.add("output shape", findings):
        return False
    params = shapes.get("params", {})
    notes.figures["parameters"] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    notes.add("decay", uncovered(params, case.rules))
    notes.add("dtype", wrong_dtypes(case))
    if not notes.add("", wrong_calls(case, shapes)):
        return False
    notes.figures["gmacs"] = sum(multiply_adds(case.module, shapes, case.image_shape).values()) / 1e9
    return True


def wrong_signature(module: nn.Module) -> list[Finding]:
    """Finds a module that cannot be called as `module(images, train=...)`."""
    parameters = inspect.signature(type(module).__call__).parameters
    if "train" in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        return []
    given = ", ".join(name for name in parameters if name != "self")
    remedy = "write `def __call__(self, images, train: bool)`, and pass it on to norms and dropout"
    return [Finding("call", (type(module).__name__,), f"its __call__ takes ({given}) and no `train`", remedy)]


def traced_shapes(case: Case) -> tuple[PyTree, list[Finding]]:
    """Returns shapes of a module's variables, and what is wrong with those and with the shape of its output."""
    results = []
    for size in (1, 2):
        images = jax.ShapeDtypeStruct((size, *case.image_shape), jnp.float32)
        result, findings = traced(
            case, "init", partial(case.module.init_with_output, train=False), jax.random.key(0), images
        )
        if findings:
            return {}, findings
        output, variables = result
        if not isinstance(output, jax.ShapeDtypeStruct):
            problem = f"it returns a {type(output).__name__}, not one array"
            remedy = (
                "return logits alone, and sow those of further heads into 'auxiliary_logits', whose loss counts; with "
                "a loss of your own and a Dataset with class_names=() it can be trained as it is, but not checked"
            )
            return {}, [Finding("output", (case.name,), problem, remedy)]
        if not jnp.issubdtype(output.dtype, jnp.floating):
            problem = f"it returns {output.dtype} numbers, which have no gradient"
            return {}, [Finding("output", (case.name,), problem, "return logits, before argmax or rounding")]
        if output.shape[:1] != (size,):
            problem = f"for {size} images it returns the shape {output.shape}"
            return {}, [Finding("output", (case.name,), problem, "return one row for each image: [batch, ...]")]
        results.append((output.shape[1:], variables))
    (one, variables), (two, others) = results
    if not jax.tree.leaves(variables.get("params", {})):
        problem, remedy = "it has no parameters", "make them in self.param or in layers; there is nothing to train"
        return {}, [Finding("call", (case.name,), problem, remedy)]
    first, second = ({path: leaf.shape for path, leaf in by_path(v).items()} for v in (variables, others))
    differ = tuple(path for path in first | second if first.get(path) != second.get(path))
    remedy = "reshape with images.shape[0] as first size, and take means over other axes than the first"
    if differ:
        problem = f"its shape is {first.get(differ[0])} for one image and {second.get(differ[0])} for two"
        return {}, [Finding("shape", differ, problem, remedy)]
    if one != two:
        problem = f"an image's output has the shape {one} alone and {two} in a batch of two"
        return {}, [Finding("shape", (case.name,), problem, remedy)]
    return variables, []


def by_path(variables: PyTree) -> dict[str, Any]:
    """Returns shapes of parameters, statistics and what else a state carries by their paths."""
    found: dict[str, Any] = {}
    for values in carried(variables).values():
        path_map(found.__setitem__, values)
    return found


def traced(case: Case, mode: str, function: Callable[..., Any], *args: Any) -> tuple[Any, list[Finding]]:
    """Returns shapes of a function's result, or what the error says that it raises.

    Args:
      mode: `init`, `train` or `eval`, for the words of the finding.
    """
    place: list[str] = []

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception:
            place.append("/".join(context.module.path) or case.name)
            raise

    try:
        with nn.intercept_methods(watch):
            return jax.eval_shape(function, *args), []
    except Exception as error:
        return None, [with_line(explained(error, mode, place[0] if place else case.name), error)]


NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
MISSING = (flax.errors.ScopeCollectionNotFound, flax.errors.ScopeVariableNotFoundError)


def explained(error: Exception, mode: str, place: str) -> Finding:
    """Returns what an error of a module says, in our words where it is known."""
    text = first_line(error)
    if isinstance(error, NEEDS_VALUES):
        problem = f"its Python code needs the value of an array, which jit does not have ({type(error).__name__})"
        return Finding("jit", (place,), problem, "use jnp and jnp.where in place of if, float() and numpy")
    if isinstance(error, NameError) and "unbound axis" in str(error):
        remedy = "make axis_name a field of the module that is None by default; check sets it for shard_map"
        return Finding("jit", (place,), "it averages over an axis that is only there in shard_map", remedy)
    if isinstance(error, flax.errors.InvalidRngError):
        if mode == "eval":
            remedy = "pass deterministic=not train to dropout"
            return Finding("evaluation", (place,), "it draws random numbers with train=False", remedy)
        remedy = "draw from make_rng('dropout'), the stream that the training step gives"
        return Finding("train", (place,), f"it draws random numbers that it is not given ({text})", remedy)
    if isinstance(error, flax.errors.ModifyScopeVariableError) and mode == "eval" and '"batch_stats"' in str(error):
        remedy = "use running statistics where train is False: use_running_average=not train"
        return Finding("evaluation", (place,), "it updates running statistics with train=False", remedy)
    if isinstance(error, (flax.errors.ModifyScopeVariableError, *MISSING)):
        problem = f"it keeps variables in a collection that the training state does not hold ({text})"
        return Finding("collections", (place,), problem, "keep running statistics in the collection 'batch_stats'")
    if isinstance(error, flax.errors.ScopeParamNotFoundError) and mode == "train":
        problem = f"it has parameters with train=True that it has not with train=False ({text})"
        remedy = "make them wherever train is True or self.is_initializing()"
        return Finding("train", (place,), problem, remedy)
    if isinstance(error, flax.errors.ScopeParamShapeError):
        remedy = "reshape with images.shape[0] as first size; shapes may depend on nothing else of the batch"
        return Finding("shape", (place,), text, remedy)
    return Finding("call", (place,), f"with train={mode == 'train'} it raises {text}", MESSAGE_SAYS)


MESSAGE_SAYS = "the message says where to look"
"""Remedy where nothing more is known of an error."""


def with_line(finding: Finding, error: Exception) -> Finding:
    """Returns a finding whose remedy names the line of the user's own code in which an error arose, if in any."""
    line = own_line(error)
    if line is None:
        return finding
    remedy = f"look at {line}" if finding.remedy == MESSAGE_SAYS else f"{finding.remedy}; look at {line}"
    return replace(finding, remedy=remedy)


def own_line(error: Exception) -> str | None:
    """Returns the innermost line of an error's traceback that is neither of this package, nor of an installed one, nor
    of Python, such as `net.py, line 12`; None where there is none.
    """
    python, package = Path(sysconfig.get_path("stdlib")), Path(__file__).parents[1]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename).absolute()
        installed = {"site-packages", "dist-packages"} & set(path.parts)
        if path.is_file() and not installed and not path.is_relative_to(python) and not path.is_relative_to(package):
            here = Path.cwd()
            return f"{path.relative_to(here) if path.is_relative_to(here) else path}, line {frame.lineno}"
    return None


def first_line(error: Exception) -> str:
    """Returns an error's kind and the first line of what it says."""
    line = (str(error).strip().splitlines() or [""])[0].partition(" (https://")[0]  # Flax adds the page of its errors
    return f"{type(error).__name__}: {line[:400].rstrip('.')}"


def wrong_calls(case: Case, shapes: PyTree) -> list[Finding]:
    """Finds what the training and the evaluation step cannot call, with the variables that a state holds."""
    variables = carried(shapes)
    images = jax.ShapeDtypeStruct((case.size, *case.image_shape), jnp.float32)
    _, findings = traced(case, "train", partial(apply, case.module, train=True), variables, images, jax.random.key(0))
    return findings + traced(case, "eval", partial(apply, case.module, train=False), variables, images)[1]


def apply(
    module: nn.Module, variables: PyTree, images: Any, key: Any = None, train: bool = False
) -> tuple[Any, PyTree]:
    """Returns a module's output and what it updates, called as the steps call it."""
    if not train:
        return module.apply(variables, images, train=False), {}
    rngs = {"dropout": key}
    others = [name for name in variables if name != "params"]
    mutable = [*others, "auxiliary_logits", "losses"]
    output, updated = module.apply(variables, images, train=True, mutable=mutable, rngs=rngs)
    return output, updated


def wrong_dtypes(case: Case) -> list[Finding]:
    """Finds parameters, statistics and outputs that are not float32, also of the module with `dtype` bfloat16."""
    findings = []
    half = [case.module.clone(dtype=jnp.bfloat16)] if has_field(case.module, "dtype") else []
    for module in (case.module, *half):
        images = jax.ShapeDtypeStruct((1, *case.image_shape), jnp.float32)
        output, variables = jax.eval_shape(partial(module.init_with_output, train=False), jax.random.key(0), images)
        wrong = {path: leaf.dtype for path, leaf in by_path(variables).items() if is_inexact(leaf.dtype)}
        by = f" with dtype={jnp.dtype(module.dtype).name}" if half else ""
        if wrong:
            kind = next(iter(wrong.values()))
            remedy = "keep variables float32 (param_dtype=jnp.float32), and cast them where they are used"
            findings.append(Finding("dtype", tuple(wrong), f"it is {kind} and not float32{by}", remedy))
        elif output.dtype != jnp.float32:
            remedy = "end with .astype(jnp.float32), or give the last layer dtype=jnp.float32"
            findings.append(Finding("dtype", (case.name,), f"its output is {output.dtype} and not float32{by}", remedy))
    return findings


def is_inexact(dtype: Any) -> bool:
    """Returns whether a type is of floats, but not float32."""
    return jnp.issubdtype(dtype, jnp.floating) and dtype != jnp.float32


def uncovered(params: PyTree, rules: Rules) -> list[Finding]:
    """Finds parameters that no decay rule matches."""
    none = float("nan")
    factor = rate_of(rules, lambda path: none)
    shapes = by_path({"params": params})
    wrong = tuple(path for path in shapes if math.isnan(factor(path)))
    if not wrong:
        return []
    kernels = [path for path in wrong if shapes[path].ndim > 1]
    rule = f"('.*{kernels[0].rpartition('/')[2]}', 1.0)" if kernels else f"('.*{wrong[0].rpartition('/')[2]}', 0.0)"
    problem = "no rule of optimizer.decay_rules matches it, and an optimizer of a recipe would refuse it"
    remedy = f"call it kernel, bias or scale within a layer, or add a rule such as {rule}"
    return [Finding("decay", wrong, problem, remedy)]


def multiply_adds(module: nn.Module, shapes: PyTree, image_shape: Shape) -> dict[str, int]:
    """Counts the multiply-adds of convolutions and products for one image, by the type in which they compute."""
    variables = carried(shapes)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with use_custom_kernels(False):
        traced = jax.make_jaxpr(partial(apply, module))(variables, images)
    return counted(getattr(traced, "jaxpr", traced))


def counted(jaxpr: Any) -> dict[str, int]:
    """Counts multiply-adds of a traced program, on all devices, by type; of branches those with most.

    Positions of padding count, as in the tables of torchvision and timm; the holes of a dilated input, which the
    gradient of a convolution with strides has, do not.
    """
    found: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        operation = equation.primitive.name
        if operation in ("dot_general", "conv_general_dilated"):
            left, right = (x.aval for x in equation.invars[:2])
            if operation == "dot_general":
                ((contracted, _), _) = equation.params["dimension_numbers"]
                each = math.prod(left.shape[axis] for axis in contracted)
            else:
                outputs = right.shape[equation.params["dimension_numbers"].rhs_spec[0]]
                each = math.prod(right.shape) // max(1, outputs)
            holes = math.prod(equation.params.get("lhs_dilation", ()))
            found[str(left.dtype)] += each * math.prod(equation.outvars[0].aval.shape) // holes
            continue
        inner = [counted(part) for part in programs_in(equation.params)]
        if operation == "cond":
            inner = [max(inner, key=lambda part: sum(part.values()))]
        times = equation.params["mesh"].size if operation == "shard_map" else equation.params.get("length", 1)
        for part in inner:
            found.update({kind: n * times for kind, n in part.items()})
    return dict(found)


def programs_in(params: Mapping[str, Any]) -> list[Any]:
    """Returns the traced programs among an operation's parameters."""
    values = [x for value in params.values() for x in (value if isinstance(value, (tuple, list)) else (value,))]
    return [getattr(x, "jaxpr", x) for x in values if hasattr(getattr(x, "jaxpr", x), "eqns")]
