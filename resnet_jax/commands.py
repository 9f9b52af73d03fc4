"""What each command of `resnet-jax` does: functions whose arguments are its flags, which tyro parses.

Nothing here imports JAX before a command needs it.
"""

import dataclasses
import inspect
import json
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from resnet_jax.files import in_bucket, local_path, path_of, to_json
from resnet_jax.lab.captions import TITLES
from resnet_jax.output import fail, say
from resnet_jax.recipe_files import load_config, load_recipe
from resnet_jax.recipe_flags import (
    Recipe,
    ShortRecipe,
    check_names,
    checked,
    recipe_to_change,
    spelt_out,
    take_varied,
    unchecked,
    with_values,
)
from resnet_jax.typed import InputError

RecipeFlags = Annotated[Recipe, tyro.conf.arg(name="")]  # type: ignore[valid-type]
ConfigFlag = Annotated[
    str | None, tyro.conf.arg(metavar="NAME|FILE", help="A recipe of ours by its name, or a Python file with one.")
]
WorkdirFlag = Annotated[
    str | None, tyro.conf.arg(metavar="DIR", help="The run's folder. Without --config the flags change its recipe.")
]
PartsFlag = Annotated[
    str | None,
    tyro.conf.arg(metavar="FILE", help="The recipe file with the model, data, ... of your own, where the run has any."),
]
Checkpoint = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="best|latest|STEP", help="Which checkpoint of a run; by default the best where the run selected one."
    ),
]
Json = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="json", help="Print JSON.")]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Name = Annotated[str | None, tyro.conf.arg(help="The model, where the source does not say.")]
WhereData = Annotated[
    str | None, tyro.conf.arg(name="data.dataset", help="Other data than the run's, or where that lies now.")
]
OwnModels = Annotated[
    str | None, tyro.conf.arg(metavar="FILE", help="A recipe's file, of which the models are taken that it registers.")
]
Source = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="SOURCE", help="The folder of a run, a tag, a file: all that --model.pretrained takes."),
]
RunFolder = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WORKDIR", help="The folder of a run.")]


def given_parts(config: str | None) -> dict[str, Any]:
    """Returns the parts of the user's own that a recipe file defines beside `config`, by name."""
    if config is None:
        return {}
    from resnet_jax.training.parts import NAMES, make_parts

    defined = load_recipe(config)
    make_parts(defined)
    return {name: defined[name] for name in NAMES if name in defined}


def own_parts(config: str | None) -> Any:
    """Returns these parts as `training.parts.Parts`."""
    from resnet_jax.training.parts import make_parts

    return make_parts(given_parts(config))


def train_command(recipe: RecipeFlags, config: ConfigFlag = None, workdir: WorkdirFlag = None) -> int:
    """Trains as a recipe says; a folder that holds a run goes on with it."""
    chosen = checked(recipe)
    prepare_jax()
    from resnet_jax.data.watch import Stalled
    from resnet_jax.runs.reporter import Diverged
    from resnet_jax.runs.signals import FolderLost, Stopped
    from resnet_jax.training.loop import NotSaved, train

    try:
        train(chosen, workdir, **given_parts(config))
    except (Diverged, FolderLost) as error:
        return fail(str(error), status=1)
    except NotSaved as error:
        return fail(str(error), status=3)
    except Stalled as error:
        fail(str(error))
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(1)  # the threads that hang would be waited for
    except Stopped as stopped:
        say(str(stopped))
        return 130 if stopped.signal == signal.SIGINT else int(not stopped.saved)
    return 0


def sweep_command(
    recipe: RecipeFlags,
    config: ConfigFlag = None,
    workdir: Annotated[
        str | None, tyro.conf.arg(metavar="DIR", help="The sweep's folder; alone it goes on with the sweep in it.")
    ] = None,
    members_per_device: int | Literal["auto"] = 1,
    varied: Annotated[Any, tyro.conf.Suppress, tyro.conf.Fixed] = None,
    as_json: Json = False,
) -> int:
    """Trains every combination of several values of flags as one run, and chooses by the validation split.

    Several values are a comma list, such as --optimizer.learning_rate 0.05,0.1,0.2, or of whole numbers a range, such
    as --train.seed 0..4. The first word may be the recipe, in place of --config.

    Args:
      members_per_device: Runs that a device trains at the same time; 1 takes one after the other, auto tries what is
        fastest.
    """
    chosen = checked(recipe)
    prepare_jax()
    from resnet_jax.runs.signals import FolderLost, Stopped
    from resnet_jax.training.loop import NotSaved
    from resnet_jax.training.sweep import sweep

    if not varied and (config is not None or workdir is None):
        varied = {}
    try:
        found = sweep(chosen, varied, workdir, **given_parts(config), members_per_device=members_per_device)
    except FolderLost as error:
        return fail(str(error), status=1)
    except NotSaved as error:
        return fail(str(error), status=3)
    except Stopped as stopped:
        say(str(stopped))
        return 130 if stopped.signal == signal.SIGINT else int(not stopped.saved)
    if as_json:
        print(to_json(found, indent=2))
    return int(found["chosen"] is None)


MOST_DEVICES = 1024
"""That `plan` imitates on a CPU."""


def plan_command(
    recipe: RecipeFlags,
    config: ConfigFlag = None,
    workdir: WorkdirFlag = None,
    devices: int = 1,
    memory: str | None = None,
    target: str | None = None,
    largest_batch: Switch = False,
    as_json: Json = False,
) -> int:
    """Says what a run will need, before it starts.

    Args:
      devices: How many devices the run will have.
      memory: Of each device, such as 80GiB; says whether the run fits.
      target: Compile for a slice of TPUs that need not be there, such as v5e:4x4 (v4, v5e, v5p, v6e); needs jax[tpu].
      largest_batch: With --target, look for the largest batch that fits; compiles several times.
    """
    from resnet_jax.runs.tpu_target import prepare_environment

    if not 1 <= devices <= MOST_DEVICES:
        raise InputError(f"--devices {devices}: give a number from 1 to {MOST_DEVICES}")
    chosen = checked(recipe)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    if target is not None:
        prepare_environment(target)
    elif largest_batch:
        raise InputError("--largest-batch asks the compiler of a target: give one, such as --target v5e:4x4")
    prepare_jax()
    import jax

    from resnet_jax.runs.forecast import forecast, format_plan, largest_batch_of, parse_memory

    jax.config.update("jax_platforms", "cpu")  # the recipe may have imported JAX before
    limit = None if memory is None else parse_memory(memory)
    needs = forecast(chosen, devices, own_parts(config), target)
    if target is not None and largest_batch:
        needs["largest_batch"] = largest_batch_of(chosen, target, own_parts(config))
    if limit is not None:
        needs |= {"memory": limit, "fits": needs["total"] <= limit}
    print(to_json(needs, indent=2) if as_json else format_plan(needs))
    return 0


def show_batch_command(
    recipe: RecipeFlags,
    file: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="FILE.png")] = None,
    config: ConfigFlag = None,
    workdir: WorkdirFlag = None,
) -> int:
    """Draws a batch as the network sees it.

    Args:
      file: The picture to write.
    """
    if file is None or not file.endswith(".png"):
        raise InputError("say which file to write: resnet-jax show-batch out.png [--config FILE] [flags of train]")
    path = file_to_write(file)
    chosen = checked(recipe)
    from resnet_jax.runs.show_batch import show_batch

    print(show_batch(chosen, path, own_parts(config)))
    return 0


def evaluate_command(
    source: Source,
    split: Literal["validation", "test"] | None = None,
    checkpoint: Checkpoint = None,
    dataset: WhereData = None,
    name: Name = None,
    config: PartsFlag = None,
    accept_changes: Annotated[Switch, tyro.conf.arg(name="data.accept_changes")] = False,
    classes: str | None = None,
    valid_labels: Switch = False,
    real: str | None = None,
    csv: str | None = None,
    batch: int | None = None,
    per_class: Switch = False,
    as_json: Json = False,
) -> int:
    """Evaluates a run, a tag or a file of weights; or a row for each that a pattern such as 'resnet50*' matches.

    Args:
      split: By default test, where the data has it.
      accept_changes: Evaluate also where the run's data has changed.
      classes: A file that says which class of the network each folder of the data is: JSON, or lines of folder and
        class. Without it they are matched by name.
      valid_labels: Only the classes of the data can be predicted, as is usual for ImageNet-A and -R.
      real: ReaL labels: a JSON list of the valid classes' numbers of each image, in the order of file names.
      csv: A file to write: every prediction; of a pattern the table of results, which the same command goes on with.
      batch: Images that go through the network at once.
      per_class: Print the recall of each class too: the share of its pictures that are found.
    """
    if batch is not None and not 1 <= batch <= MOST_AT_ONCE:
        raise InputError(f"--batch must lie between 1 and {MOST_AT_ONCE:,}")
    table = None if csv is None else file_to_write(csv)
    if table is not None and not os.access(table.parent, os.W_OK):
        raise InputError(f"--csv {table}: {table.parent} is no folder that can be written")
    prepare_jax()
    from resnet_jax.data.match_classes import read_class_map, read_real_labels
    from resnet_jax.predict import evaluate_sources as sources

    many = sources.is_pattern(source)
    if many and table is None:
        raise InputError(f"name the table for all that {source} matches: --csv results.csv")
    wanted = sources.Wanted(
        dataset,
        split,
        name,
        checkpoint,
        accept_changes,
        None if classes is None else read_class_map(local_path(classes, "--classes")),
        valid_labels,
        None if real is None else read_real_labels(local_path(real, "--real")),
        batch,
        per_class,
        table is not None and not many,
        own_parts(config),
    )
    with progress_bar("batches") as progress:
        if many:
            assert table is not None
            show = None if as_json else lambda row: print(sources.format_row(row), flush=True)
            rows = sources.evaluate_matching(source, wanted, table, show, progress)
            if as_json:
                print(to_json(rows, indent=2))
            return int(any(row["error"] for row in rows))
        evaluated = sources.evaluate_source(source, wanted, progress)
    if table is not None:
        written = sources.write_predictions(evaluated, table)
    print(to_json(evaluated.result, indent=2) if as_json else sources.format_result(evaluated))
    if table is not None and not as_json:
        print(written)
    return 0


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int], Callable[[], None]]]:
    """Yields `begin(steps) -> advance`: a bar on a terminal, a step further at each `advance()`."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:

        def begin(total: int) -> Callable[[], None]:
            for task in progress.task_ids:
                progress.remove_task(task)
            return partial(progress.advance, progress.add_task(what, total=total))

        yield begin


def verify_command(
    workdir: RunFolder,
    every: Annotated[Switch, tyro.conf.arg(name="all")] = False,
    intervals: int = 2,
    seed: int | None = None,
    rounding: Switch = False,
    dataset: WhereData = None,
    config: PartsFlag = None,
    as_json: Json = False,
) -> int:
    """Replays a run between its checkpoints, and names what differs; status 1 where anything does.

    Args:
      every: Replay all intervals, from step 0 to the last checkpoint.
      intervals: How many to replay, drawn at random; 0 replays none, and compares what the folder says
        with itself and with an evaluation.
      seed: Of that draw; by default a new one, which is printed.
      rounding: Compare within rounding, for a run of another kind of processor.
    """
    folder = path_of(workdir, "WORKDIR")
    prepare_jax()
    from resnet_jax.training.verify import verify

    report = verify(
        folder, "all" if every else intervals, seed=seed, rounding=rounding, data=dataset, **given_parts(config)
    )
    print(to_json(dataclasses.asdict(report) | {"ok": report.ok}, indent=2) if as_json else report)
    return int(not report.ok)


def report_command(
    workdir: RunFolder, checkpoint: Checkpoint = None, dataset: WhereData = None, config: PartsFlag = None
) -> int:
    """Writes report.html into a run's folder."""
    folder = path_of(workdir, "WORKDIR")
    prepare_jax()
    from resnet_jax.runs.report_page import make_report

    print(make_report(folder, checkpoint, dataset, own_parts(config)))
    return 0


def runs_command(
    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")] = "runs", as_json: Json = False
) -> int:
    """Lists the runs under a folder, how far they are and whether they are whole.

    Args:
      folder: The folder, which is searched at any depth.
    """
    path = path_of(folder, "DIR")
    if not path.is_dir():
        raise InputError(f"{path}: there is no such folder")
    from resnet_jax.runs.folder import runs_under

    rows = runs_under(path)
    if as_json:
        print(to_json(rows, indent=2))
    elif not rows:
        print(f"there are no runs under {path}")
    for line in [] if as_json else format_runs(rows):
        print(line)
    return 0


def format_runs(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the lines that `resnet-jax runs` prints: columns as wide as their longest text, problems below."""
    from resnet_jax.runs.charts import spoken
    from resnet_jax.runs.console import SHARES

    def best(row: dict[str, Any]) -> str:
        if row["best"] is None:
            return "no best step"
        form = ".2%" if row["metric"].rpartition("/")[2] in SHARES else ".4f"
        return f"best {spoken(row['metric'])} {format(row['best'], form)} at step {row['best_step']}"

    columns = ("folder", "state", "step", "best", "model")
    texts = [
        {name: str(row[name] or "?") for name in ("folder", "state", "model", "data")}
        | {"step": f"step {row['step'] or 0}", "best": best(row)}
        for row in rows
    ]
    widths = {name: max((len(text[name]) for text in texts), default=0) for name in columns}
    lines = []
    for row, text in zip(rows, texts, strict=True):
        lines.append("  ".join([*(text[name].ljust(widths[name]) for name in columns), text["data"]]))
        lines += [f"    {row['problem']}"] if row["problem"] else []
    return lines


MOST_AT_ONCE = 65_536
"""Pictures of a batch."""


def predict_command(
    source: Source,
    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PATH...")],
    top: int | None = None,
    flip: Switch = False,
    format: Literal["table", "json", "csv"] = "table",
    cam: str | None = None,
    batch: int = 32,
    name: Name = None,
    checkpoint: Checkpoint = None,
    config: PartsFlag = None,
) -> int:
    """Says which class pictures belong to.

    Args:
      paths: Files, folders, or patterns such as 'a/*.jpg'.
      top: How many classes of each picture to print; by default one, or with several labels those it has.
      flip: Look at each picture mirrored too, and take the mean.
      format: json is one object a line.
      cam: A folder for pictures of where the network looked (Grad-CAM).
      batch: Pictures that go through the network at once.
    """
    if not paths:
        raise InputError("name the pictures: resnet-jax predict SOURCE PATH...")
    if (top is not None and top < 1) or not 1 <= batch <= MOST_AT_ONCE:
        raise InputError(f"--top and --batch must be at least 1, and --batch at most {MOST_AT_ONCE}")
    path_of(source, "SOURCE")
    folder = None if cam is None else local_path(cam, "--cam")
    if folder and folder.exists() and not folder.is_dir():
        raise InputError(f"--cam {folder} is a file: name a folder")
    from resnet_jax.models.vit import ViT
    from resnet_jax.predict.predictor import NOT_FINITE, Predictor, find_files, predict_files
    from resnet_jax.predict.write_predictions import WRITERS, RightInFolders, draw_cam

    if named_by_path(source) and not path_of(source, "SOURCE").exists():
        raise InputError(f"{source}: there is no such run, folder or file")
    pictures = list(find_files(paths))
    parts = given_parts(config)
    predictor = Predictor.from_source(source, name, flip, checkpoint, **parts)
    if folder and isinstance(predictor.model, ViT):
        raise InputError("--cam needs a network with maps, and a transformer has none")
    if folder and "model" in parts:
        raise InputError("--cam needs a network of ours, whose maps it knows: leave it out with a model of your own")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    write, bad = WRITERS[format](), []
    counted = RightInFolders(predictor, source, paths)
    with progress_bar("pictures") as begin:
        advance = begin(len(pictures))
        for i, (path, row, reason) in enumerate(predict_files(predictor, pictures, batch)):
            advance()
            if row is None:
                bad.append((path, reason))
                continue
            counted.add(path, row)
            best = predictor.predicted_classes(row) if top is None else row.argsort()[::-1][:top]
            write((path, [(predictor.class_names[k], float(row[k])) for k in best]))
            if folder:
                best_class = int(row.argmax())
                draw_cam(predictor, path, best_class, float(row[best_class]), folder / f"{i:05d}-{path.stem}.png")
    for path, reason in bad:
        what = reason if reason == NOT_FINITE else f"cannot be decoded ({reason})"
        print(f"error: {path} {what}", file=sys.stderr)
    if line := counted.line():
        say(line, error=format != "table")
    return 1 if bad else 0


def named_by_path(source: str) -> bool:
    """Returns whether a source is a path, and no tag or name on the Hugging Face hub."""
    return not source.startswith("hf-hub:") and (
        "/" in source or Path(source).suffix in (".safetensors", ".pth", ".pt")
    )


def file_to_write(given: str) -> Path:
    """Returns the path of a file that a command is to write.

    Raises:
      InputError: the path is none of this machine, or a folder or a device is there.
    """
    path = local_path(given, "FILE")
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no ordinary file: name a file to write")
    return path


def knn_command(
    source: Source,
    dataset: Annotated[str | None, tyro.conf.arg(name="data.dataset", help="As in a recipe; of a run its own.")] = None,
    data_dir: Annotated[str | None, tyro.conf.arg(name="data.data_dir", help="As in a recipe.")] = None,
    k: int = 20,
    split: Literal["validation", "test"] | None = None,
    batch: int = 64,
    name: Name = None,
    checkpoint: Checkpoint = None,
    config: OwnModels = None,
    as_json: Json = False,
) -> int:
    """Measures a backbone by the nearest neighbours of its features.

    Args:
      k: How many of the nearest training images vote, with one over their cosine distance.
      split: By default test, where the data has it.
      batch: Pictures that go through the network at once.
    """
    if k < 1 or not 1 <= batch <= MOST_AT_ONCE:
        raise InputError(f"--k and --batch must be at least 1, and --batch at most {MOST_AT_ONCE}")
    path_of(source, "SOURCE")
    if config is not None:
        load_config(config)
    prepare_jax()
    from resnet_jax.predict.knn import knn

    found = knn(source, dataset, k, split, name=name, checkpoint=checkpoint, batch_size=batch, data_dir=data_dir)
    if as_json:
        print(to_json(found, indent=2))
        return 0
    print(f"{found['split']} accuracy {found['accuracy']:.2%} ({found['correct']:,} of {found['count']:,} images)")
    print(f"by the {k} nearest of {found['train_count']:,} training images, {found['channels']:,} features each")
    if found["skipped_images"]:
        print(f"not counted, since they cannot be decoded: {', '.join(found['skipped_images'])}")
    return 0


def inspect_command(
    source: Annotated[
        tyro.conf.Positional[str | None],
        tyro.conf.arg(metavar="[SOURCE]", help="A run, a tag or a file of weights, whose features are taken."),
    ] = None,
    dataset: Annotated[str | None, tyro.conf.arg(name="data.dataset", help="As in a recipe; of a run its own.")] = None,
    data_dir: Annotated[str | None, tyro.conf.arg(name="data.data_dir", help="As in a recipe.")] = None,
    out: str | None = None,
    folds: int = 5,
    pictures: int = 60_000,
    seed: int = 0,
    batch: int = 64,
    name: Name = None,
    checkpoint: Checkpoint = None,
    config: OwnModels = None,
    as_json: Json = False,
) -> int:
    """Looks for twins, doubtful labels, odd pictures and classes that are two; writes inspect.html and inspect.csv.

    Args:
      out: Folder to write into; by default that of the run, else inspect.
      folds: Of the cross-validation by which labels are judged.
      pictures: Most pictures that are examined, drawn at random from more.
      seed: Of folds, features and that draw.
      batch: Pictures that go through the network at once.
    """
    if folds < 2 or not 1 <= batch <= MOST_AT_ONCE or pictures < 2:
        raise InputError(f"--folds and --pictures must be at least 2, and --batch between 1 and {MOST_AT_ONCE:,}")
    run = None if source is None else path_of(source, "SOURCE")
    if out is None and run is not None and (run / "checkpoints").is_dir():
        folder = run
    else:
        folder = local_path(out or "inspect", "--out")
    if dataset is None and run is not None and run.is_dir() and not (run / "checkpoints").is_dir():
        raise InputError(
            f"{source} holds no run, whose pictures would be looked at; if it holds pictures, give them as "
            f"--data.dataset {shlex.quote(f'folder:{source}')}"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: name a folder")
    if config is not None:
        load_config(config)
    prepare_jax()
    from resnet_jax.predict.inspect_data import inspect_data
    from resnet_jax.predict.inspect_page import agreement_line, summary_of, write_inspection

    found = inspect_data(
        dataset,
        source,
        name=name,
        checkpoint=checkpoint,
        data_dir=data_dir,
        folds=folds,
        most=pictures,
        seed=seed,
        batch_size=batch,
    )
    page, summary = write_inspection(found, folder), summary_of(found)
    if as_json:
        print(to_json(summary, indent=2))
        return 0
    if found.agreement is not None:
        print(agreement_line(found.agreement))
    width = max(len(line["name"]) for line in summary["findings"])
    for line in summary["findings"]:
        print(f"{line['name']:<{width}}{line['count']:>8,}   {line['note']}")
    if found.pictures.undecodable:
        print(f"left out, since they cannot be decoded: {', '.join(found.pictures.undecodable[:5])}")
    print(f"{page} and {page.with_suffix('.csv')}")
    return 0


FORMS = ("safetensors", "pth", "stablehlo", "onnx", "orbax")


def export_command(
    source: Source,
    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")],
    format: Literal["safetensors", "pth", "stablehlo", "onnx", "orbax"] | None = None,
    name: Name = None,
    checkpoint: Checkpoint = None,
    config: PartsFlag = None,
) -> int:
    """Writes weights under PyTorch's names or for Orbax, or a program for serving.

    Args:
      file: What to write, such as out.safetensors; with --format orbax a folder.
      format: By default what the file's name says.
    """
    form = format or Path(file).suffix.removeprefix(".")
    path = path_of(file, "FILE")
    if form != "orbax" and not in_bucket(path):
        path = file_to_write(file)
    if form not in FORMS:
        raise InputError(f"{path}: end the name with .{', .'.join(FORMS)}, or say which with --format")
    from resnet_jax.runs.signals import cleaned_up

    if form in ("stablehlo", "onnx"):
        from resnet_jax.predict.export_program import CHECKED, export_program

        with cleaned_up():
            metadata = export_program(source, path, form, name, checkpoint, **given_parts(config))
        taken = f"{metadata['dtype']} pixels {metadata['input']}"
        gives = f"gives {len(metadata['class_names'])} probabilities"
        print(f"{path}: takes {taken}, {gives}; agrees with the network on {CHECKED} generated pictures")
        return 0
    from resnet_jax.weights.export import export

    with cleaned_up():
        model, count = export(source, path, form, name, checkpoint, **given_parts(config))
    print(f"{path}: {model}, {count} tensors under the names of {'the module' if form == 'orbax' else 'PyTorch'}")
    return 0


def models_command(
    pattern: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATTERN")] = "*", as_json: Json = False
) -> int:
    """Lists models, their cost and their weights.

    Args:
      pattern: A shell pattern such as 'resnext*'.
    """
    from resnet_jax.models.registry import list_models

    names = list_models(pattern)
    if not names:
        raise InputError(f"no model matches {pattern!r}; try resnet-jax models '*resnet*'")
    rows = []
    for name in names:
        rows.append(describe_model(name))
        if not as_json:
            print(format_model(rows[-1]))
    if as_json:
        print(json.dumps(rows, indent=2))
    elif pattern == "*":
        print(f"\n{count_models(names)}")
    return 0


def bench_command(
    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL...")],
    batch: int = 32,
    image_size: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    only: Literal["inference", "training"] | None = None,
    repeats: int = 10,
    config: OwnModels = None,
    as_json: Json = False,
) -> int:
    """Measures models on this machine: images a second of inference and training, memory, multiply-adds.

    Args:
      models: Names, or patterns such as 'resnet18*'.
      batch: Images at once.
      image_size: Side of an image in pixels; by default that of the model's weights.
      dtype: Of activations and convolutions.
      only: Measure this alone.
      repeats: Timed calls, of which the median counts.
    """
    if not models:
        raise InputError("name the models: resnet-jax bench MODEL...")
    if not 1 <= batch <= MOST_AT_ONCE or not 1 <= repeats <= MOST_AT_ONCE:
        raise InputError(f"--batch and --repeats must lie between 1 and {MOST_AT_ONCE:,}")
    if image_size is not None and not 1 <= image_size <= 2**14:
        raise InputError(f"--image_size must lie between 1 and {2**14:,}")
    if config is not None:
        load_config(config)
    prepare_jax()
    from resnet_jax.predict.bench import bench_or_reason, format_bench, models_of

    rows = []
    for name in models_of(models):
        rows.append(bench_or_reason(name, batch, image_size, dtype, () if only is None else (only,), repeats))
        if not as_json:
            print(format_bench(rows[-1]), flush=True)
    if as_json:
        print(to_json(rows, indent=2))
    return int(any("error" in row for row in rows))


def describe_model(name: str) -> dict[str, Any]:
    """Returns a model's parameters, its GMACs at the size of its default weights, and its tags with their licences."""
    from resnet_jax.models.registry import cost, create_model, default_classes
    from resnet_jax.weights.tags import tags_of

    tags = tags_of(name)
    size = tags[0].preprocessing.image_size if tags else 32 if name.startswith("cifar_") else 224
    parameters, macs = cost(create_model(name, num_classes=default_classes(name)), size)
    listed = [{"tag": t.tag, "license": t.license, "num_classes": t.num_classes, "default": t.default} for t in tags]
    return {"name": name, "parameters": parameters, "gmacs": round(macs / 1e9, 3), "size": size, "tags": listed}


def count_models(names: Sequence[str]) -> str:
    """Returns how many models there are, and how many of them have the names of timm and torchvision."""
    from resnet_jax.models.table import NAMED_HERE

    own = [name for name in names if name in NAMED_HERE or name.startswith("cifar_")]
    return (
        f"{len(names)} models: {len(names) - len(own)} by the names of timm and torchvision, and {len(own)} of this "
        f"package's own (cifar_*, {', '.join(NAMED_HERE)})"
    )


def format_model(row: dict[str, Any]) -> str:
    """Returns the lines that `resnet-jax models` prints of a model."""
    lines = [f"{row['name']:<24}{row['parameters']:>13,} parameters{row['gmacs']:>9.2f} GMACs at {row['size']}"]
    for tag in row["tags"]:
        lines.append(f"    {tag['tag']:<46}{tag['license'] or 'no licence given'}{', default' * tag['default']}")
    return "\n".join(lines)


def check_command(
    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE:NAME|MODEL")],
    image_size: int | None = None,
    channels: int | None = None,
    devices: int = 8,
    as_json: Json = False,
) -> int:
    """Tries whether a module keeps what training, several devices and resumption assume; status 1 where it does not.

    Args:
      target: A Flax module in a Python file, or a function that returns one, such as net.py:MyNet; or a named model.
      image_size: Pixels; by default the module's own image_size, or 32.
      channels: Of the images; by default the module's own in_channels, or 3.
      devices: How many the CPU imitates.
    """
    if not 1 <= devices <= MOST_DEVICES:
        raise InputError(f"--devices {devices}: give a number from 1 to {MOST_DEVICES}")
    if not all(number is None or number >= 1 for number in (image_size, channels)):
        raise InputError("--image-size and --channels must be at least 1")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    prepare_jax()
    from resnet_jax.training.check_module import check, module_of

    module, size = module_of(target, image_size, channels)
    report = check(module, size)
    print(to_json(dataclasses.asdict(report), indent=2) if as_json else report)
    return int(not report.ok)


Numbers = Annotated[
    tuple[int, ...] | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="N,N,...",
        instance_from_str=lambda words: tuple(int(word) for word in words[0].split(",")),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: [str(value)],
    ),
]


LAB_NAMES = f"all, page (draws figures and page anew from the records in --out), or {', '.join(TITLES)}."


def lab_command(
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME", help=LAB_NAMES)],
    out: str = "lab",
    dataset: str = "digits",
    depths: Numbers = None,
    seeds: Numbers = None,
    quick: Switch = False,
    config: OwnModels = None,
) -> int:
    """Runs an experiment that shows why residual learning works; stopped, it goes on with the same command.

    Args:
      out: Folder of figures, records and index.html.
      dataset: digits, or what data.dataset takes, at 32 x 32 pixels.
      depths: Of the networks, such as 20,56.
      seeds: Such as 0,1,2.
      quick: The smallest version that still shows the effect: up to a few minutes each on two CPU cores; without it
        some take half an hour or more.
    """
    folder = local_path(out, "--out")
    if config is not None:
        load_config(config)
    prepare_jax()
    from resnet_jax.lab.record import Options
    from resnet_jax.lab.run import EXPERIMENTS, redraw, run, write_page

    chosen = Options(dataset, depths, seeds, quick)
    if name == "page":
        redraw(folder)
    else:
        for experiment in EXPERIMENTS if name == "all" else (name,):
            run(experiment, folder, chosen)
    print(write_page(folder))
    return 0


def prepare_jax() -> None:
    """Sets JAX up for a command: compiled programs are kept in the user's cache folder, unless JAX has another one, and
    programs run as `run_in_caller` says.
    """
    import jax

    from resnet_jax.training.sharding import run_in_caller

    run_in_caller()
    if jax.config.values.get("jax_compilation_cache_dir") is not None:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet_jax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # the second where there is no home
        print(
            f"WARNING: compiled programs cannot be kept ({error}), so each start compiles anew; "
            "set XDG_CACHE_HOME to a folder that can be written",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


COMMANDS: dict[str, Callable[..., int]] = {
    "train": train_command,
    "sweep": sweep_command,
    "plan": plan_command,
    "show-batch": show_batch_command,
    "evaluate": evaluate_command,
    "verify": verify_command,
    "report": report_command,
    "runs": runs_command,
    "predict": predict_command,
    "knn": knn_command,
    "inspect": inspect_command,
    "export": export_command,
    "models": models_command,
    "bench": bench_command,
    "check": check_command,
    "lab": lab_command,
}


def without_colours(command: Callable[..., int]) -> Callable[..., int]:
    """Returns a command whose help and errors tyro prints without colours, as for a terminal that has none."""
    before = os.environ.get("TERM", "")
    os.environ["TERM"] = "dumb"

    @wraps(command)
    def called(*args: Any, **kwargs: Any) -> int:
        os.environ["TERM"] = before
        return command(*args, **kwargs)

    called.__signature__ = inspect.signature(command)  # type: ignore[attr-defined]
    del called.__wrapped__
    return called


def with_flags_of(command: Callable[..., int], kind: type) -> Callable[..., int]:
    """Returns a command whose recipe has the flags of `Recipe`, or of `ShortRecipe`, which says that there are more."""

    @wraps(command)
    def called(*args: Any, **kwargs: Any) -> int:
        return command(*args, **kwargs)

    signature = inspect.signature(command)
    recipe = signature.parameters["recipe"].replace(annotation=Annotated[kind, tyro.conf.arg(name="")])
    others = [parameter for name, parameter in signature.parameters.items() if name != "recipe"]
    called.__signature__ = signature.replace(parameters=[recipe, *others])  # type: ignore[attr-defined]
    called.__annotations__ = command.__annotations__ | {"recipe": recipe.annotation}
    del called.__wrapped__
    if kind is ShortRecipe:
        first, _, rest = inspect.cleandoc(command.__doc__ or "").partition("\n")
        called.__doc__ = f"{first}\n\nThese are the common flags; --help-all shows all.\n{rest}"
    return called


DESCRIPTION = """Residual networks in JAX: training, prediction, weights.

resnet-jax COMMAND --help tells more, resnet-jax --version which version this is."""


def call(arguments: Sequence[str], commands: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """Calls the command that a command line names; returns what it returns.

    What flags change is the recipe of `--config`, else that of the run in `--workdir`, else `Config()`.

    Args:
      commands: name -> function; by default `COMMANDS`.

    Raises:
      InputError: the recipe is not as it must be, or whatever the command finds wrong.
      SystemExit: a flag is wrong (status 2), or help was asked for (0).
    """
    commands = dict(COMMANDS if commands is None else commands)
    name = arguments[0]
    if name == "show-batch":  # a flag with several values before FILE would take FILE, too
        arguments = [name, *sorted(arguments[1:], key=lambda word: not word.endswith(".png"))]
    varied: dict[str, Any] = {}
    if name == "sweep":
        if arguments[1:2] and not arguments[1].startswith("-"):
            arguments = [name, "--config", *arguments[1:]]
        arguments, varied = take_varied(arguments)
    own = list(inspect.signature(commands[name]).parameters) if name in commands else []
    if os.environ.get("NO_COLOR") and name in commands:
        commands[name] = without_colours(commands[name])
    if "recipe" in own:
        arguments = with_values(spelt_out(arguments))
        kind = ShortRecipe if {"--help", "-h"} & set(arguments) else Recipe
        check_names(arguments[1:], [*own, "json", "help_all"])
        changed = unchecked(recipe_to_change(arguments), kind)
        commands[name] = partial(with_flags_of(commands[name], kind), recipe=changed)
        if "varied" in own:
            commands[name] = partial(commands[name], varied=varied)
    arguments = ["--help" if word == "--help-all" else word for word in arguments]
    return tyro.extras.subcommand_cli_from_dict(
        dict(commands),
        prog="resnet-jax",
        args=arguments,
        description=DESCRIPTION,
        use_underscores=True,
        config=(tyro.conf.AvoidSubcommands,),
    )
