"""Runs experiments, and writes the page that shows them."""

import base64
import shlex
import time
from importlib import import_module
from pathlib import Path
from typing import Any, TypedDict

from resnet_jax.config import DataConfig, InputError
from resnet_jax.files import read_json, write_whole
from resnet_jax.lab.captions import CAPTIONS, TITLES
from resnet_jax.lab.record import Notebook, Options, save
from resnet_jax.models.registry import nearest

EXPERIMENTS = tuple(TITLES)
"""Names of the experiments. Each is a module of this folder with `rows(notebook)`, which computes what it records,
`draw(rows)`, which returns a figure, and perhaps `table(rows)`, which returns rows for a table in the page.
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
        raise InputError(f"there is no experiment {name!r}; {nearest(name, (*EXPERIMENTS, 'all'))}")
    DataConfig(dataset=options.dataset)  # which checks it
    for depth in options.depths or ():
        if not 8 <= depth <= MOST_LAYERS or (depth - 2) % 6:
            raise InputError(f"--depths {depth}: depths are 6n + 2 up to {MOST_LAYERS}, such as 8, 20, 56")
    for seed in options.seeds or ():
        if not 0 <= seed < 2**32:
            raise InputError(f"--seeds {seed}: seeds lie in 0 to {2**32 - 1}")
    module: Any = import_module(f"resnet_jax.lab.{name}")
    print(f"{name}: {TITLES[name][0]}", flush=True)
    began = time.perf_counter()
    try:
        book = Notebook(folder, name, options)
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written: {error}; name another folder") from error
    rows = module.rows(book)
    record = save(folder, name, options, rows, module.draw(rows), time.perf_counter() - began)
    print(f"  {folder / name}.png, .svg, .json, .csv", flush=True)
    return record


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

    Raises:
      InputError: a record or its figure is damaged or missing.
    """
    import jinja2

    sections = [section(folder, name) for name in EXPERIMENTS if (folder / f"{name}.json").exists()]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    write_whole(folder / "index.html", template.render(sections=sections))
    return folder / "index.html"


def section(folder: Path, name: str) -> dict[str, Any]:
    """Returns what the page shows of an experiment, from its record and figure.

    Raises:
      InputError: one of them is damaged or missing.
    """
    file = folder / f"{name}.json"
    record: Record = read_json(file, Record)
    module: Any = import_module(f"resnet_jax.lab.{name}")
    try:
        picture = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        rows = module.table(record["rows"]) if hasattr(module, "table") else []
        table = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)] if rows else []
        dataset = record["options"]["dataset"]
    except (KeyError, IndexError, TypeError, ValueError, OSError) as error:
        raise InputError(
            f"{file} or its picture is damaged ({type(error).__name__}: {error}); remove it and run: "
            f"resnet-jax lab {name} --out {shlex.quote(str(folder))}"
        ) from error
    made_by = f"{record['command']} · {record['hardware']} · {record['seconds']:.0f} s · {record['commit'] or ''}"
    shown = {"name": name, "titles": TITLES[name], "captions": CAPTIONS[name], "picture": picture, "table": table}
    return shown | {"dataset": str(dataset), "made_by": made_by}


def cell(value: Any) -> str:
    """Returns the text of a table's cell: three digits of a float, an int with commas, and all else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
