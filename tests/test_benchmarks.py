import json
import os
import re
import time
from itertools import groupby
from types import SimpleNamespace

import pytest

from benchmarks import epoch, inference, measure, tables, train_step
from benchmarks.limits import forward_flops
from resnet_jax.models.registry import create_model

from .conftest import ROOT


def sleeper(seconds, log):
    def call():
        with open(log, "a") as file:
            file.write(f"{seconds}\n")
        time.sleep(seconds)

    return call


def reporter():
    return lambda: {"seconds": 2.0, "accuracy": 0.5}


def broken():
    raise RuntimeError("no such device")


def setting():
    return lambda: {"seconds": float(os.environ["A_SETTING"])}


def test_contenders_take_turns_and_failures_are_kept(tmp_path):
    log = str(tmp_path / "log")
    contenders = [
        measure.Contender("slow", sleeper, {"seconds": 0.05, "log": log}),
        measure.Contender("broken", broken),
        measure.Contender("fast", sleeper, {"seconds": 0.01, "log": log}),
        measure.Contender("own clock", reporter),
        measure.Contender("setting", setting, environment={"A_SETTING": "4"}),
    ]
    results = measure.alternate(contenders, rounds=3, settle=0.03)
    turns = [(call, len(list(calls))) for call, calls in groupby((tmp_path / "log").read_text().split())][-6:]
    assert turns[::2] == [("0.05", 2)] * 3
    assert [call for call, _ in turns[1::2]] == ["0.01"] * 3
    assert all(1 < count < 5 for _, count in turns[1::2])
    assert len(results["slow"]["seconds"]) == 3
    assert results["broken"] == {"error": "RuntimeError: no such device"}
    assert all(seconds >= 0.05 for seconds in results["slow"]["seconds"])
    assert results["own clock"]["kept"] == [{"accuracy": 0.5}] * 3
    assert results["setting"]["seconds"] == [4.0] * 3
    assert "A_SETTING" not in os.environ


def test_rows_are_medians_and_ratios_of_the_same_case():
    def result(*seconds):
        return {"seconds": list(seconds), "kept": [], "setup": 1.0}

    rows = [
        measure.row("case", "resnet_jax", result(1.0, 2.0, 4.0), 8, "images"),
        measure.row("case", "torch", result(4.0, 4.0, 4.0), 8, "images"),
        measure.row("case", "missing", {"error": "none"}, 8, "images"),
    ]
    rows = measure.with_ratios(rows)
    assert rows[0]["median"] == 4.0
    assert rows[0]["quartiles"] == [2.0, 8.0]
    assert rows[1]["ours_over_this"] == 2.0
    assert "ours_over_this" not in rows[2]


def test_epochs_are_timed_without_their_evaluations(monkeypatch):
    now, given = [0.0], []

    def advance(count):
        given.append(count)
        now[0] += count

    def accuracy():
        now[0] += 1000.0
        return sum(given) / 250

    monkeypatch.setattr(epoch.time, "perf_counter", lambda: now[0])
    result = epoch.timed(250, advance, accuracy)
    assert given == [100, 100, 50]
    assert result == {"seconds": 250.0, "accuracy": 1.0, "curve": [(100.0, 0.4), (200.0, 0.8), (250.0, 1.0)]}
    assert [epoch.time_to(target, result["curve"]) for target in (0.3, 0.8, 1.1)] == [100.0, 200.0, None]


def test_the_time_to_an_accuracy_that_a_seed_misses_is_no_figure():
    def result(*curves):
        return {"seconds": [9.0] * len(curves), "kept": [{"curve": curve} for curve in curves], "setup": 1.0}

    flags = SimpleNamespace(target=0.7, epochs=2)
    came = epoch.to_target("net", "torch", result([(4.0, 0.7)], [(4.0, 0.6), (8.0, 0.8)]), flags)
    assert came["quartiles"] == [1 / 8, 1 / 4]
    assert "1 of 2 seeds" in epoch.to_target("net", "torch", result([(4.0, 0.7)], [(4.0, 0.6)]), flags)["error"]
    assert epoch.to_target("net", "torch", {"error": "no such device"}, flags)["error"] == "no such device"


@pytest.mark.parametrize(("name", "gmacs"), [("resnet50", 4.089), ("resnext50_32x4d", 4.230), ("resnet18", 1.814)])
def test_operations_are_those_that_torchvision_gives(name, gmacs):
    """Its weights' `_ops`: giga multiply-adds of one image of 224 pixels."""
    assert forward_flops(create_model(name), 224) / 2e9 == pytest.approx(gmacs, abs=5e-4)


@pytest.mark.parametrize("script", [train_step, inference])
@pytest.mark.parametrize("gpu", [None, "NVIDIA H200"])
def test_every_case_ends_in_a_record(script, gpu, tmp_path, monkeypatch):
    """On a GPU too, where a run costs most; nothing is timed."""

    def timed(contenders, rounds, **more):
        return {c.name: {"seconds": [1.0] * rounds, "kept": [{}] * rounds, "setup": 1.0} for c in contenders}

    found = measure.hardware() | {"gpu": gpu, "short": "it"}
    for module in (script, measure):
        monkeypatch.setattr(module, "hardware", lambda: found, raising=False)
        monkeypatch.setattr(module, "has_gpu", lambda: gpu is not None)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "alternate", timed)
    monkeypatch.setattr(script, "measure_limits", lambda dtype: {"flops": 1e12, "bytes": 1e11})
    monkeypatch.setattr("sys.argv", ["benchmark"])
    script.main()
    (file,) = tmp_path.iterdir()
    rows = json.loads(file.read_text())["rows"]
    assert len({row["case"] for row in rows}) == len(script.ON_GPU if gpu else script.ON_CPU)
    assert all(row["roofline"] > 0 for row in rows)
    ours = [row for row in rows if row["contender"] == "resnet_jax" and "of_published" in row]
    assert [row["of_published"] for row in ours] == ([256 / 8000] if gpu and script is train_step else [])


@pytest.mark.parametrize(
    ("processor", "vectors", "short"),
    [
        ("AMD EPYC 9R14", "avx512f", "cpu8-amd-avx512"),
        ("Intel(R) Xeon(R) Processor", "avx2", "cpu8-intel-avx2"),
        ("Neoverse-N1", None, "cpu8"),
    ],
)
def test_a_record_of_one_processor_does_not_overwrite_that_of_another(processor, vectors, short):
    assert measure.short_name(processor, vectors, 8) == short


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.stem)
def test_results_say_where_they_come_from(path):
    record = json.loads(path.read_text())
    assert record["command"].startswith("python -m benchmarks.")
    assert re.fullmatch(r"[0-9a-f]{7,}(\+changes)?", record["commit"])
    on = record["hardware"]
    assert {"processor", "cores", "gpu"} <= set(on)
    short = on["gpu"] and on["gpu"].lower().replace(" ", "-")
    assert path.stem.endswith("-" + (short or measure.short_name(on["processor"], on.get("vectors"), on["cores"])))
    assert {"jax", "jaxlib", "python"} <= set(record["versions"])
    counted = {"target", "precision", "found"}  # what a compiler counts, or what was found
    timed = [row for row in record["rows"] if not counted & set(row)]
    assert all("error" in row or {"median", "quartiles", "n", "unit"} <= set(row) for row in timed)


@pytest.mark.parametrize("path", tables.PAGES, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_tables_of_the_pages_are_what_the_script_makes_of_the_records(path):
    page = path.read_text()
    assert "<!-- table: " in page
    assert page == tables.filled(page, tables.read_records()), "run python -m benchmarks.tables"


def test_every_record_is_named_with_the_commit_that_it_measured():
    named = [name for page in tables.PAGES for name in re.findall(r"<!-- table: (\w+) -->", page.read_text())]
    assert sorted(named) == sorted(tables.TABLES)
    page = (ROOT / "benchmarks" / "README.md").read_text()
    for name, record in tables.read_records().items():
        assert f"[{record['commit']}](results/{name}.json)" in page
    assert set(re.findall(r"results/([\w-]+)\.json", page)) == set(tables.read_records())


def test_another_figure_or_script_changes_the_tables():
    records = {name: record for name, record in tables.read_records().items() if not name.startswith("sweep")}
    kept = dict(records)
    page = "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("measures", "others", "findings"))
    before = tables.filled(page, records)
    assert "|the same, warm cache, s|4.0|" in before and "|contender|" not in before
    overhead = records["overhead-cpu2-amd-avx512"]
    longer = [row | {"median": 7777.0} for row in overhead["rows"]]
    swept = {"case": "digits", "contender": "8 runs at once", "median": 2.5, "unit": "runs/s", "n": 3}
    twins = {"case": "twins", "contender": "all pairs across splits", "precision": 0.9, "chance": 1e-5, "n": 50}
    records |= {"overhead-cpu2-amd-avx512": overhead | {"rows": longer}, "own-cpu2-amd-avx512": {"rows": [swept]}}
    records |= {"inspect-cpu2-amd-avx512": {"rows": [twins]}}
    after = tables.filled(before, records)
    assert "|twins, all pairs|90.0%|1e-05|50|" in after
    assert "|the same, five a call, µs|7777|" in after
    assert "|own: digits|8 runs at once|AMD/AVX512|2.5 runs/s|3|" in after
    assert tables.filled(after, kept) == before
