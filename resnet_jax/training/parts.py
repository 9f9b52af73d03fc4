"""What a run's user brings in place of what a recipe names: model, data, loss, optimizer, metrics, hooks."""

import ast
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from resnet_jax.config import Config, InputError, ModelConfig, OptimizerConfig, sides
from resnet_jax.data.dataset import Dataset
from resnet_jax.files import to_json, write_whole
from resnet_jax.models.registry import model_fields
from resnet_jax.recipe_files import PARTS_FILE, recipe_given, recorded_parts
from resnet_jax.training.losses import Loss
from resnet_jax.training.metrics import Metric
from resnet_jax.training.optimizers import OwnOptimizer

OUR_METRICS = ("loss", "accuracy", "count", "top5", "macro_recall", "macro_f1", "map", "skipped")
"""Names of our own metrics."""


@dataclass(frozen=True)
class Parts:
    """Parts of the user's own; None takes what the recipe names.

    Attributes:
      model: a `flax.linen.Module` called as `model(images, train=...)`, with or without batch statistics, dropout and
        other collections.
      dataset: three splits, or a function without arguments that returns them.
      loss: `loss(logits, batch) -> float32 [batch]`.
      optimizer: an optax transformation, or a function that makes one of the recipe's schedule.
      metrics: name -> `metric(logits, batch) -> [batch]`; a name may be the recipe's `train.metric`.
      hooks: objects with any of the methods of `runs.hooks.Hook`.
      outputs: columns of the logits, of which the first are the classes; 0 where the outputs are no classes; None where
        the model says it.
    """

    model: nn.Module | None = None
    dataset: Dataset | Callable[[], Dataset] | None = None
    loss: Loss | None = None
    optimizer: OwnOptimizer | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    hooks: tuple[Any, ...] = ()
    outputs: int | None = None

    def outputs_of(self, model: nn.Module) -> int:
        """Returns how many columns the logits of a model have; 0 where they are no classes."""
        return (getattr(model, "num_classes", None) or 0) if self.outputs is None else self.outputs


NO_PARTS = Parts()

NAMES = ("model", "dataset", "loss", "optimizer", "metrics", "hooks")
"""What a recipe file may define beside `config`."""


def make_parts(given: Mapping[str, Any]) -> Parts:
    """Returns the parts among the names that a recipe file defines, or a call gives.

    Raises:
      InputError: one is not as expected; the message names it, what came and what was expected.
    """
    sections = (ModelConfig, OptimizerConfig)  # a recipe may give its sections these names
    found = {n: given[n] for n in NAMES if given.get(n) is not None and not isinstance(given[n], sections)}
    model, dataset, optimizer = (found.get(name) for name in ("model", "dataset", "optimizer"))
    if model is not None and not isinstance(model, nn.Module):
        raise InputError(
            f"model is {kind_of(model)}: expected an instance of a flax.linen.Module, called as "
            "model(images, train=True); one of flax.nnx becomes that by flax.nnx.bridge.to_linen(Class, ...)"
        )
    if dataset is not None and not isinstance(dataset, Dataset) and not callable(dataset):
        raise InputError(
            f"dataset is {kind_of(dataset)}: expected resnet_jax.Dataset(train=..., validation=..., test=...), or a "
            "function without arguments that returns one"
        )
    if "loss" in found and not callable(found["loss"]):
        raise InputError(f"loss is {kind_of(found['loss'])}: expected a function (logits, batch) -> float32 [batch]")
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        made = optimizer(optax.constant_schedule(0.1)) if callable(optimizer) else optimizer
        if not isinstance(made, optax.GradientTransformation):
            what = f"a function that returns {kind_of(made)}" if callable(optimizer) else kind_of(optimizer)
            raise InputError(
                f"optimizer is {what}: expected an optax transformation, such as optax.adam(1e-3), or a function that "
                "makes one of the learning rate's schedule"
            )
    metrics = found.get("metrics", {})
    if not isinstance(metrics, Mapping) or not all(map(callable, metrics.values())):
        raise InputError(
            f"metrics is {kind_of(metrics)}: expected a dict from names to functions (logits, batch) -> [batch]"
        )
    if taken := sorted(set(metrics) & set(OUR_METRICS)):
        raise InputError(f"metrics: {', '.join(taken)} is a name of ours; give yours another one")
    hooks = found.get("hooks", ())
    if not isinstance(hooks, list | tuple):
        raise InputError(f"hooks is {kind_of(hooks)}: expected a list of objects, such as [MyHook()]")
    return Parts(**found | {"metrics": dict(metrics), "hooks": tuple(hooks)})


def kind_of(value: object) -> str:
    """Returns what to call a value in a message."""
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    return f"a value of type {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")


def named_after(config: Config, parts: Parts) -> Config:
    """Returns a recipe whose names of model and data are those of the user's own parts.

    Raises:
      InputError: the recipe changes fields of a model that is not named in it.
    """
    if parts.model is not None:
        if fields := model_fields(config.model):
            raise InputError(
                f"model.{next(iter(fields))} has no effect on a model of your own: set it where the model is made"
            )
        for name in ("num_classes", "compute_dtype"):
            if getattr(config.model, name) != getattr(ModelConfig(), name):
                raise InputError(f"model.{name} has no effect on a model of your own: set it where the model is made")
        if config.model.pretrained is not None:
            raise InputError(
                "model.pretrained has no effect on a model of your own: register the model with "
                "resnet_jax.register_model, and give its name"
            )
        config = replace(config, model=replace(config.model, name=type(parts.model).__name__))
    if parts.dataset is not None:
        config = replace(config, data=replace(config.data, dataset=OWN_DATA))
    return config


OWN_DATA = "own"
"""What the recipe of a run says in `data.dataset` where its user brought the data."""


def own_outputs(model: nn.Module, config: Config, classes: int) -> int:
    """Checks that a model of the user's own can be called, and returns the columns of its logits; 0 without classes.

    Args:
      classes: of the data; 0 where its labels are no classes.

    Raises:
      InputError: it has no `train`, cannot be called with the recipe's images, or gives something else than logits.
    """
    images = jax.ShapeDtypeStruct((2, *sides(config.data.image_size), config.data.channels), jnp.float32)
    about = f"model {type(model).__name__}"
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    try:
        logits, variables = jax.eval_shape(partial(model.init_with_output, train=False), keys, images)
    except TypeError as error:
        if "'train'" in str(error):
            raise InputError(
                f"{about} does not take `train`: expected def __call__(self, images, train), where train says whether "
                f"batch statistics and dropout are those of training ({error})"
            ) from error
        raise InputError(f"{about} cannot be called with images {list(images.shape)}: {error}") from error
    except Exception as error:  # of the user's own code
        raise InputError(
            f"{about} cannot be called with images {list(images.shape)}, train=False: {type(error).__name__}: {error}"
        ) from error
    if "params" not in variables:
        raise InputError(f"{about} has no parameters: there is nothing to train")
    apply = partial(model.apply, train=True, mutable=True, rngs={"dropout": keys["dropout"]})
    try:
        jax.eval_shape(apply, variables, images)
    except flax.errors.InvalidRngError as error:
        raise InputError(
            f"{about} draws random numbers from a stream that the training step does not give: use "
            f"self.make_rng('dropout') ({error})"
        ) from error
    except NameError:  # an axis over devices, which the step has
        pass
    except Exception as error:  # of the user's own code
        raise InputError(
            f"{about} cannot be called with images {list(images.shape)}, train=True: {type(error).__name__}: {error}"
        ) from error
    if not classes:
        return 0
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 2:
        found = f"an array {list(shape)}" if shape is not None else kind_of(logits)
        raise InputError(
            f"{about} gives {found} for {list(images.shape)}; the data has {classes} classes, so expected logits "
            f"[2, {classes}]. For other outputs give a loss of your own, and a Dataset with class_names=()"
        )
    if shape[1] < classes:
        raise InputError(f"{about} gives {shape[1]} logits, and the data has {classes} classes")
    return shape[1]


def check_targets(config: Config, parts: Parts, outputs: int, multilabel: bool) -> None:
    """Checks that a loss of the user's own reads `batch["target"]` where the recipe mixes or smooths targets.

    Args:
      outputs: columns of the logits; 0 where they are no classes, and have no targets.
      multilabel: whether images have several labels.

    Raises:
      InputError: it does not, so that the recipe would be without effect, or mix images whose labels stay.
    """
    mixing = {"augment.mixup": config.augment.mixup, "augment.cutmix": config.augment.cutmix}
    asked = [
        name for name, value in (mixing | {"train.label_smoothing": config.train.label_smoothing}).items() if value
    ]
    if parts.loss is None or not asked or not outputs:
        return
    rows = jax.ShapeDtypeStruct((2, outputs), jnp.float32)
    images = jax.ShapeDtypeStruct((2, *sides(config.data.image_size), config.data.channels), jnp.float32)
    label = rows if multilabel else jax.ShapeDtypeStruct((2,), jnp.int32)
    try:
        traced = jax.make_jaxpr(parts.loss)(rows, {"image": images, "label": label, "target": rows}).jaxpr
    except Exception:  # the step says what is wrong with it
        return
    target = traced.invars[-1]
    if target not in traced.outvars and not any(target in equation.invars for equation in traced.eqns):
        raise InputError(
            f"{asked[0]} changes batch['target'] [batch, {outputs}], which your loss does not read: use it in place of "
            "batch['label'], or leave the field out of the recipe"
        )


def names_and_hashes(parts: Parts) -> dict[str, dict[str, str]]:
    """Returns name and hash of the source of each part of the user's own.

    What a function took from around it, and what an instance holds beside its fields, is not seen.
    """
    given: dict[str, Any] = {name: getattr(parts, name) for name in NAMES if name not in ("metrics", "hooks")}
    given |= {f"metrics.{name}": metric for name, metric in parts.metrics.items()}
    found = {}
    for name, part in given.items():
        if part is not None:
            defined = definition_of(part)
            where = without_file(f"{defined.__module__}.{defined.__qualname__}").removeprefix("builtins.")
            where = "a pair of arrays" if name == "dataset" and defined is tuple else where
            found[name] = {"name": where, "source": source_hash(part, defined)}
    return found


def parts_in_words(folder: Path) -> str:
    """Returns which parts the run or sweep in a folder has of its user's own, such as `loss (smooth), model (net.Net)`,
    for which the recipe has no effect; "" where there are none.
    """
    return ", ".join(f"{name} ({part['name']})" for name, part in recorded_parts(folder).items())


def without_file(text: str) -> str:
    """Returns a text without the names of the modules that a script and a recipe file are while they run."""
    return re.sub(r"\b__main__\.|<run_path>\.", "", text)


def same_name(one: str, other: str) -> bool:
    """Returns whether two names can be of the same part: a part of a script or a recipe has no module in its name."""
    one, other = f".{without_file(one)}", f".{without_file(other)}"
    return one.endswith(other) or other.endswith(one)


def definition_of(part: Any) -> Any:
    """Returns the class or function that a part is, or is an instance of."""
    if isinstance(part, partial):
        return definition_of(part.func)
    if isinstance(part, optax.GradientTransformation):
        return part.update
    if isinstance(part, Dataset):
        return type(part.train)
    if hasattr(part, "nnx_class"):  # of flax.nnx.bridge.to_linen
        return part.nnx_class
    return part if isinstance(part, type) or hasattr(part, "__qualname__") else type(part)


def source_hash(part: Any, defined: Any) -> str:
    """Returns a hash of a definition's source, or of its name where there is none or a library defines it, and of the
    fields of a module.
    """
    text = f"{defined.__module__}.{defined.__qualname__}"
    if defined.__module__.partition(".")[0] not in LIBRARIES:
        try:
            text = inspect.getsource(defined)
        except (OSError, TypeError):
            text = source_in_file(defined) or text
    if isinstance(part, nn.Module):
        fields = re.sub(r" at 0x[0-9a-f]+", "", repr(part))
        text += without_file(fields).replace(f"<class '{defined.__module__}.", "<class '")
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


LIBRARIES = ("builtins", "datasets", "flax", "grain", "jax", "numpy", "optax", "resnet_jax")
"""Packages whose source may change from version to version without another part being meant."""


def source_in_file(defined: Any) -> str:
    """Returns the source of a class that a recipe file defines, as `inspect.getsource` does of one in a module, found
    by where its methods are; "" where none of them says.
    """
    for method in vars(defined).values() if inspect.isclass(defined) else ():
        try:
            lines, at = inspect.findsource(inspect.unwrap(method))
            tree = ast.parse("".join(lines))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef) or node.name != defined.__name__:
                continue
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first <= at + 1 <= (node.end_lineno or 0):
                return "".join(inspect.getblock(lines[first - 1 :]))
    return ""


def check_parts(
    folder: Path, parts: Parts, accept: bool = False, needed: Sequence[str] | None = None, what: str = "run"
) -> list[str]:
    """Compares the user's own parts with those that the run in a folder was started with; returns warnings.

    Args:
      accept: take other parts than the run's.
      needed: names of the parts that are compared; None for all.
      what: the folder holds, for the messages: a run or a sweep.

    Raises:
      InputError: a part is missing that the run had, or it is another one; the message says which file is needed.
    """
    before, now = recorded_parts(folder), names_and_hashes(parts)
    if needed is not None:
        before, now = (
            {name: part for name, part in found.items() if name.partition(".")[0] in needed} for found in (before, now)
        )
    if missing := [f"{name} ({part['name']})" for name, part in before.items() if name not in now]:
        given = recipe_given()
        raise InputError(
            f"the {what} in {folder} has parts of its user's own: {', '.join(missing)}. "
            + (f"{given} does not define them. " if given is not None else "")
            + "Give the recipe file that defines them with --config FILE, or from Python the same arguments"
        )
    changed = [
        f"{name} ({part['name']}, now {now[name]['name']})"
        if not same_name(part["name"], now[name]["name"])
        else f"the source of {name} ({part['name']})"
        for name, part in before.items()
        if not same_name(part["name"], now[name]["name"]) or part["source"] != now[name]["source"]
    ]
    changed += [f"{name} ({now[name]['name']}), which was the recipe's" for name in now if name not in before]
    if changed and not accept:
        raise InputError(
            f"the {what} in {folder} was started with other parts: {'; '.join(changed)}. Give those, another "
            "--workdir, or go on all the same with --train.accept_parts"
        )
    return [f"the {what} in {folder} was started with other parts: {part}" for part in changed]


def record_parts(folder: Path, parts: Parts) -> None:
    """Writes which parts are the user's own into the folder of a run or sweep; nothing where there are none."""
    if found := names_and_hashes(parts):
        write_whole(folder / PARTS_FILE, to_json(found, indent=2) + "\n")
