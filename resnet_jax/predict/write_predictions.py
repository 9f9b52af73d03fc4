"""Writes predictions: rows as a table, JSON or CSV, and pictures under their heat map (Grad-CAM)."""

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from resnet_jax.data.fingerprint import find_file, load_fingerprint
from resnet_jax.files import path_of

Row = tuple[Path, list[tuple[str, float]]]
"""A picture, and its classes with their probabilities."""


class RightInFolders:
    """Counts which predictions are right, of pictures in folders that are named after a class of the network.

    Pictures that the run was trained on are left out, which a line says. They are known by their names, unless most of
    those whose size the run noted have another size now: then they are others.

    Attributes:
      right, count: pictures so far, by the split of the run that held them; `""` where none did.
    """

    def __init__(self, predictor: Any, source: str, paths: Sequence[str]) -> None:
        """Takes the predictor, where it came from, and the paths that were asked for: nothing is counted where none of
        them is a folder, or the network has one output, which is the probability of one class.

        Raises:
          InputError: the source is a run, and its file that names the pictures is damaged.
        """
        self.right, self.count, self.same = Counter[str](), Counter[str](), Counter[bool]()
        asked = any(os.path.isdir(os.path.expanduser(path)) for path in paths)
        asked = asked and not predictor.multilabel and len(predictor.class_names) > 1  # one output is always the first
        self.names = predictor.class_names if asked else ()
        folder = path_of(source, "SOURCE")
        self.known = load_fingerprint(folder) if asked and folder.is_dir() else None

    def add(self, path: Path, row: Any) -> None:
        """Adds a picture and its probabilities [classes]."""
        if path.parent.name in self.names:
            split, same = find_file(self.known or {}, path)
            self.count[split] += 1
            self.right[split] += self.names[int(row.argmax())] == path.parent.name
            if same is not None:
                self.same[same] += 1

    def line(self) -> str:
        """Returns a line with the accuracy, its interval, and what to know of it; empty where no folder is named after
        a class.
        """
        from resnet_jax.training.metrics import wilson

        if not self.count.total():
            return ""
        strangers = self.same[False] > self.same[True]
        trained, selecting = (0 if strangers else self.count[split] for split in ("train", "validation"))
        count = self.count.total() - trained
        if not count:
            return f"no accuracy: the run was trained on all {trained:,} pictures in folders of classes, by their names"
        share = (self.right.total() - (self.right["train"] if trained else 0)) / count
        low, high = wilson(share, count)
        interval = f"[{low * 100:.2f}, {high * 100:.2f}]"
        rows = [f"accuracy {share:.2%} {interval} on {count} pictures in folders of classes, at 95 % confidence"]
        if trained:
            rows.append(f"{trained:,} more are not counted: by their names, the run was trained on them")
        if selecting:
            rows.append(f"{selecting:,} of those counted are the run's validation pictures, by which it was selected")
        if self.known is None:
            rows.append("which pictures the network was trained on is not known here: it may be these")
        return "; ".join(rows)


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


def draw_cam(predictor: Any, path: Path, label: int, probability: float, file: Path) -> None:
    """Writes a picture in its own size and beside it the same picture, coloured by what speaks for a class; below them
    the class with its probability, and that there is no evidence where nothing in the picture speaks for it.
    """
    import jax.numpy as jnp
    import numpy as np
    from PIL import Image, ImageDraw

    from resnet_jax.data.decode import decode
    from resnet_jax.data.show import as_shown, overlay, side_by_side, sized
    from resnet_jax.data.transforms import part_seen
    from resnet_jax.predict.gradcam import grad_cam

    seen, look = predictor.prepare(str(path)), predictor.preprocessing
    (heat,) = grad_cam(predictor.model, predictor.variables, predictor.normalized([seen]), jnp.asarray([label]))
    picture = as_shown(np.asarray(decode(str(path), predictor.channels)))
    shown = sized(picture)
    y, x = shown.shape[0] / picture.shape[0], shown.shape[1] / picture.shape[1]
    part = part_seen(picture.shape[:2], look.eval_image_size, look.eval_crop)
    left, top, right, bottom = (round(edge * scale) for edge, scale in zip(part, (x, y, x, y), strict=True))
    coloured = overlay(shown, np.asarray(heat), (left, top, right, bottom))
    name = predictor.class_names[label]
    lines = [f"{name} {100 * probability:.1f} %"]
    if not np.any(heat):
        lines.append(f"Grad-CAM: no evidence, nothing in the picture speaks for {name}")
    if (left, top, right, bottom) != (0, 0, coloured.width, coloured.height):
        ImageDraw.Draw(coloured).rectangle((left, top, right - 1, bottom - 1), outline="white")
        lines.append("frame: what the network sees")
    side_by_side(Image.fromarray(shown), coloured, lines).save(file)
