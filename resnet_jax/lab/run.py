"""Running experiments, and the page that shows them."""

import base64
import json
import time
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from resnet_jax.config import Config, DataConfig, InputError
from resnet_jax.files import write_whole
from resnet_jax.lab.record import Notebook, Options, Rows, save
from resnet_jax.lab.words import TITLES, WORDS
from resnet_jax.models.registry import nearest
from resnet_jax.recipes import check

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
    check(Config(data=DataConfig(dataset=options.dataset)))
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
    sections = []
    for name in EXPERIMENTS:
        if not (folder / f"{name}.json").exists():
            continue
        record = json.loads((folder / f"{name}.json").read_text())
        picture = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        english, japanese = TITLES[name]
        module: Any = import_module(f"resnet_jax.lab.{name}")
        table = as_table(name, module.table(record["rows"])) if hasattr(module, "table") else ""
        how = f"{record['command']} · {record['hardware']} · {record['seconds']:.0f} s · {record['commit'] or ''}"
        sections.append(
            f'<section id="{name}"><h2>{escape(english)} <span lang="ja">{escape(japanese)}</span></h2>'
            f'<img src="data:image/png;base64,{picture}" alt="{escape(english)}">'
            f'{table}<p>{escape(WORDS[name][0])}</p><p lang="ja">{escape(WORDS[name][1])}</p>'
            f"<small>Data: {escape(record['options']['dataset'])}. <code>{escape(how)}</code></small></section>"
        )
    page = (Path(__file__).with_name("page.html")).read_text()
    write_whole(folder / "index.html", page.replace("{body}", "\n".join(sections)))
    return folder / "index.html"


def as_table(name: str, rows: Rows) -> str:
    """Rows of the same columns as HTML, numbers to three digits."""

    def cell(value: Any) -> str:
        form = ".3g" if isinstance(value, float) else "," if isinstance(value, int) else ""
        return escape(f"{value:{form}}")

    head = "".join(f"<th>{escape(key)}</th>" for key in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
    return f'<div class="wide"><table id="{name}-table"><tr>{head}</tr>{body}</table></div>'
