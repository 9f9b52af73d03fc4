"""Matches the classes of data with those of a network: by their names, or by a map that the user brings."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resnet_jax.data.dataset import Dataset, Label, Source, listed
from resnet_jax.files import parse_json, read_file
from resnet_jax.typed import InputError

ClassMap = Mapping[str, str | int]
"""Name of a class of the data -> name or number of a class of the network."""


@dataclass(frozen=True)
class Relabelled:
    """A source whose classes have other numbers: class k is `numbers[k]` of `outputs` classes.

    Attributes:
      multilabel: labels hold a 0 or 1 for each output.
    """

    source: Source
    numbers: tuple[int, ...]
    outputs: int
    multilabel: bool = False

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, Label]:
        raw, label = self.source[index]
        if not self.multilabel:
            return raw, self.numbers[int(label)]  # type: ignore[arg-type]
        ours = (label,) if isinstance(label, int) else tuple(k for k, there in enumerate(label) if there)
        found = {self.numbers[k] for k in ours}
        return raw, tuple(int(i in found) for i in range(self.outputs))

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def key(self, index: int) -> str:
        return self.source.key(index)


def match_classes(
    data: Dataset,
    names: tuple[str, ...],
    where: str,
    *,
    named: bool = True,
    multilabel: bool = False,
    given: ClassMap | None = None,
) -> tuple[Dataset, str]:
    """Returns data with the labels of a network, and a line that says how they were found, "" where they are the same.

    Args:
      data: whose classes are some or all of the network's, in any order.
      names: of the network's outputs.
      where: what the network is called in messages.
      named: the network brings these names; otherwise they are numbers, and as many classes as there are outputs are
        taken in their order.
      multilabel: the network has several labels an image, as the data may have.
      given: a map of `read_class_map`, which decides in place of the names.

    Raises:
      InputError: a class of the data is none of the network's, or an image has several labels and the network one.
    """
    if data.multilabel and not multilabel:
        raise InputError(f"the data has several labels an image, and {where} has one: give data with one label each")
    own = tuple(data.class_names)
    number = {name: i for i, name in enumerate(names)}
    if given is not None:
        numbers = tuple(mapped(name, given, names) for name in own)
        line = "classes: by the given map"
    elif set(own) <= set(number):
        numbers = tuple(number[name] for name in own)
        line = "classes: matched by name"
    elif not named and len(own) == len(names):
        numbers = tuple(range(len(own)))
        line = f"classes: {where} names none, so the data's {len(own):,} are taken in their order"
    else:
        unknown = [name for name in own if name not in number]
        near = {n for name in unknown[:3] for n in difflib.get_close_matches(name, names, 1)}
        hint = f"; did you mean {', '.join(sorted(near))}" if near else ""
        raise InputError(
            f"{listed(unknown)}: no such class among the {len(names):,} of {where} ({listed(names)}){hint}. Leave "
            "these pictures out, or say with --classes FILE which class they are"
        )
    outputs = len(names)
    splits: Any = {name: Relabelled(source, numbers, outputs, multilabel) for name, source in data.splits().items()}
    same = numbers == tuple(range(outputs))
    if len(set(numbers)) < outputs:
        line += f"; the data has {len(set(numbers)):,} of the {outputs:,} classes"
    elif numbers != tuple(sorted(numbers)):
        line += "; the data has them in another order"
    elif same and named and given is None:
        line = ""
    return replace(data, class_names=names, multilabel=multilabel, **splits), line


def mapped(name: str, given: ClassMap, names: tuple[str, ...]) -> int:
    """Returns the number of the network's class that a map gives for a class of the data.

    Raises:
      InputError: the map lacks the class, or gives what is no class of the network.
    """
    if name not in given:
        raise InputError(f"--classes lacks {name}, a class of the data; it has {listed(list(given))}")
    value = given[name]
    if value in names:
        return names.index(str(value))
    if isinstance(value, int) or value.isdecimal():
        if 0 <= int(value) < len(names):
            return int(value)
        raise InputError(f"--classes gives {name} the number {value}; the network has 0 to {len(names) - 1}")
    raise InputError(f"--classes gives {name} the class {value!r}, which the network lacks; it has {listed(names)}")


def read_class_map(file: Path) -> ClassMap:
    """Reads which class of a network each class of data is, from a file that the user brings.

    JSON: an object `{"folder": number or name}`, a list of the folders in the order of the network's classes, or
    `{"0": ["folder", "name"], ...}` as Keras's `imagenet_class_index.json` has it. Other files are text: a line for
    each folder, alone in the order of the network's classes, or followed by a tab, a comma or a space and number or
    name.

    Raises:
      InputError: the file cannot be read, or is not of this form; the message says where.
    """
    data = read_given(file, "--classes")
    if file.suffix == ".json":
        found = parse_json(data, Any, f"--classes {file}")
        if isinstance(found, list) and all(isinstance(name, str) for name in found):
            return {name: i for i, name in enumerate(found)}
        if isinstance(found, dict) and found:
            values = list(found.values())
            if all(isinstance(value, list) and value and isinstance(value[0], str) for value in values):
                if all(map(str.isdecimal, found)):
                    return {value[0]: int(number) for number, value in found.items()}
            elif all(isinstance(value, str | int) and not isinstance(value, bool) for value in values):
                return found
        raise InputError(
            f"--classes {file}: expected an object of folder: number or name, or a list of folders in the order of the "
            "network's classes"
        )
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"--classes {file} is no text in UTF-8: {error}") from error
    parts = [re.split(r"\t", line) if "\t" in line else re.split(r"\s*,\s*|\s+", line) for line in lines]
    if all(len(words) == 1 for words in parts):
        found = {line: i for i, line in enumerate(lines)}
    else:
        if wrong := [line for line, words in zip(lines, parts, strict=True) if len(words) != 2]:
            raise InputError(f"--classes {file}: expected a folder and a class in each line, and there is {wrong[0]!r}")
        found = {words[0].strip(): words[1].strip() for words in parts}
    if len(found) != len(lines) or not lines:
        raise InputError(f"--classes {file}: {'a folder is there twice' if lines else 'it is empty'}")
    return found


def read_real_labels(file: Path) -> tuple[frozenset[int], ...]:
    """Reads ReaL labels (Beyer et al. 2020, arXiv:2006.07159): the numbers of the valid classes of each validation
    image, in the order of the files' names; none where an image has no valid label and does not count.

    Raises:
      InputError: the file cannot be read, or is no JSON list of lists of numbers.
    """
    found = parse_json(read_given(file, "--real"), list[list[int]], f"--real {file}")
    return tuple(map(frozenset, found))


def read_given(file: Path, flag: str) -> bytes:
    """Returns the content of a file that a flag names.

    Raises:
      InputError: it cannot be read.
    """
    try:
        return read_file(file)
    except OSError as error:
        raise InputError(f"{flag} {file} cannot be read: {error.strerror or error}") from error
