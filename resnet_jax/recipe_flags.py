"""The recipe as flags of a command line: what they change, how they may be written, and the check of the result."""

from collections.abc import Sequence
from dataclasses import fields, make_dataclass, replace
from typing import Any, get_type_hints

from resnet_jax.config import Config
from resnet_jax.recipe_files import starting_recipe


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
        section, _, name = word.removeprefix("--").rpartition(".")
        if word in OPEN_SWITCHES and following not in ("True", "False", "None"):
            result += [word, "True"]
        elif name.startswith("no_") and f"--{section}.{name.removeprefix('no_')}" in OPEN_SWITCHES:
            result += [f"--{section}.{name.removeprefix('no_')}", "False"]
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


def unchecked(config: Config) -> Any:
    """Returns a recipe as one whose values are not checked."""
    return Recipe(**{f.name: f.type(**vars(getattr(config, f.name))) for f in fields(Recipe)})  # type: ignore[operator]


def checked(recipe: Any) -> Config:
    """Returns the recipe that flags have given.

    Raises:
      InputError: it is impossible.
    """
    kinds = get_type_hints(Config)
    return Config(**{name: kinds[name](**vars(section)) for name, section in vars(recipe).items()})
