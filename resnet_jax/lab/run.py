"""Runs experiments, and writes the page that shows them."""

import contextlib
import shlex
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, TypedDict

from resnet_jax.config import DataConfig, InputError
from resnet_jax.files import read_json, write_whole
from resnet_jax.lab.captions import CAPTIONS, TABLES, TITLES
from resnet_jax.lab.panels import DARK, LIGHT, draw_panels, panel_svg, short, translated
from resnet_jax.lab.record import Notebook, Options, save, save_figure
from resnet_jax.models.registry import nearest
from resnet_jax.runs.report_page import page_template

EXPERIMENTS = tuple(TITLES)
"""Names of the experiments. Each is a module of this folder with `rows(notebook)`, which computes what it records,
`panels(rows)`, which returns the charts of its figure, `takeaway(rows)`, a sentence on what it found in English and
Japanese, and perhaps `table(rows)`, which returns rows for a table in the page.
"""

MOST_LAYERS = 10_004
"""The depth that `--depths` may ask for at most."""


def run(name: str, folder: Path, options: Options) -> dict[str, Any]:
    """Runs an experiment, or what is left of one that was stopped; writes record and figure and returns the record.

    Args:
      name: one of `EXPERIMENTS`.
      folder: where `<name>.json`, `.csv`, `.png` and `.svg` are written.
      options: as the command line gives them.

    Raises:
      InputError: there is no such experiment, dataset, depth or seed, or the folder cannot be written.
    """
    if name not in EXPERIMENTS:
        raise InputError(f"there is no experiment {name!r}; {nearest(name, (*EXPERIMENTS, 'all', 'page'))}")
    DataConfig(dataset=options.dataset)  # raises where there is no such dataset
    for depth in options.depths or ():
        if not 8 <= depth <= MOST_LAYERS or (depth - 2) % 6:
            raise InputError(f"--depths {depth}: depths are 6n + 2 up to {MOST_LAYERS}, such as 8, 20, 56")
    for seed in options.seeds or ():
        if not 0 <= seed < 2**32:
            raise InputError(f"--seeds {seed}: seeds lie in 0 to {2**32 - 1}")
    module = module_of(name)
    print(f"{name}: {TITLES[name][0]}", flush=True)
    began = time.perf_counter()
    try:
        book = Notebook(folder, name, options)
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written: {error}; name another folder") from error
    rows = module.rows(book)
    record = save(folder, name, options, rows, draw_panels(module.panels(rows)), time.perf_counter() - began)
    print(f"  {folder / name}.png, .svg, .json, .csv", flush=True)
    return record


def redraw(folder: Path) -> None:
    """Draws the figures of all experiments recorded in a folder anew, from their records.

    Raises:
      InputError: there is no record, or one is damaged.
    """
    names = recorded_in(folder)
    if not names:
        raise InputError(f"--out {folder} holds no records to draw: name the folder that `resnet-jax lab` wrote")
    for name in names:
        with _named_if_damaged(folder, name):
            rows = read_json(folder / f"{name}.json", Record)["rows"]
            figure = draw_panels(module_of(name).panels(rows))
        save_figure(folder, name, figure)
        print(f"{name}: {folder / name}.png, .svg", flush=True)


def recorded_in(folder: Path) -> list[str]:
    """Returns the names of the experiments that have a record in a folder."""
    return [name for name in EXPERIMENTS if (folder / f"{name}.json").exists()]


def module_of(name: str) -> Any:
    """Returns the module of an experiment."""
    return import_module(f"resnet_jax.lab.{name}")


class Record(TypedDict):
    """The fields of a record that the page shows."""

    command: str
    hardware: str
    seconds: float
    commit: str | None
    options: dict[str, Any]
    rows: list[dict[str, Any]]


def write_page(folder: Path) -> Path:
    """Writes `index.html`, in English and Japanese, with every experiment recorded in `folder`; returns its path.

    Its charts are drawn from the records; it needs no other file.

    Raises:
      InputError: a record is damaged.
    """
    sections = [section(folder, name) for name in recorded_in(folder)]
    template = page_template(Path(__file__).with_name("page.html"))
    write_whole(folder / "index.html", template.render(sections=sections, light=LIGHT, dark=DARK))
    return folder / "index.html"


def section(folder: Path, name: str) -> dict[str, Any]:
    """Returns what the page shows of an experiment, from its record.

    Raises:
      InputError: it is damaged.
    """
    with _named_if_damaged(folder, name):
        record: Record = read_json(folder / f"{name}.json", Record)
        module, rows = module_of(name), record["rows"]
        panels = [{"finding": panel.finding, "svg": panel_svg(panel)} for panel in module.panels(rows)]
        table = module.table(rows) if hasattr(module, "table") else []
        cells = [list(table[0]), *([cell(value) for value in row.values()] for row in table)] if table else []
        shown = {"name": name, "dataset": str(record["options"]["dataset"]), "takeaway": module.takeaway(rows)}
    made_by = f"{record['command']} · {record['hardware']} · {record['seconds']:.0f} s · {record['commit'] or ''}"
    shown |= {"titles": TITLES[name], "captions": CAPTIONS[name], "panels": panels, "made_by": made_by}
    texts = [[(text, translated(text)) for text in row] for row in cells]
    return shown | {"table": texts, "table_title": TABLES.get(name)}


@contextlib.contextmanager
def _named_if_damaged(folder: Path, name: str) -> Iterator[None]:
    """Makes what is wrong with a record an `InputError` that names it."""
    file = folder / f"{name}.json"
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, OSError) as error:
        raise InputError(
            f"{file} is damaged ({type(error).__name__}: {error}); remove it and run: "
            f"resnet-jax lab {name} --out {shlex.quote(str(folder))}"
        ) from error


def cell(value: object) -> str:
    """Returns the text of a table's cell: floats as `short` gives them, an int with commas, and all else as it is."""
    return short(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
