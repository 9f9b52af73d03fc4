"""Writes the pages of the site that come from the code and from the records, into docs/generated/."""

import ast
import hashlib
import html
import inspect
import json
import re
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "resnet_jax"
OUT = DOCS / "generated"

HE2015 = "[He et al. 2015](https://arxiv.org/abs/1512.03385)"
FAMILIES = (
    ("ResNet, wide ResNet, ResNeXt", "PLAIN", f"{HE2015}; deep stems (c, d, s, t) "
     "[He et al. 2018](https://arxiv.org/abs/1812.01187); "
     "[Zagoruyko and Komodakis 2016](https://arxiv.org/abs/1605.07146); [Xie et al. 2016](https://arxiv.org/abs/1611.05431)"),
    ("Channel attention: SE, ECA, ResNet-RS", "CHANNEL_ATTENTION",
     "[Hu et al. 2017](https://arxiv.org/abs/1709.01507); "
     "[Wang et al. 2019](https://arxiv.org/abs/1910.03151); [Bello et al. 2021](https://arxiv.org/abs/2103.07579)"),
    ("Anti-aliased", "ANTI_ALIASED", "[Zhang 2019](https://arxiv.org/abs/1904.11486)"),
    ("Activation first, Big Transfer", "PREACTIVATED", "[He et al. 2016](https://arxiv.org/abs/1603.05027); "
     "[Kolesnikov et al. 2019](https://arxiv.org/abs/1912.11370)"),
    ("DenseNet", "DENSENETS", "[Huang et al. 2016](https://arxiv.org/abs/1608.06993)"),
    ("GoogLeNet", "GOOGLENETS", "[Szegedy et al. 2014](https://arxiv.org/abs/1409.4842), as torchvision has it"),
    ("Attention inside a ResNet", "SELF_ATTENTION", "[Srinivas et al. 2021](https://arxiv.org/abs/2101.11605)"),
    ("Vision transformer", "VITS", "[Dosovitskiy et al. 2020](https://arxiv.org/abs/2010.11929)"),
    ("For CIFAR and other small images", "CIFAR",
     f"{HE2015}, section 4.2; [He et al. 2016](https://arxiv.org/abs/1603.05027); "
     "[Zagoruyko and Komodakis 2016](https://arxiv.org/abs/1605.07146)"),
)  # fmt: skip
"""Heading, name of a table in `resnet_jax/models/table.py`, and where its networks come from."""

EXTRAS = {
    "train": "the command `resnet-jax`, `rj.train`, checkpoints, pictures, the report",
    "report": "the report and curves of a run; `train` brings it",
    "hub": "weights by tag from the Hugging Face hub, and `.safetensors`",
    "tfds": "data of tensorflow-datasets",
    "hf": "data of Hugging Face's datasets, and Parquet files",
    "export": "programs for serving (StableHLO)",
    "gcs": "runs and pictures in Google Cloud Storage",
    "wandb": "logs to Weights & Biases",
    "mlflow": "logs to MLflow",
    "fast": "training pictures resized in a third of the time",
    "all": "all of the above",
    "cuda12": "NVIDIA GPUs, CUDA 12",
    "cuda13": "NVIDIA GPUs, CUDA 13",
    "tpu": "TPUs, and plans for them",
    "parity": "comparisons with PyTorch",
    "onnx": "programs for ONNX Runtime",
    "test": "the tests",
    "docs": "this site",
    "dev": "the tests, and hooks for commits",
}
"""What each extra of `pyproject.toml` is for."""


def write_pages(repository: str | None) -> None:
    """Writes all of them; one that is as it was is left alone, so that a second build does not read it again.

    Args:
      repository: address of the source on the web; None leaves the links to it out.
    """
    pages = {
        "front.md": front(),
        "zoo.md": zoo(),
        "recipes.md": recipes(),
        "commands.md": commands(),
        "flags.md": flags(),
        "extras.md": extras(),
        "lab_en.md": lab("en"),
        "lab_ja.md": lab("ja"),
        "transfer.md": means("finetune", "accuracy on test pictures"),
        "imbalance.md": means("imbalance", "macro recall"),
        "depth.md": depth(),
        "proofs.md": proofs(),
        "changelog.md": relinked(ROOT / "CHANGELOG.md", repository),
        "benchmarks.md": benchmarks(repository),
    }
    OUT.mkdir(exist_ok=True)
    for name, text in pages.items():
        if not (OUT / name).exists() or (OUT / name).read_text(encoding="utf-8") != text:
            (OUT / name).write_text(text, encoding="utf-8")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown; all columns but the first are numbers."""
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ruler, *rows]) + "\n"


def zoo() -> str:
    """Returns the named models, by family: parameters, multiply-adds, published weights."""
    from resnet_jax.commands import count_models
    from resnet_jax.models import table as tables

    described = costs()
    text = [f"{count_models(list(described))}.\n".replace("cifar_*", "`cifar_*`")]
    for heading, name, source in FAMILIES:
        text.append(f"## {heading}\n\nSource: {source}.\n")
        rows = []
        for model in getattr(tables, name):
            row = described.pop(model)
            tags = [tag["tag"] for tag in row["tags"]]
            weights = [f"[{tag.partition('.')[2] or tag}](https://huggingface.co/timm/{tag})" for tag in tags]
            size = row["size"] if isinstance(row["size"], int) else row["size"][0]
            rows.append(
                [f"`{model}`", f"{row['parameters'] / 1e6:,.2f}", f"{row['gmacs']:,.2f}", str(size), ", ".join(weights)]
            )
        lines = table(["name", "parameters, millions", "GMACs", "at pixels", "weights"], rows)
        text.append(lines.replace("---: |\n", "--- |\n", 1))
    if described:
        raise ValueError(f"docs/generate.py: no family has {', '.join(described)}; give them one in FAMILIES")
    return "\n".join(text)


def costs() -> dict[str, dict[str, Any]]:
    """Returns what `resnet-jax models --json` says of each model; kept in a file until models or tags change."""
    from resnet_jax.commands import describe_model
    from resnet_jax.models.registry import list_models

    sources = [*sorted((PACKAGE / "models").glob("*.py")), PACKAGE / "weights" / "tags.jsonl"]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    kept = OUT / "zoo.json"
    if kept.exists() and (found := json.loads(kept.read_text()))["key"] == key:
        return found["models"]
    models = {name: describe_model(name) for name in list_models()}
    OUT.mkdir(exist_ok=True)
    kept.write_text(json.dumps({"key": key, "models": models}))
    return models


def recipes() -> str:
    """Returns the recipes of `configs/`: what each says of itself, its command, and its fields."""
    text = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        about = ast.get_docstring(tree)
        text.append(
            f"## {path.stem}\n\n{about}\n\n```bash\nresnet-jax train --config {path.stem}\n```\n\n"
            f"```{{literalinclude}} ../configs/{path.name}\n:language: python\n:lines: {tree.body[1].lineno}-\n```\n"
        )
    return "\n".join(text)


def commands() -> str:
    """Returns every command: what it does, and its arguments as they are typed."""
    from resnet_jax.commands import COMMANDS

    text = ["## Commands\n"]
    for name, function in COMMANDS.items():
        first, _, rest = inspect.cleandoc(function.__doc__ or "").partition("\nArgs:\n")
        told = dict(re.findall(r"^  (\w+): ((?:.|\n    )+)", rest, re.M))
        words, entries = [f"resnet-jax {name}"], []
        hints = get_type_hints(function, include_extras=True)
        for parameter in inspect.signature(function).parameters.values():
            if "Suppress" in str(hints[parameter.name]):
                continue
            if parameter.name == "recipe":
                entries.append("  - every [field of a recipe](#fields-of-a-recipe) as a flag")
                continue
            argument, about = shown(parameter, hints[parameter.name])
            words += [] if argument.startswith("--") else [argument]
            about, value = told.get(parameter.name, about), parameter.default
            default = f" *Default `{value}`.*" if value not in (parameter.empty, None, False, ()) else ""
            entries.append(f"  - `{argument}`: {escaped(' '.join(about.split()))}{default}")
        text.append(f"`{' '.join(words)}`\n: {escaped(' '.join(first.split()))}\n\n" + "\n".join(entries) + "\n")
    return "\n".join(text)


def shown(parameter: inspect.Parameter, hint: Any) -> tuple[str, str]:
    """Returns an argument as it is typed, and its help, from the annotation that tyro reads."""
    typed = getattr(hint, "__metadata__", ())
    told = {key: getattr(one, key) for one in typed for key in ("name", "metavar", "help") if getattr(one, key, None)}
    kind = str(getattr(hint, "__origin__", hint) if typed else hint)
    choices = re.findall(r"'(\w+)'", "".join(re.findall(r"Literal\[.*?\]", kind)))
    takes = [] if "bool" in kind else ["N"] * ("int" in kind) + choices or ["VALUE"]
    metavar = told.get("metavar", "|".join(takes))
    if "Positional" not in map(str, typed):
        return f"--{told.get('name', parameter.name)} {metavar}".strip(), told.get("help", "")
    needed = parameter.default is parameter.empty or metavar.startswith("[")
    return metavar if needed else f"[{metavar}]", told.get("help", "")


def extras() -> str:
    """Returns the optional dependencies, of `pyproject.toml`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    if set(extras) != set(EXTRAS):
        raise ValueError(f"docs/generate.py: EXTRAS and pyproject.toml differ in {sorted(set(extras) ^ set(EXTRAS))}")
    text = "| extra | what for | installs |\n|---|---|---|\n"
    for name, requirements in extras.items():
        packages = [re.match(r"[\w.-]+(\[[\w,-]+\])?", requirement)[0] for requirement in requirements]
        text += f"| `{name}` | {EXTRAS[name]} | {re.sub(',(?! )', ', ', ', '.join(packages))} |\n"
    return text


def escaped(text: str) -> str:
    """Returns words in Markdown: what it would take for marks made plain, and flags as code."""
    parts = re.split(r"(`[^`]*`|--[a-z]\w*(?:\.\w+)*)", text)
    parts[::2] = [re.sub(r"([*_<\[])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"`{part.strip('`')}`" for part in parts[1::2]]
    return "".join(parts)


def flags() -> str:
    """Returns every field of a recipe, which is also a flag: its values, default, and what it says of itself."""
    tree = ast.parse((ROOT / "resnet_jax" / "config.py").read_text(encoding="utf-8"))
    sections = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    text = []
    for line in sections["Config"].body:
        if not isinstance(line, ast.AnnAssign):
            continue
        section, name = sections[ast.unparse(line.annotation)], ast.unparse(line.target)
        text.append(f"### {name}\n\n{ast.get_docstring(section)}\n")
        for field, words in zip(section.body, section.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(words, ast.Expr):
                text.append(flag(name, field, " ".join(ast.literal_eval(words.value).split())))
    return "\n".join(text)


def flag(section: str, field: ast.AnnAssign, about: str) -> str:
    """Returns an entry of the list of flags."""
    value = field.value
    if isinstance(value, ast.Call):
        value = value.args[0]
    kind = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", ""), ast.unparse(field.annotation))
    kind = kind.replace(" | None", "").replace("Size", "int or two ints")
    default = value.value if isinstance(value, ast.Constant) else ast.unparse(value)
    return f"`--{section}.{ast.unparse(field.target)}`\n: {escaped(about)} *{kind}; default `{default}`*\n"


def lab(language: str) -> str:
    """Returns the experiments of `docs/lab` with their charts, drawn from the records, in English or Japanese."""
    from resnet_jax.lab import run

    text = [colours()]
    for name in run.recorded_in(DOCS / "lab"):
        section = run.section(DOCS / "lab", name)
        heads = ("td" if number else "th" for number in range(len(section["table"])))
        rows = [
            "<tr>" + "".join(f"<{head}>{own(texts, language)}</{head}>" for texts in row) + "</tr>"
            for row, head in zip(section["table"], heads, strict=True)
        ]
        title = f"<caption>{own(section['table_title'], language)}</caption>" if section["table_title"] else ""
        table = f'<div class="pst-scrollable-table-container"><table class="table">{title}{"".join(rows)}</table></div>'
        body = (
            f'<div class="lab {language}"><p class="takeaway">{own(section["takeaway"], language)}</p>'
            + charts(section["panels"], language)
            + f"<p>{own(section['captions'], language)}</p>{table if rows else ''}"
            + f"<p><small>{html.escape(section['dataset'])}. {html.escape(section['made_by'])}</small></p></div>"
        )
        text.append(f"## {section['titles'][language == 'ja']}\n\n```{{raw}} html\n{body}\n```\n")
    return "\n".join(text)


def front() -> str:
    """Returns the figure of the first page: training error of plain and of residual networks, from its record."""
    from resnet_jax.lab import run

    section = run.section(DOCS / "lab", "degradation")
    panels, takeaway = charts(section["panels"][:2], "en"), own(section["takeaway"], "en")
    return f'{colours()}\n```{{raw}} html\n<div class="lab en">{panels}<p><em>{takeaway}</em></p></div>\n```\n'


def colours() -> str:
    """Returns the colours of the lab's charts as variables of the page's style."""
    from resnet_jax.lab.panels import DARK, LIGHT

    return f'```{{raw}} html\n<style>.lab {{ {LIGHT} }} html[data-theme="dark"] .lab {{ {DARK} }}</style>\n```\n'


def charts(panels: list[dict[str, Any]], language: str) -> str:
    """Returns charts side by side, each below what it shows."""
    shown = [f"<figcaption>{own(panel['finding'], language)}</figcaption>{panel['svg']}" for panel in panels]
    return f'<div class="panels">{"".join(f"<figure>{figure}</figure>" for figure in shown)}</div>'


def own(texts: tuple[str, str], language: str) -> str:
    """Returns a text in a language, as HTML."""
    return html.escape(texts[language == "ja"])


def records(name: str) -> dict[str, dict[str, Any]]:
    """Returns file name -> record of a benchmark, one for each kind of hardware."""
    paths = sorted((ROOT / "benchmarks" / "results").glob(f"{name}-*.json"))
    return {path.name: json.loads(path.read_text()) for path in paths}


def means(name: str, of: str) -> str:
    """Returns a table of the means and standard deviations that a benchmark found, in percent."""
    text = []
    for file, record in records(name).items():
        rows = [
            [row["contender"], f"{100 * row['mean']:.1f} ± {100 * row['deviation']:.1f} %", str(row["n"])]
            for row in record["rows"]
            if "mean" in row
        ]
        text.append(table(["training", of, "seeds"], rows) + f"\nRecord: {{repo}}`benchmarks/results/{file}`.\n")
    return "\n".join(text)


def depth() -> str:
    """Returns what a step of nets of 20 to 1202 layers costs in a loop."""
    text = []
    for file, record in records("depth").items():
        rows = []
        for row in record["rows"]:
            if "compile_seconds" in row:
                figures = (f"{row['compile_seconds']:.1f}", f"{row['temporary_mib']:.0f}", f"{row['median']:.2f}")
                rows.append([row["case"], row["contender"], *figures])
        head = ["network", "how", "compile, s", "memory beside the state, MiB", "a step, s"]
        lines = table(head, rows).replace("---: |", "--- |", 1)
        text.append(lines + f"\nRecord: {{repo}}`benchmarks/results/{file}`.\n")
    return "\n".join(text)


def benchmarks(repository: str | None) -> str:
    """Returns the page on benchmarks, with a sentence that says what it is for."""
    title, rest = relinked(ROOT / "benchmarks" / "README.md", repository).split("\n", 1)
    about = "How fast this package is beside PyTorch and Flax's example, and how to measure it yourself."
    return f"{title}\n\n{about}\n{rest}"


def relinked(path: Path, repository: str | None) -> str:
    """Returns a page from elsewhere in the repository, its links changed to lead from `docs/`.

    Without the repository's address, links to pictures and records download them.
    """

    def link(found: re.Match[str]) -> str:
        mark, words, target = found[1], found[2], found[3]
        if re.match(r"https?://|#", target):
            return found[0]
        place, _, anchor = target.partition("#")
        there = (path.parent / place).resolve()
        if mark:
            return f"![{words}](../{there.relative_to(ROOT)})"
        if there.parent == DOCS and there.suffix == ".md":
            return f"[{words}]({there.name}{'#' + anchor if anchor else ''})"
        if repository:
            return f"[{words}]({repository}/blob/main/{there.relative_to(ROOT)})"
        return f"[{words}](../{there.relative_to(ROOT)})" if there.is_file() and there.suffix != ".md" else words

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, path.read_text(encoding="utf-8"))


def tests_by_name() -> dict[str, tuple[str, int]]:
    """Returns name of a test -> its file, as seen from the repository, and its line."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if test := re.match(r"def (test_\w+)", line):
                found[test[1]] = (str(path.relative_to(ROOT)), number)
    return found


def proofs() -> str:
    """Returns the source of each test that a page names."""
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")))
    text, tests = [], tests_by_name()
    named = set(re.findall(r"\{test\}`(\w+)`", pages)) & set(tests)
    for path in dict.fromkeys(tests[name][0] for name in sorted(named, key=tests.get)):
        text.append(f"## {path}\n")
        for name in sorted((name for name in named if tests[name][0] == path), key=lambda name: tests[name][1]):
            text.append(f"({name})=\n### {name}\n\n```{{literalinclude}} ../{path}\n:pyobject: {name}\n```\n")
    return "\n".join(text)


def executed_pages() -> list[Path]:
    """Returns the pages that are notebooks."""
    begins = "---\nfile_format: mystnb"
    return [path for path in sorted(DOCS.glob("*.md")) if path.read_text(encoding="utf-8").startswith(begins)]


def write_notebooks(folder: Path, repository: str | None) -> None:
    """Writes the pages that are executed as notebooks of Jupyter, with a first cell that installs the package."""
    import nbformat
    from myst_nb.core.read import read_myst_markdown_notebook

    folder.mkdir(exist_ok=True)
    name = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    source = f"{name} @ git+{repository}" if repository else name
    for path in executed_pages():
        text = path.read_text(encoding="utf-8")
        notebook = read_myst_markdown_notebook(text)
        notebook.cells.insert(1, nbformat.v4.new_code_cell(f'%pip install --quiet "{source}"'))
        nbformat.write(notebook, folder / f"{path.stem}.ipynb")
