"""What the `resnet-jax` command does with weights: predict, export, models."""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from resnet_jax.config import InputError, local_path, path_of
from resnet_jax.files import in_bucket

CHECKPOINT_HELP = "of a run: best, latest or a step; by default the best one where the run selected one"

Row = tuple[Path, list[tuple[str, float]]]


MOST_AT_ONCE = 65_536
"""Pictures of a batch."""


def predict_command(arguments: Sequence[str]) -> int:
    """`resnet-jax predict`."""
    parser = argparse.ArgumentParser(prog="resnet-jax predict", description="Says which class pictures belong to.")
    parser.add_argument("source", help="the folder of a run, a tag, a file: all that --model.pretrained takes")
    parser.add_argument("paths", nargs="+", help="files, folders, or patterns such as 'a/*.jpg'")
    parser.add_argument(
        "--top",
        type=int,
        help="how many classes of each picture to print; by default one, or with several labels those it has",
    )
    parser.add_argument("--flip", action="store_true", help="look at each picture mirrored too, and take the mean")
    parser.add_argument("--format", choices=tuple(WRITERS), default="table", help="json is one object a line")
    parser.add_argument("--cam", help="a folder for pictures of where the network looked (Grad-CAM)")
    parser.add_argument("--batch", type=int, default=32, help="pictures that go through the network at once")
    parser.add_argument("--name", help="the model, where the source does not say")
    parser.add_argument("--checkpoint", help=CHECKPOINT_HELP)
    options = parser.parse_args(arguments)
    if (options.top is not None and options.top < 1) or not 1 <= options.batch <= MOST_AT_ONCE:
        raise InputError(f"--top and --batch must be at least 1, and --batch at most {MOST_AT_ONCE}")
    path_of(options.source, "SOURCE")
    cam = None if options.cam is None else local_path(options.cam, "--cam")
    if cam and cam.exists() and not cam.is_dir():
        raise InputError(f"--cam {cam} is a file: name a folder")
    from rich.console import Console
    from rich.progress import Progress

    from resnet_jax.models.vit import ViT
    from resnet_jax.predict.predictor import NOT_FINITE, Predictor, find_files, predict_files

    paths = list(find_files(options.paths))
    predictor = Predictor.from_source(options.source, options.name, options.flip, options.checkpoint)
    if cam and isinstance(predictor.model, ViT):
        raise InputError("--cam needs a network with maps, and a transformer has none")
    if cam:
        cam.mkdir(parents=True, exist_ok=True)
    write, bad = WRITERS[options.format](), []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("pictures", total=len(paths))
        for i, (path, row, reason) in enumerate(predict_files(predictor, paths, options.batch)):
            progress.advance(task)
            if row is None:
                bad.append((path, reason))
                continue
            best = predictor.predicted_classes(row) if options.top is None else row.argsort()[::-1][: options.top]
            write((path, [(predictor.class_names[k], float(row[k])) for k in best]))
            if cam:
                draw_cam(predictor, path, int(row.argmax()), cam / f"{i:05d}-{path.stem}.png")
    for path, reason in bad:
        what = reason if reason == NOT_FINITE else f"cannot be decoded ({reason})"
        print(f"error: {path} {what}", file=sys.stderr)
    return 1 if bad else 0


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


def file_to_write(given: str) -> Path:
    """Returns the path of a file that a command is to write.

    Raises:
      InputError: the path is none of this machine, or a folder or a device is there.
    """
    path = local_path(given, "FILE")
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no ordinary file: name a file to write")
    return path


FORMS = ("safetensors", "pth", "stablehlo", "onnx", "orbax")


def export_command(arguments: Sequence[str]) -> int:
    """`resnet-jax export`."""
    parser = argparse.ArgumentParser(
        prog="resnet-jax export",
        description="Writes weights under PyTorch's names or for Orbax, or a program for serving.",
    )
    parser.add_argument("source", help="the folder of a run, a tag, a file: all that --model.pretrained takes")
    parser.add_argument("file", help="what to write, such as out.safetensors; with --format orbax a folder")
    parser.add_argument("--format", choices=FORMS, help="by default what the file's name says")
    parser.add_argument("--name", help="the model, where the source does not say")
    parser.add_argument("--checkpoint", help=CHECKPOINT_HELP)
    options = parser.parse_args(arguments)
    form = options.format or Path(options.file).suffix.removeprefix(".")
    file = path_of(options.file, "FILE")
    if form != "orbax" and not in_bucket(file):
        file = file_to_write(options.file)
    if form not in FORMS:
        raise InputError(f"{file}: end the name with .{', .'.join(FORMS)}, or say which with --format")
    if form in ("stablehlo", "onnx"):
        from resnet_jax.predict.serving import export_program

        metadata = export_program(options.source, file, form, options.name, options.checkpoint)
        taken = f"{metadata['dtype']} pixels {metadata['input']}"
        print(f"{file}: takes {taken}, gives {len(metadata['class_names'])} probabilities; checked on 100 pictures")
        return 0
    from resnet_jax.weights.export import export

    name, count = export(options.source, file, form, options.name, options.checkpoint)
    print(f"{file}: {name}, {count} tensors under the names of {'the module' if form == 'orbax' else 'PyTorch'}")
    return 0


def models_command(arguments: Sequence[str]) -> int:
    """`resnet-jax models`."""
    parser = argparse.ArgumentParser(
        prog="resnet-jax models", description="Lists models, their cost and their weights."
    )
    parser.add_argument("pattern", nargs="?", default="*", help="a shell pattern such as 'resnext*'")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args(arguments)
    from resnet_jax.models.registry import list_models

    names = list_models(options.pattern)
    if not names:
        raise InputError(f"no model matches {options.pattern!r}; try resnet-jax models '*resnet*'")
    rows = []
    for name in names:
        rows.append(describe_model(name))
        if not options.json:
            print(format_model(rows[-1]))
    if options.json:
        print(json.dumps(rows, indent=2))
    return 0


def describe_model(name: str) -> dict[str, Any]:
    """A model's parameters, its GMACs at the size of its default weights, and its tags with their licences."""
    from resnet_jax.models.registry import cost, create_model
    from resnet_jax.weights.tags import tags_of

    tags = tags_of(name)
    size = tags[0].preprocessing.image_size if tags else 32 if name.startswith("cifar_") else 224
    parameters, macs = cost(create_model(name), size)
    listed = [{"tag": t.tag, "license": t.license, "num_classes": t.num_classes, "default": t.default} for t in tags]
    return {"name": name, "parameters": parameters, "gmacs": round(macs / 1e9, 3), "size": size, "tags": listed}


def format_model(row: dict[str, Any]) -> str:
    """The lines that `resnet-jax models` prints of a model."""
    lines = [f"{row['name']:<24}{row['parameters']:>13,} parameters{row['gmacs']:>9.2f} GMACs at {row['size']}"]
    for tag in row["tags"]:
        lines.append(f"    {tag['tag']:<46}{tag['license'] or 'no licence given'}{', default' * tag['default']}")
    return "\n".join(lines)
