"""What `check` finds, collects and returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import flax.linen as nn
import numpy as np

from resnet_jax.training.optimizers import Rules
from resnet_jax.training.state import SOWN, PyTree

Shape: TypeAlias = tuple[int, int, int]
"""Height, width, channel of an image."""

CHECKS = {
    "call": "it is called as (images, train), and can be traced",
    "output": "it returns one array of floats, a row for each image, and no probabilities",
    "shape": "no shape depends on the size of the batch",
    "dtype": "parameters, statistics and outputs are float32",
    "decay": "a decay rule covers every parameter",
    "collections": "training updates the running statistics, where the state carries them",
    "train": "what should differ in training does",
    "key": "its variables are a function of the key alone",
    "pure": "the same call gives the same result",
    "finite": "outputs and gradients are finite",
    "gradients": "a gradient reaches every parameter",
    "evaluation": "the result for an image does not depend on the rest of the batch, nor on chance",
    "jit": "jit gives what a call without jit gives",
    "devices": "one device gives what several give",
    "shard_map": "shard_map gives what jit gives",
    "resume": "a state that was stored and read goes on bit by bit",
    "bfloat16": "bfloat16 gives the same in evaluation, within its rounding",
}
"""Name of a check -> what it shows, in the order of the table."""

WAITS = "waits until what was found is mended"


@dataclass(frozen=True)
class Finding:
    """Says what is wrong with a module.

    Attributes:
      check: name of the check, one of `CHECKS`.
      where: paths of parameters, statistics or modules, such as `stage1/conv`; the module's class for itself.
      problem: what is wrong.
      remedy: what to do.
    """

    check: str
    where: tuple[str, ...]
    problem: str
    remedy: str

    def __str__(self) -> str:
        places = ", ".join(self.where[:5]) + (f" and {len(self.where) - 5} more" if len(self.where) > 5 else "")
        return f"{self.check}, at {places}:\n     {self.problem};\n     {self.remedy}"


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; `str` of it is a table.

    Attributes:
      module: name of its class.
      image_shape: height, width, channel.
      findings: what is wrong; empty for a sound module.
      left_out: check -> why it was not made.
      parameters: number of trainable values; None where the module cannot be traced.
      gmacs: 10**9 multiply-adds of convolutions and products for one image.
      devices: how many there were, at most eight of them used.
      batch_size: images of the training step that was compiled.
      compile_seconds: to trace and compile that step on one device.
      memory: bytes that it needs at its largest, arguments and results included, where XLA tells.
    """

    module: str
    image_shape: Shape
    findings: tuple[Finding, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    parameters: int | None = None
    gmacs: float | None = None
    devices: int = 1
    batch_size: int = 0
    compile_seconds: float | None = None
    memory: int | None = None

    @property
    def ok(self) -> bool:
        """Returns whether nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        figures = [f"{self.module}, images {' x '.join(map(str, self.image_shape))}"]
        if self.parameters is not None and self.gmacs is not None:
            figures.append(f"{self.parameters:,} parameters, {self.gmacs:.3g} GMACs an image")
        if self.compile_seconds is not None:
            memory = "" if self.memory is None else f", {self.memory / 2**20:,.1f} MiB"
            figures.append(
                f"training step of {self.batch_size} images: compiled in {self.compile_seconds:.1f} s{memory}"
            )
        found = [finding.check for finding in self.findings]
        rows = []
        for name, what in CHECKS.items():
            result = "FOUND" if name in found else "left out" if name in self.left_out else "ok"
            reason = f" ({self.left_out[name]})" if result == "left out" else ""
            rows.append(f"  {result:<10}{name:<13}{what}{reason}")
        problems = [f"{i}. {finding}" for i, finding in enumerate(self.findings, 1)]
        return "\n".join([*figures, *rows, *problems, f"{len(problems) or 'no'} finding{'s' * (len(problems) != 1)}"])


@dataclass(frozen=True)
class Case:
    """What is checked: the module with `dtype` float32, where it has that field, and as it was given."""

    module: nn.Module
    given: nn.Module
    image_shape: Shape
    rules: Rules
    seed: int
    devices: int
    size: int

    @property
    def name(self) -> str:
        """Returns the module's class."""
        return type(self.given).__name__

    def images(self, seed: int) -> np.ndarray:
        """Returns images of normal random numbers, float32 [size, height, width, channel]; the last one is black, 0."""
        images = np.random.default_rng([self.seed, seed]).normal(size=(self.size, *self.image_shape))
        images[-1] = 0
        return images.astype(np.float32)


@dataclass
class Notes:
    """Collects what becomes a `CheckReport`."""

    case: Case
    findings: list[Finding] = field(default_factory=list)
    made: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, checks: str, findings: Sequence[Finding]) -> bool:
        """Notes that checks, named with spaces between them, were made and what they found; returns whether it was
        nothing.
        """
        self.made |= set(checks.split())
        for finding in findings:
            if finding.check not in {known.check for known in self.findings}:
                self.findings.append(finding)
        return not findings

    def report(self) -> CheckReport:
        case, found = self.case, {finding.check for finding in self.findings}
        waiting = {name: WAITS for name in CHECKS if name not in self.made}
        left_out = {name: why for name, why in (waiting | self.left_out).items() if name not in found}
        return CheckReport(
            case.name,
            case.image_shape,
            tuple(self.findings),
            left_out,
            devices=case.devices,
            batch_size=case.size,
            **self.figures,
        )


def carried(variables: PyTree) -> PyTree:
    """Returns the collections of a module's variables that a state carries."""
    return {name: values for name, values in variables.items() if name not in SOWN}


def has_field(module: nn.Module, name: str) -> bool:
    """Returns whether a module's class has a field of that name."""
    return name in type(module).__dataclass_fields__
