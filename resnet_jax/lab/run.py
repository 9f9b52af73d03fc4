"""Running experiments, and the page that shows them."""

import base64
import shlex
import time
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any, TypedDict

from resnet_jax.config import DataConfig, InputError
from resnet_jax.files import read_json, write_whole
from resnet_jax.lab.captions import TITLES, WORDS
from resnet_jax.lab.record import Notebook, Options, Rows, save
from resnet_jax.models.registry import nearest

EXPERIMENTS = tuple(TITLES)
"""Each is a module of this folder with `rows(notebook)`, `draw(rows)`, and some with `table(rows)`, for the page."""

MOST_LAYERS = 10_004


def run(name: str, folder: Path, options: Options) -> dict[str, Any]:
    """Runs an experiment, or goes on with it; returns its record, which lies in `folder` with its figure.

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


def write_page(folder: Path) -> Path:
    """`index.html` with every experiment whose record lies in the folder, in English and Japanese."""
    there = [name for name in EXPERIMENTS if (folder / f"{name}.json").exists()]
    sections = [section(folder, name) for name in there]
    page = (Path(__file__).with_name("page.html")).read_text()
    write_whole(folder / "index.html", page.replace("{body}", "\n".join(sections)))
    return folder / "index.html"


class Shown(TypedDict):
    """What the page shows of an experiment's record."""

    command: str
    hardware: str
    seconds: float
    commit: str | None
    options: dict[str, Any]
    rows: list[dict[str, Any]]


def section(folder: Path, name: str) -> str:
    """HTML of an experiment, from its record and picture.

    Raises:
      InputError: one of them is damaged or missing.
    """
    file = folder / f"{name}.json"
    record: Shown = read_json(file, Shown)
    english, japanese = TITLES[name]
    module: Any = import_module(f"resnet_jax.lab.{name}")
    try:
        picture = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        table = as_table(name, module.table(record["rows"])) if hasattr(module, "table") else ""
        dataset = record["options"]["dataset"]
    except (KeyError, IndexError, TypeError, ValueError, OSError) as error:
        raise InputError(
            f"{file} or its picture is damaged ({type(error).__name__}: {error}); remove it and run: "
            f"resnet-jax lab {name} --out {shlex.quote(str(folder))}"
        ) from error
    how = f"{record['command']} · {record['hardware']} · {record['seconds']:.0f} s · {record['commit'] or ''}"
    return (
        f'<section id="{name}"><h2>{escape(english)} <span lang="ja">{escape(japanese)}</span></h2>'
        f'<img src="data:image/png;base64,{picture}" alt="{escape(english)}">'
        f'{table}<p>{escape(WORDS[name][0])}</p><p lang="ja">{escape(WORDS[name][1])}</p>'
        f"<small>Data: {escape(str(dataset))}. <code>{escape(how)}</code></small></section>"
    )


def as_table(name: str, rows: Rows) -> str:
    """Rows of the same columns as HTML, numbers to three digits."""

    def cell(value: Any) -> str:
        form = ".3g" if isinstance(value, float) else "," if isinstance(value, int) else ""
        return escape(f"{value:{form}}")

    head = "".join(f"<th>{escape(key)}</th>" for key in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
    return f'<div class="wide"><table id="{name}-table"><tr>{head}</tr>{body}</table></div>'
