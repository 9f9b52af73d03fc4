"""Values that users and files give, as the types that are expected of them; else an InputError says which is wrong."""

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DISTRIBUTION = "residual-jax"
"""What pip installs this package by."""


class InputError(ValueError):
    """Something the user gave is wrong; the message names it and the remedy. Commands end with status 2.

    Example:
      >>> try:
      ...     rj.create_model("resnet05")
      ... except rj.InputError as error:
      ...     print(str(error)[:33])
      no model is called 'resnet05'; di
    """


def require(right: bool, message: str) -> None:
    """Raises InputError with this message where something is not right."""
    if not right:
        raise InputError(message)


@contextmanager
def from_extra(extra: str, what: str) -> Iterator[None]:
    """Names what to install where an import in its block finds no module.

    Args:
      extra: that of `pyproject.toml` which has the module.
      what: what needs it, as in "the report".

    Raises:
      InputError: a module of another package is missing.
    """
    try:
        yield
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "resnet_jax"):
            raise
        raise InputError(f'{what} needs the package {missing}: pip install "{DISTRIBUTION}[{extra}]"') from error


GREATEST = 2**63
"""Whole numbers from JSON lie below it."""


def typed(value: Any, kind: Any, where: str) -> Any:
    """Returns a value as a type: lists become tuples where it says so, whole numbers floats.

    Args:
      kind: None, bool, int, float (finite), str, Any, Literal, a union, tuple, list, dict, a dataclass (absent fields
        have their defaults, unknown ones are wrong), or a TypedDict (further keys are kept as they are).
      where: what the value is called in the message.

    Raises:
      InputError: the value is something else; the message names the innermost part that is wrong.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, arguments, where)
    if origin is typing.Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
        raise InputError(f"{where} is {shown(value)}; it must be one of {', '.join(map(str, arguments))}")
    if origin in (tuple, list):
        return _sequence(value, origin, arguments, where)
    if origin is dict:
        _expect(isinstance(value, dict), value, "an object", where)
        return {key: typed(item, arguments[1], f"{where}.{shown_name(key)}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return _fields(value, kind, where)
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _expect(number and abs(value) <= sys.float_info.max, value, "a finite number", where)
        return float(value)
    if kind is int:
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < GREATEST
        _expect(whole, value, "a whole number of at most 63 bits", where)
        return value
    kind = type(None) if kind is None else kind
    _expect(isinstance(value, kind), value, NAMES.get(kind, kind.__name__), where)
    return value


NAMES = {str: "a text", bool: "true or false", type(None): "null"}


def shown(value: Any) -> str:
    """Returns a value as a message shows it, short whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= GREATEST:
        return "a whole number of more than 63 bits"
    if isinstance(value, dict | list | tuple):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def shown_name(name: str) -> str:
    """Returns a key as a message shows it."""
    return name if name.isidentifier() and len(name) <= 80 else shown(name)


def check_limits(number: float, limits: str, name: str) -> None:
    """Raises InputError where a number, or what is no number, is not within limits such as `[0, 1)`."""
    low, high = (float(end) for end in limits[1:-1].split(", "))
    large_enough = number >= low if limits[0] == "[" else number > low
    if large_enough and (number <= high if limits[-1] == "]" else number < high):
        return
    if low < 0 or high < 1_000_000:
        bound = f"lie between {low:g} and {high:g}" if limits[0] + limits[-1] == "()" else f"lie in {limits}"
    elif large_enough and number != math.inf:
        bound = f"be at most {high:.0f}"
    else:
        bound = f"be {'at least' if limits[0] == '[' else 'above'} {low:g}"
    raise InputError(f"{name} must {bound}, and is {shown(number)}")


def _expect(right: bool, value: Any, what: str, where: str) -> None:
    if not right:
        raise InputError(f"{where} is {shown(value)}; it must be {what}")


def _one_of(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    problems = []
    for kind in kinds:
        try:
            return typed(value, kind, where)
        except InputError as error:
            if not str(error).startswith(f"{where} is "):
                raise  # the kind is right, and something within it is wrong
            problems.append(str(error).rpartition("; it must be ")[2])
    raise InputError(f"{where} is {shown(value)}; it must be {' or '.join(dict.fromkeys(problems))}")


def _sequence(value: Any, origin: Any, arguments: tuple[Any, ...], where: str) -> Any:
    _expect(isinstance(value, list | tuple), value, "a list", where)
    if origin is list or arguments[1:] == (...,):
        kinds: tuple[Any, ...] = (arguments[0],) * len(value)
    else:
        kinds = arguments
    _expect(len(value) == len(kinds), value, f"a list of {len(kinds)}", where)
    return origin(typed(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True)))


def _fields(value: Any, kind: Any, where: str) -> Any:
    _expect(isinstance(value, dict), value, "an object with fields", where)
    hints = typing.get_type_hints(kind)
    inner = "" if where == "the recipe" else f"{where}."
    found = {name: typed(value[name], hint, f"{inner}{name}") for name, hint in hints.items() if name in value}
    further = [name for name in value if name not in hints]
    if typing.is_typeddict(kind):
        needed = set(kind.__required_keys__)
        result: Any = found | {name: value[name] for name in further}
    else:
        if further:
            raise InputError(f"{where} has unknown fields: {', '.join(inner + shown_name(name) for name in further)}")
        empty = dataclasses.MISSING
        needed = {f.name for f in dataclasses.fields(kind) if f.default is empty and f.default_factory is empty}
        result = None
    if missing := sorted(needed - set(found)):
        raise InputError(f"{where} has no {', '.join(missing)}")
    return kind(**found) if result is None else result
