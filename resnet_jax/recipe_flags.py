"""The recipe as flags of a command line: what they change, how they may be written, and the check of the result."""

import ast
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, make_dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from resnet_jax.config import Config
from resnet_jax.recipe_files import starting_recipe
from resnet_jax.typed import InputError


def recipe_to_change(arguments: Sequence[str]) -> Config:
    """Returns the recipe over which the flags of a command line are laid.

    A length in epochs that a flag gives takes the place of one in steps that the recipe gives, and the model of weights
    that a flag gives that of the recipe's model.

    Raises:
      InputError: the recipe is not as it must be.
    """
    recipe = starting_recipe(value_of("--config", arguments), value_of("--workdir", arguments))
    named = {word.partition("=")[0] for word in arguments}
    if "--train.epochs" in named and "--train.steps" not in named:
        recipe = replace(recipe, train=replace(recipe.train, steps=None))
    if value_of("--model.pretrained", arguments) not in (None, "None") and "--model.name" not in named:
        recipe = replace(recipe, model=replace(recipe.model, name=None))
    return recipe


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """Returns what a command line gives a flag, the last where it does so more than once; None where it does not."""
    found = None
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        if word == flag:
            found = following
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def spelt_out(arguments: Sequence[str]) -> list[str]:
    """Turns `--section.field True` into `--section.field`, `... False` into `--section.no_field`, and `--finetune MODE`
    into `--finetune.mode MODE`.
    """
    result: list[str] = []
    for word in arguments:
        if word == "--finetune":
            result.append("--finetune.mode")
        elif word in ("True", "False") and result and result[-1].startswith("--"):
            if word == "False":
                section, _, name = result.pop().rpartition(".")
                result.append(f"{section}.no_{name}")
        else:
            result.append(word)
    return result


def with_values(arguments: Sequence[str]) -> list[str]:
    """Gives the switches of a recipe that may be None a value, `True` or `False`, as tyro needs it."""
    result: list[str] = []
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag = word.replace("-", "_").replace("__", "--", 1)
        if flag in OPEN_SWITCHES and following not in ("True", "False", "None"):
            result += [flag, "True"]
        elif flag.replace(".no_", ".", 1) in OPEN_SWITCHES and ".no_" in flag:
            result += [flag.replace(".no_", ".", 1), "False"]
        else:
            result.append(word)
    return result


OPEN_SWITCHES = frozenset(
    f"--{section}.{name}"
    for section, kind in get_type_hints(Config).items()
    for name, hint in get_type_hints(kind).items()
    if hint == bool | None
)


def without_checks(section: type) -> type:
    """Returns a section of the recipe whose values are not checked. tyro builds these, since it prints an error of a
    check in words of its own.
    """
    return type(section.__name__, (section,), {"__doc__": section.__doc__, "__post_init__": lambda self: None})


Recipe = make_dataclass(
    "Recipe", [(name, without_checks(kind)) for name, kind in get_type_hints(Config).items()], frozen=True
)


COMMON = {
    "model": ("name", "pretrained"),
    "data": ("dataset", "image_size", "workers"),
    "augment": ("crop", "flip", "mixup"),
    "optimizer": ("name", "learning_rate", "weight_decay"),
    "schedule": ("warmup_epochs",),
    "finetune": ("mode",),
    "train": ("epochs", "batch_size", "seed", "patience"),
    "parallel": ("devices", "strategy"),
}
"""Fields that `--help` shows; `--help-all` shows all."""


def with_common_flags(section: str, kind: type) -> type:
    """Returns a section of the recipe of which `--help` shows the fields in `COMMON` alone, each in a sentence."""
    common, hints, docs = COMMON.get(section, ()), get_type_hints(kind), docs_of_fields(kind.__base__)
    shown = {
        f.name: Annotated[hints[f.name], tyro.conf.arg(help=re.split(r"(?<!al)\. ", docs[f.name])[0].rstrip(".") + ".")]
        if f.name in common
        else Annotated[hints[f.name], tyro.conf.Suppress]
        for f in fields(kind)
    }
    return dataclass(frozen=True)(type(kind.__name__, (kind,), {"__doc__": " ", "__annotations__": shown}))


def docs_of_fields(section: Any) -> dict[str, str]:
    """Returns the docstring of each field of a section, as it stands below it in `config.py`, on one line."""
    whole: Any = ast.parse(inspect.getsource(section)).body[0]
    documented: Any = [(field, below) for field, below in pairwise(whole.body) if isinstance(field, ast.AnnAssign)]
    return {field.target.id: " ".join(below.value.value.split()) for field, below in documented}


ShortRecipe = make_dataclass(
    "Recipe",
    [(name, with_common_flags(name, without_checks(kind))) for name, kind in get_type_hints(Config).items()],
    frozen=True,
)
"""The recipe for a command's `--help`."""


def unchecked(config: Config, kind: Any = Recipe) -> Any:
    """Returns a recipe as one whose values are not checked."""
    return kind(**{f.name: f.type(**vars(getattr(config, f.name))) for f in fields(kind)})  # type: ignore[operator]


VARIED_TEXTS = ("model.name", "model.pretrained", "parallel.batch_norm")
"""Fields that take any text and whose commas separate values."""


def take_varied(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """Takes the flags with several values, such as `--train.seed 0..4` and `--optimizer.learning_rate 0.05,0.1`, out of
    a command line; returns what is left, and the values by `section.field`.

    Raises:
      InputError: a range is none of whole numbers, or too long.
    """
    left: list[str] = []
    varied: dict[str, list[Any]] = {}
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not (flag.startswith("--") and name in VARIABLE) or (not equals and not waiting):
            left.append(word)
            continue
        given = value if equals else waiting[0]
        if "," not in given and ".." not in given:
            left.append(word)
            continue
        if not equals:
            waiting.pop(0)
        varied[name] = values_in(name, given)
    return left, varied


def values_in(name: str, given: str) -> list[Any]:
    """Returns the values of a comma list, whose parts may be ranges `a..b` of whole numbers, both ends included.

    Raises:
      InputError: a part is empty, or no range.
    """
    found: list[Any] = []
    for part in given.split(","):
        first, dots, last = part.strip().partition("..")
        if not dots:
            if not first:
                raise InputError(f"--{name} {given}: a value is missing between two commas, or at an end")
            found.append(value_in(first))
            continue
        ends = [int(end) if re.fullmatch(r"-?[0-9]{1,10}", end) else None for end in (first, last)]
        if ends[0] is None or ends[1] is None or not 0 <= ends[1] - ends[0] < MOST_VALUES:
            raise InputError(
                f"--{name} {part}: give a range of whole numbers that rises, such as 0..4 for 0, 1, 2, 3 and 4"
            )
        found += range(ends[0], ends[1] + 1)
    return found


MOST_VALUES = 10_000
"""Values of a range."""


def value_in(text: str) -> Any:
    """Returns the number, True, False or None that a text names, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


VARIABLE = frozenset(
    f"{section}.{name}"
    for section, kind in get_type_hints(Config).items()
    for name, hint in get_type_hints(kind).items()
    if not {"tuple", "str"} & {getattr(get_origin(part) or part, "__name__", "") for part in (hint, *get_args(hint))}
    or f"{section}.{name}" in VARIED_TEXTS
)
"""Fields of which a flag may give several values."""


CALLED = {
    "lr": "optimizer.learning_rate",
    "wd": "optimizer.weight_decay",
    "model": "model.name",
    "data": "data.dataset",
    "optimizer": "optimizer.name",
    "schedule": "schedule.name",
    "lr_schedule": "schedule.name",
    "warmup": "schedule.warmup_epochs",
    "batch": "train.batch_size",
    "size": "data.image_size",
    "img_size": "data.image_size",
    "smoothing": "train.label_smoothing",
    "ema": "train.ema_decay",
    "output": "workdir",
    "out": "workdir",
    "resume": "workdir",
}
"""What others call a flag -> our flag."""


def check_names(arguments: Sequence[str], own: Sequence[str]) -> None:
    """Checks that flags without a section are a command's own.

    Args:
      own: the names of these.

    Raises:
      InputError: one is not; the message names the flag that is meant, where there is one.
    """
    sections = {name: [f.name for f in fields(kind)] for name, kind in get_type_hints(Config).items()}
    for word in arguments:
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        section, dot, name = name.rpartition(".")
        if dot and (name in sections.get(section, ()) or name not in CALLED):
            continue
        if not word.startswith("--") or name in (*own, "help", "finetune") or name.startswith("tyro"):
            continue
        meant = [f"{section}.{name}" for section, names in sections.items() if name in names]
        meant = [CALLED[name]] if name in CALLED else meant
        if meant:
            raise InputError(f"there is no --{section}{dot}{name}: give {' or '.join(f'--{flag}' for flag in meant)}")


def checked(recipe: Any) -> Config:
    """Returns the recipe that flags have given.

    Raises:
      InputError: it is impossible.
    """
    kinds = get_type_hints(Config)
    return Config(**{name: kinds[name](**vars(section)) for name, section in vars(recipe).items()})
