"""How predictions are written: rows as a table, JSON or CSV, and pictures of where the network looked."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = tuple[Path, list[tuple[str, float]]]
"""A picture, and its classes with their probabilities."""


def as_table() -> Callable[[Row], None]:
    """Writes rows for the eye."""
    return lambda row: print(f"{row[0]}   " + "   ".join(f"{name} {p:.2%}" for name, p in row[1]), flush=True)


def as_json() -> Callable[[Row], None]:
    """Writes one JSON object a line: `path`, `classes` with `name` and `probability`."""

    def write(row: Row) -> None:
        classes = [{"name": name, "probability": p} for name, p in row[1]]
        print(json.dumps({"path": str(row[0]), "classes": classes}), flush=True)

    return write


def as_csv() -> Callable[[Row], None]:
    """Writes comma-separated values: path, rank from 1, class, probability."""
    writer = csv.writer(sys.stdout)
    writer.writerow(["path", "rank", "class", "probability"])
    return lambda row: writer.writerows([str(row[0]), i, name, p] for i, (name, p) in enumerate(row[1], start=1))


WRITERS: dict[str, Callable[[], Callable[[Row], None]]] = {"table": as_table, "json": as_json, "csv": as_csv}


def draw_cam(predictor: Any, path: Path, label: int, file: Path) -> None:
    """Writes the picture as the network sees it, coloured by what speaks for a class."""
    import jax.numpy as jnp
    import numpy as np

    from resnet_jax.data.show import overlay
    from resnet_jax.predict.gradcam import grad_cam

    seen = predictor.prepare(str(path))
    (heat,) = grad_cam(predictor.model, predictor.variables, predictor.normalized([seen]), jnp.asarray([label]))
    overlay(seen, np.asarray(heat)).save(file)
