"""`python -m benchmarks.tables`: writes the tables of the pages anew, out of the records in `results/`.

A table stands in a page between `<!-- table: NAME -->` and `<!-- end -->`. A record of a script that no table names
appears in the table `others` by itself.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.measure import RESULTS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "plan.md")

KINDS = {
    "nvidia-h200": "NVIDIA H200",
    "cpu2-amd-avx512": "AMD/AVX512",
    "cpu2-intel-avx512": "Intel/AVX512",
    "cpu2-amd-avx2": "AMD/AVX2",
    "cpu2-amd": "AMD",
}
"""Ends of the records' names -> hardware as the tables call it, in their order; `cpu2` is two cores."""

OPPONENTS = ("torch eager", "torch.compile", "Flax's example", "torch eager, our memory")

FROM_DISK, SAVES = "train resnet50 from the disk, batch 16", "resnet50 224 batch 16"
VIRTUAL = "train cifar_resnet20 float32 64 a device"
RATIO = ("ours_over_this", "{:.2f}")
SECONDS, HUNDREDTHS, WHOLE = (("median", form) for form in ("{:.1f}", "{:.2f}", "{:.0f}"))
MEASURES = (
    ("decode and crop on one core, times torchvision", "input", "one core", "torchvision", *RATIO),
    ("loader of one worker, times torch's", "input", "loader, 1 workers", "torch", *RATIO),
    ("loader of two workers, times torch's", "input", "loader, 2 workers", "torch", *RATIO),
    ("resnet50 fed from the disk, times from memory", "input", FROM_DISK, "synthetic data", *RATIO),
    ("first step of the digits, cold cache, s", "startup", "first step of the digits", "cold", *SECONDS),
    ("the same, warm cache, s", "startup", "first step of the digits", "warm", *SECONDS),
    ("importing jax, flax, optax, s", "startup", "import jax, flax, optax", "resnet_jax", *HUNDREDTHS),
    ("host time of a step, one a call, µs", "overhead", "host time of a step, 1 a call", "resnet_jax", *WHOLE),
    ("the same, five a call, µs", "overhead", "host time of a step, 5 a call (the default)", "resnet_jax", *WHOLE),
    ("two virtual devices, times one", "scaling", VIRTUAL, "2 virtual devices", "over_one", "{:.2f}"),
    ("read resnet152.safetensors, times torch", "weights", "read resnet152.safetensors", "torch", *RATIO),
    ("read resnet152.pth, times torch", "weights", "read resnet152.pth", "torch", *RATIO),
    ("a save of resnet50 holds the loop, s", "checkpoint", SAVES, "loop held by a save", *HUNDREDTHS),
    ("a save that is waited for, s", "checkpoint", SAVES, "save, waited for", *SECONDS),
    ("a restore with its checks, s", "checkpoint", SAVES, "checked and restored", *SECONDS),
)
"""Rows of the table `measures`: label, script, case, contender, field of the record's row, format."""

FINDINGS = (
    ("wrong labels", "labels", "all classes"),
    ("wrong labels, by the confident joint", "labels", "off the confident joint's diagonal"),
    ("twins, all pairs", "twins", "all pairs across splits"),
    ("twins, pairs with a planted picture", "twins", "pairs with a planted picture"),
)
"""Rows of the table `findings`: label, case and contender in the records of `inspect`."""

SPEED = (
    ("train_step-nvidia-h200", "train resnet50 bfloat16 batch 256"),
    ("train_step-cpu2-amd-avx512", "train resnet50 float32 batch 16"),
    ("train_step-cpu2-intel-avx512", "train resnet50 float32 batch 16"),
    ("train_step-cpu2-amd-avx512", "train cifar_resnet20 float32 batch 128"),
    ("inference-cpu2-amd-avx512", "infer resnet50 float32 batch 64"),
    ("input-cpu2-amd-avx512", "loader, 2 workers"),
)
"""Rows of the table `speed`, in the project's README: record, case."""

Records: TypeAlias = Mapping[str, dict[str, Any]]
"""Name of a record without `.json` -> what it holds."""


def read_records(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Returns all records of a folder by their names, sorted."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def parts_of(name: str) -> tuple[str, str]:
    """Returns script and hardware of a record's name: `train_step-nvidia-h200` -> train_step, NVIDIA H200."""
    script, _, kind = name.partition("-")
    return script, next((label for end, label in KINDS.items() if kind.endswith(end)), kind)


def order(hardware: str) -> tuple[int, str]:
    """Returns where a kind of hardware stands; those that KINDS does not name come last."""
    labels = list(KINDS.values())
    return (labels.index(hardware) if hardware in labels else len(labels)), hardware


def of_script(records: Records, script: str) -> dict[str, dict[str, Any]]:
    """Returns hardware -> record of a script, in the order of KINDS."""
    found = {parts_of(name)[1]: record for name, record in records.items() if parts_of(name)[0] == script}
    return dict(sorted(found.items(), key=lambda item: order(item[0])))


def row_of(record: Mapping[str, Any], case: str, contender: str) -> dict[str, Any]:
    """Returns a row of a record, or nothing where it has none."""
    return next((r for r in record["rows"] if (r["case"], r.get("contender")) == (case, contender)), {})


def shown(row: Mapping[str, Any], field: str, form: str) -> str:
    """Returns a figure as text, a dash where there is none."""
    return form.format(row[field]) if field in row else "–"


def number(value: float) -> str:
    """Returns three figures of a number: 8,368 or 56.4 or 3.97."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a table in Markdown; columns with a figure in them stand on the right."""
    columns, rows = list(columns), [list(row) for row in rows]
    figures = [any(row[i][:1].isdigit() for row in rows) for i in range(len(columns))]
    rule = ["---:" if i and figure else "---" for i, figure in enumerate(figures)]
    lines = [columns, rule, *rows]
    return "\n".join("|" + "|".join(line) + "|" for line in lines)


def networks(records: Records) -> str:
    """Returns the table of training and inference: images a second of ours, and how many times as fast as each
    opponent.
    """
    rows = []
    for script in ("train_step", "inference"):
        for kind, record in of_script(records, script).items():
            for ours in (r for r in record["rows"] if r["contender"] == "resnet_jax"):
                others = [shown(row_of(record, ours["case"], name), "ours_over_this", "{:.2f}") for name in OPPONENTS]
                share = shown(ours, "roofline", "{:.0%}").replace("%", "")
                case = ours["case"].replace(" float32", "").replace(" batch ", ", ")
                rows.append([case, kind, number(ours["median"]), *others, share, str(ours["n"])])
    return table(["case, batch", "hardware", "images/s", *OPPONENTS, "limit, %", "n"], rows)


def measures(records: Records) -> str:
    """Returns the table of everything else that is timed, one row a figure, one column a kind of hardware."""
    scripts = sorted({script for _, script, *_ in MEASURES})
    kinds = sorted({kind for script in scripts for kind in of_script(records, script)}, key=order)
    rows = []
    for label, script, case, contender, field, form in MEASURES:
        on = of_script(records, script)
        cells = [shown(row_of(on[kind], case, contender), field, form) if kind in on else "–" for kind in kinds]
        if any(cell != "–" for cell in cells):
            rows.append([label, *cells])
    return table(["", *kinds], rows)


def epochs(records: Records) -> str:
    """Returns the table of accuracies of both sides after equally many epochs with one recipe, and PyTorch's time over
    ours.
    """
    rows = []
    for kind, record in of_script(records, "epoch").items():
        for ours in record["rows"]:
            if ours["contender"] != "resnet_jax" or "accuracy_mean" not in ours:
                continue
            theirs = row_of(record, ours["case"], "torch eager")
            accuracies = [f"{r['accuracy_mean']:.1%} ± {r['accuracy_deviation']:.1%}" for r in (ours, theirs)]
            ratio = f"{theirs['ours_over_this']:.2f}"
            rows.append([ours["case"].replace("1 epochs", "1 epoch"), kind, *accuracies, ratio])
    return table(["", "hardware", "ours", "PyTorch", "its time over ours"], rows)


def accuracies(records: Records) -> str:
    """Returns the table of means over seeds of fine-tuning on few pictures and of balancing unequal classes."""
    rows = []
    for script in ("finetune", "imbalance"):
        for record in of_script(records, script).values():
            for r in record["rows"]:
                what = {"transfer": "few pictures", "imbalance": "unequal classes"}[r["case"]]
                mean = f"{r['mean']:.1%} ± {r['deviation']:.1%}"
                rows.append([f"{what}: {r['contender']}", r["unit"].replace("_", " "), mean, str(r["n"])])
    return table(["", "measure", "mean ± deviation", "n"], rows)


def depth(records: Records) -> str:
    """Returns the table of steps of deep networks in a loop: time to compile, memory, time of a step."""
    rows = []
    for record in of_script(records, "depth").values():
        for r in record["rows"]:
            if "compile_seconds" in r:
                cells = [f"{r['compile_seconds']:.1f}", f"{r['temporary_mib']:.0f}", f"{r['median']:.2f}"]
                rows.append([r["case"].removesuffix(" batch 8"), r["contender"].removeprefix("scan, remat "), *cells])
    return table(["", "remat", "compile, s", "memory, MiB", "step, s"], rows)


def tpu(records: Records) -> str:
    """Returns the table of what a TPU's own compiler counts of a step of resnet50, ours and Flax's example."""
    rows = []
    for record in of_script(records, "tpu_cost").values():
        for r in record["rows"]:
            if "temporary" in r:
                cells = [f"{r['flops'] / 1e9:.0f}", f"{r['bytes_accessed'] / 1e9:.2f}", f"{r['peak'] / 2**20:.0f}"]
                rows.append([r["network"], *cells])
    return table(["", "GFLOP", "GB accessed", "peak, MiB"], rows)


def plans(records: Records) -> str:
    """Returns the table of what `plan --target` says of networks on slices of TPUs, and how long the compiler took."""
    rows = []
    for record in of_script(records, "tpu_plan").values():
        for r in record["rows"]:
            bounds, moved = r["bounds"], sum(r["collectives"].values())
            cells = [str(r["devices"]), f"{r['peak'] / 1e9:.2f} of {bounds['hbm'] / 1e9:.0f}"]
            cells += [f"{r['flops_a_chip'] / 1e12:.2f}", f"{r['bytes_accessed'] / 1e9:.1f}", f"{moved / 1e6:.1f}"]
            bound = f"{1e3 * bounds['seconds']:.1f}, {bounds['limit']}"
            rows.append([r["model"], r["target"], *cells, bound, f"{r['compile_seconds']:.0f}"])
    figures = ["peak, GB", "TFLOP", "GB accessed", "MB reduced", "step at least, ms", "compile, s"]
    return table(["", "slice", "chips", *figures], rows)


def findings(records: Records) -> str:
    """Returns the table of what `resnet-jax inspect` found of wrong labels and twins that were planted."""
    rows = []
    for record in of_script(records, "inspect").values():
        for label, case, contender in FINDINGS:
            r = row_of(record, case, contender)
            rows += [[label, f"{r['precision']:.1%}", f"{r['chance']:.2g}", str(r["n"])]] if r else []
    return table(["planted", "precision", "by chance", "n"], rows) if rows else ""


def speed(records: Records) -> str:
    """Returns the few rows of the project's README."""
    rows = []
    for name, case in SPEED:
        record, kind = records[name], parts_of(name)[1]
        ours = row_of(record, case, "resnet_jax")
        torch = row_of(record, case, "torch eager") or row_of(record, case, "torch")
        others = [torch, *(row_of(record, case, other) for other in ("torch.compile", "Flax's example"))]
        ratios = [shown(r, "ours_over_this", "{:.2f}") for r in others]
        where = kind if record["hardware"]["gpu"] else f"{kind}, {record['hardware']['cores']} cores"
        source = f"[{record['commit']}](benchmarks/results/{name}.json)"
        rows.append([case.replace(" batch", ", batch"), where, number(ours["median"]), *ratios, source])
    return table(["", "hardware", "images/s", "PyTorch", "torch.compile", "Flax's example", "record"], rows)


def others(records: Records) -> str:
    """Returns every row of the scripts that no other table names."""
    rows = []
    for name, record in records.items():
        script, kind = parts_of(name)
        if script in NAMED:
            continue
        for r in (r for r in record["rows"] if "median" in r):
            figure = f"{number(r['median'])} {r['unit']}"
            cells = [r.get("contender", "–"), kind, figure, str(r["n"])]
            rows.append([f"{script}: {r['case']}", *cells])
    return table(["script: case", "contender", "hardware", "median", "n"], rows) if rows else ""


def sources(records: Records) -> str:
    """Returns which commit each record measured, by script and kind of hardware, with a link to it."""
    kinds = sorted({parts_of(name)[1] for name in records}, key=order)
    scripts = sorted({parts_of(name)[0] for name in records})
    cells = {parts_of(name): f"[{record['commit']}](results/{name}.json)" for name, record in records.items()}
    rows = [[f"`{script}`", *(cells.get((script, kind), "–") for kind in kinds)] for script in scripts]
    return table(["commit measured", *kinds], rows)


TABLES: dict[str, Callable[[Records], str]] = {
    "networks": networks,
    "measures": measures,
    "epochs": epochs,
    "accuracies": accuracies,
    "depth": depth,
    "tpu": tpu,
    "plans": plans,
    "findings": findings,
    "speed": speed,
    "others": others,
    "records": sources,
}
NAMED = {"train_step", "inference", "epoch", "finetune", "imbalance", "depth", "tpu_cost", "tpu_plan", "inspect"} | {
    script for _, script, *_ in MEASURES
}
"""Scripts whose records have a place in a table other than `others`."""


def filled(page: str, records: Records) -> str:
    """Returns the text of a page with its tables made anew.

    Raises:
      KeyError: it names a table that there is not.
    """
    pattern = r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{TABLES[m[2]](records)}\n{m[3]}", page, flags=re.DOTALL)


def main() -> None:
    """Writes the pages whose tables are others than the records say."""
    records = read_records()
    for path in PAGES:
        before = path.read_text()
        if (after := filled(before, records)) != before:
            path.write_text(after)
            print(f"written: {path}")


if __name__ == "__main__":
    main()
