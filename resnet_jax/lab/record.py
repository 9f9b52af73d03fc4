"""Writes what an experiment leaves: rows as JSON and CSV, a figure as PNG and SVG, and its finished parts."""

import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from resnet_jax.files import write_whole
from resnet_jax.runs.folder import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
"""A table: each row maps names of columns to values that JSON can hold."""


@dataclass(frozen=True)
class Options:
    """The options of an experiment on the command line; None leaves the choice to the experiment.

    Attributes:
      dataset: `digits`, or any `data.dataset` of a recipe, at 32 x 32 pixels.
      depths: weighted layers of the networks.
      seeds: one training is run for each.
      quick: run the smallest version that still shows the effect.
    """

    dataset: str = "digits"
    depths: tuple[int, ...] | None = None
    seeds: tuple[int, ...] | None = None
    quick: bool = False


class Notebook:
    """Keeps the finished parts of an experiment in a folder, so that one that was stopped goes on with the next part.

    Args:
      folder: is created if missing.
      name: of the experiment.
      options: parts made with other options are not reused.

    Raises:
      OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, name: str, options: Options) -> None:
        self.folder, self.options = folder, options
        self._salt = f"{name} {json.dumps(asdict(options))}"
        (folder / "parts").mkdir(parents=True, exist_ok=True)

    def part(self, name: str, make: Callable[[], Rows]) -> Rows:
        """Returns the rows of a part, read from the folder, or made by `make` and written there."""
        digest = hashlib.sha256(f"{self._salt} {name}".encode()).hexdigest()[:16]
        path = self.folder / "parts" / f"{digest}.json"
        if path.exists():
            return json.loads(path.read_text())["rows"]
        print(f"  {name} ...", flush=True)
        began = time.perf_counter()
        rows = make()
        write_whole(path, json.dumps({"part": name, "rows": rows}))
        print(f"  {name}: {time.perf_counter() - began:.0f} s", flush=True)
        return rows


def save(folder: Path, name: str, options: Options, rows: Rows, figure: "Figure", seconds: float) -> dict[str, Any]:
    """Writes `<name>.json`, `.csv`, `.png` and `.svg` into a folder; returns the record, which is the JSON's content.

    Args:
      folder: where to write.
      name: of the experiment.
      options: that it was run with.
      rows: what it measured.
      figure: a `matplotlib.figure.Figure`.
      seconds: how long it took.
    """
    words = [Path(word).name if "/" in word else word for word in sys.argv[2:]]  # folders without their paths
    record = {
        "name": name,
        "command": " ".join(["resnet-jax", "lab", *words]),
        "options": asdict(options),
        "commit": commit(),
        "hardware": f"{len(jax.devices())} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": versions(),
        "seconds": round(seconds, 1),
        "rows": rows,
    }
    write_whole(folder / f"{name}.json", json.dumps(record) + "\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    save_figure(folder, name, figure)
    return record


def save_figure(folder: Path, name: str, figure: "Figure") -> None:
    """Writes a figure as `<name>.png` and `.svg` into a folder."""
    figure.savefig(folder / f"{name}.png", dpi=110)
    figure.savefig(folder / f"{name}.svg")


def commit() -> str | None:
    """Returns the short hash of the checkout's commit; None where this package is not in a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
