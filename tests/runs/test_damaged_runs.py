"""Runs whose files are damaged or come from somebody else: commands name the file, and none ends in a traceback."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resnet_jax import cli
from resnet_jax.config import Config, InputError, LogConfig, TrainConfig, from_dict, to_dict
from resnet_jax.files import to_json
from resnet_jax.runs.trackers import Tracker, read_lines
from resnet_jax.training import loop
from resnet_jax.training.checkpoints import Checkpoints, unreadable_is_damaged
from resnet_jax.training.evaluation import better
from resnet_jax.training.manifest import newest_sound, steps_in, write_manifest

from ..browser import Tags, needs_chromium, tags

pytestmark = pytest.mark.xdist_group("damaged_runs")  # one process makes what they share

RECIPE = dataclasses.replace(
    Config(),
    model=dataclasses.replace(Config().model, name="cifar_resnet8"),
    train=TrainConfig(steps=8, batch_size=32, eval_every_epochs=0.1, ema_decay=None),
    schedule=dataclasses.replace(Config().schedule, warmup_epochs=0.0),
    log=LogConfig(every_steps=2, tensorboard=False),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with two checkpoints, which no test changes, and a picture for it."""
    place = tmp_path_factory.mktemp("whole")
    config = dataclasses.replace(RECIPE, checkpoint=dataclasses.replace(RECIPE.checkpoint, keep=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        loop.train(config, "run")
    Image.new("L", (8, 8), 99).save(place / "picture.png")
    assert len(steps_in(place / "run" / "checkpoints")) >= 2
    return place


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "place", symlinks=True)
    return tmp_path / "place" / "run"


def nested(path):
    path.write_text("[" * 100_000)


DAMAGES = {
    "empty": lambda path: path.write_text(""),
    "cut": lambda path: path.write_text(path.read_text()[: len(path.read_text()) // 2]),
    "null": lambda path: path.write_text("null"),
    "list": lambda path: path.write_text("[1, 2]"),
    "text": lambda path: path.write_text('"text"'),
    "number": lambda path: path.write_text("1" + "0" * 400),
    "very long number": lambda path: path.write_text("1" + "0" * 5000),
    "nan": lambda path: path.write_text("NaN"),
    "empty object": lambda path: path.write_text("{}"),
    "other keys": lambda path: path.write_text('{"__proto__": {"a": 1}, "": null}'),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "nested": nested,
    "folder": lambda path: (path.unlink(), path.mkdir()),
}
"""What is done to a file."""


def ask(capfd, *arguments):
    """Status and words of a command; an exception would be a traceback."""
    status = cli.main([str(argument) for argument in arguments])
    told = capfd.readouterr()
    assert "Traceback" not in told.err
    return status, told.out, told.err


COMMANDS = {
    "runs": lambda run: ("runs", run.parent),
    "train": lambda run: ("train", "--workdir", run),
    "evaluate": lambda run: ("evaluate", run),
    "predict": lambda run: ("predict", run, run.parent / "picture.png"),
    "report": lambda run: ("report", run),
}


@pytest.fixture
def quick(monkeypatch):
    """Commands look at files as always and compute nothing: an evaluation gives the same for every state."""
    from resnet_jax.runs import report_page
    from resnet_jax.training import evaluation

    rng = np.random.default_rng(0)
    labels = np.arange(360, dtype=np.int32) % 10
    logits = rng.normal(size=(360, 10)).astype(np.float32)
    means = {"loss": 1.0, "accuracy": 0.5, "count": 360, "macro_recall": 0.5, "macro_f1": 0.5, "top5": 0.9}
    means |= {"class_accuracy": [0.5] * 10, "class_count": [36] * 10}
    means["predictions"] = evaluation.Predictions(np.arange(360), logits, labels)
    monkeypatch.setattr(
        evaluation, "make_evaluate", lambda _, __, ___, split, *____, **_____: lambda state: {split: dict(means)}
    )
    monkeypatch.setattr(report_page, "grad_cam", lambda *a: np.zeros((len(a[3]), 8, 8)))


NEWEST = "checkpoints/8/"
SLOW = ("cut", "list", "empty object", "folder")
TABLE = [
    ("config.json", {"runs": DAMAGES, "train": DAMAGES, "evaluate": DAMAGES, "report": SLOW}),
    ("lock", {"runs": DAMAGES}),
    ("summary.json", {"runs": DAMAGES, "report": SLOW}),
    ("calibration.json", {"predict": DAMAGES}),
    ("metrics.jsonl", {"runs": DAMAGES, "report": SLOW}),
    ("best.json", {"runs": DAMAGES, "evaluate": SLOW, "predict": SLOW}),
    (f"{NEWEST}manifest.json", {"runs": DAMAGES, "evaluate": SLOW, "predict": SLOW, "report": ["list"]}),
]
"""Files, the commands that read them, and the damages that are tried with each."""

SILENT = {("lock", damage) for damage in DAMAGES} | {("metrics.jsonl", "empty")}
"""What changes nothing that a command says: nobody holds a damaged lock, and no line may be there yet."""


@pytest.mark.parametrize(("name", "commands"), TABLE, ids=[name for name, _ in TABLE])
def test_a_damaged_file_is_named_by_every_command_that_reads_it(name, commands, whole, tmp_path, capfd, quick):
    for command, damages in commands.items():
        for damage in damages:
            run = tmp_path / f"{damage} {command}" / "run"
            shutil.copytree(whole, run.parent)
            if name == "lock":
                (run / name).write_text("{}")
            DAMAGES[damage](run / name)
            newest = ["--checkpoint", "latest"] if name.startswith(NEWEST) and command != "runs" else []
            status, out, err = ask(capfd, *COMMANDS[command](run), *newest)
            case = (damage, command, status, out, err)
            assert status == (2 if name == "config.json" and command != "runs" else 0) or damage == "folder", case
            if (name, damage) not in SILENT:
                assert name.removeprefix(NEWEST) in out + err and str(run) in out + err, case
                assert NEWEST not in name or "8" in out + err


WRONG = [{"a": []}, [[]], "text", 1e999, -(10**400), None, True]


def test_every_field_of_a_recipe_is_checked_and_named():
    """By its type; what is wrong among values of the right type, `check` says."""
    taken = 0
    for section, fields in to_dict(Config()).items():
        for field in [None, *fields]:
            for wrong in WRONG:
                values = json.loads(json.dumps(to_dict(Config())))
                (values if field is None else values[section])[section if field is None else field] = wrong
                error = ""
                try:
                    config = from_dict(values)
                except InputError as found:
                    error = str(found)
                if error:
                    assert (section if field is None else f"{section}.{field}") in error and len(error) < 300
                else:
                    taken += 1
                    assert field and getattr(getattr(config, section), field) == wrong
                    assert wrong in (None, True, "text"), (section, field, wrong)
    assert taken < 60


def test_a_recipe_is_the_same_after_its_file(tmp_path):
    config = dataclasses.replace(
        Config(),
        data=dataclasses.replace(Config().data, image_size=(32, 48), mean=(0, 0.5, 1)),
        optimizer=dataclasses.replace(Config().optimizer, rate_rules=(("head/.*", 1.0), (".*", 0.1))),
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_a_run_with_a_damaged_summary_gets_it_again(run, capfd, quick):
    before = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text('{"steps": "8"}')
    status, _, err = ask(capfd, "train", "--workdir", run)
    assert (
        status == 0 and f"WARNING: {run / 'summary.json'} is damaged: its content.steps is 'text'".split("'")[0] in err
    )
    after = json.loads((run / "summary.json").read_text())
    assert after["steps"] == before["steps"] and after["test"] == before["test"] and after["best"] == before["best"]


def test_no_line_that_can_be_read_is_dropped(run, capfd, quick):
    file, aside = run / "metrics.jsonl", run / "metrics.jsonl.damaged"
    lines = file.read_bytes().splitlines()
    bad = [b"{", b"[]", b'{"step": "7"}', b'{"step": 7, "a": "<b>"}', b"\xff\x00", b"[" * 100_000, b'{"step": 1']
    mixed = [bad[0], lines[0], bad[1], bad[2], lines[1], bad[3], *lines[2:], *bad[4:]]
    file.write_bytes(b"\n".join(mixed))
    (run / "summary.json").unlink()
    expected = [json.loads(line) for line in lines]
    assert read_lines(file) == expected
    status, _, err = ask(capfd, "train", "--workdir", run)
    assert status == 0 and f"{len(bad)} lines of {file} cannot be read and were moved to {aside}" in err
    assert [json.loads(line) for line in file.read_text().splitlines()] == expected
    assert sorted(aside.read_bytes().splitlines()) == sorted(bad)


def test_a_damaged_best_checkpoint_is_refused_where_it_is_asked_for(run, capfd, quick):
    best = json.loads((run / "summary.json").read_text())["best"]["step"]
    (run / "checkpoints" / str(best) / "manifest.json").write_text("[]")
    for command in ("evaluate", "predict", "report"):
        status, _, err = ask(capfd, *COMMANDS[command](run), "--checkpoint", "best")
        assert status == 2 and f"the checkpoint of step {best} in {run} is damaged: manifest.json" in err
    status, _, err = ask(capfd, "predict", run, run.parent / "picture.png")
    assert status == 0 and f"of step {best} in {run} is damaged" in err and "in place of the best one" in err


def test_a_checkpoint_that_is_deleted_while_it_is_read_gives_way_to_the_next(tmp_path):
    """By a run that goes on: whenever one is read, a newer one has come and it is gone."""
    read = []

    def save(step):
        (tmp_path / str(step)).mkdir()
        (tmp_path / str(step) / "state").write_text("{}")
        write_manifest(tmp_path / str(step))
        shutil.rmtree(tmp_path / str(step - 1), ignore_errors=True)

    def look(step):
        read.append(step)
        if step < 5:
            save(step + 1)
        with unreadable_is_damaged(tmp_path):
            return (tmp_path / str(step) / "state").read_text()

    save(1)
    assert newest_sound(tmp_path, look) == ("{}", {})
    assert read == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("step", [4, 8])
def test_a_run_goes_on_beside_a_damaged_checkpoint(step, run, capfd):
    """A newer one than it goes on from is set aside."""
    (run / "summary.json").unlink()
    (run / "checkpoints" / str(step) / "manifest.json").write_text("[]")
    status, _, err = ask(capfd, "train", "--workdir", run, "--log.no_report")
    assert status == 0 and (f"the checkpoint of step {step} is damaged (manifest.json is damaged" in err) == (step == 8)
    assert (run / "damaged" / f"{step}-0").is_dir() == (step == 8) and 8 in steps_in(run / "checkpoints")


LINKED = ["config.json", "metrics.jsonl", "metrics.jsonl.damaged", "summary.json", "curves.png", "report.html"]
LINKED += ["calibration.json", "measures.json", "config.json.new", "metrics.jsonl.new", "lock.new", "summary.json.new"]


def test_links_in_a_run_lead_nothing_out_of_it(run, capfd, quick):
    outside = run.parent / "outside"
    outside.mkdir()
    for name in LINKED:
        target = outside / name
        if (run / name).exists():
            shutil.copy(run / name, target)
            (run / name).unlink()
        else:
            target.write_text("as it was")
        (run / name).symlink_to(target)
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(outside / "metrics.jsonl")
    with (outside / "metrics.jsonl").open("a") as file:
        file.write("torn")
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    status, _, err = ask(capfd, "train", "--workdir", run)
    assert status == 0 and not any((run / name).is_symlink() for name in ("config.json", "metrics.jsonl")), err
    for command in ("train", "report", "runs"):
        ask(capfd, *COMMANDS[command](run))
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/8"])
def test_a_link_to_checkpoints_elsewhere_is_refused(name, run, capfd):
    (run / name).rename(run.parent / "elsewhere")
    (run / name).symlink_to(run.parent / "elsewhere")
    (run / "summary.json").unlink()
    for command in ("train", "evaluate", "predict", "report"):
        status, _, err = ask(capfd, *COMMANDS[command](run))
        assert status == 2 and f"{run / name} is a link to {run.parent / 'elsewhere'}" in err, (command, err)
    _, out, _ = ask(capfd, "runs", run.parent)
    assert "damaged" in out and "is a link to" in out
    link = run.parent / "link to the run"
    link.symlink_to(run)
    assert ask(capfd, "runs", run.parent)[0] == 0


def test_the_folder_of_a_run_may_be_a_link(run, capfd, quick):
    link = run.parent / "link"
    link.symlink_to(run)
    for command in ("train", "evaluate", "predict", "report"):
        assert ask(capfd, *COMMANDS[command](link))[0] == 0, command


ATTACK = "\"'><script>console.log('ran')</script><img src=x onerror=console.log('ran')>{body}{title}"


def with_attacks(value):
    """JSON with the attack in every text and behind every key."""
    if isinstance(value, dict):
        return {key: with_attacks(item) for key, item in value.items()} | {ATTACK: ATTACK}
    return ATTACK if isinstance(value, str) else value


def attacked(run):
    """A run from somebody who put a script wherever a text may stand."""
    run = run.rename(run.with_name(ATTACK.replace("/", "")))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(with_attacks(summary)))
    recipe = json.loads((run / "config.json").read_text())
    recipe["data"]["data_dir"] = recipe["model"]["pretrained"] = ATTACK
    recipe["optimizer"]["decay_rules"] = [[".*", 1.0], [ATTACK, 0.0]]
    (run / "config.json").write_text(json.dumps(recipe))
    with (run / "metrics.jsonl").open("a") as file:
        for line in ({ATTACK: 1.0}, {"train/loss": ATTACK}, {"images_per_second": ATTACK}, {"learning_rate": [ATTACK]}):
            file.write(json.dumps({"step": 8} | line) + "\n")
    return run


def test_nothing_of_a_run_becomes_part_of_the_page(run, capfd, quick):
    run = attacked(run)
    status, _, err = ask(capfd, "report", run)
    page = Tags()
    page.feed((run / "report.html").read_text())
    assert status == 0 and "script" not in page.count and page.count["body"] == 1, err
    text = (run / "report.html").read_text()
    assert page.rows["run"] > 10 and "&lt;script&gt;" in text and "<img src=x" not in text


@needs_chromium
def test_a_browser_runs_nothing_of_a_run(run, tmp_path, capfd, quick):
    run = attacked(run)
    assert ask(capfd, "report", run)[0] == 0
    shutil.copy(run / "report.html", tmp_path / "report.html")
    assert "script" not in tags(tmp_path / "report.html", tmp_path).count


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_files_hold_null_for_what_is_not_finite(value, tmp_path):
    text = to_json({"a": [value, {"b": (value, 1.5)}], "c": value})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, {"b": [None, 1.5]}], "c": None}
    tracker = Tracker(tmp_path, 0, tensorboard=False)
    tracker.write(3, {"train/loss": value, "train/accuracy": 0.5})
    tracker.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "train/loss": null, "train/accuracy": 0.5}\n'
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(3, {"params": jnp.ones(3)}, {"result": {"loss": value}})
    found = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert not any(b"NaN" in path.read_bytes() or b"Infinity" in path.read_bytes() for path in found)


@pytest.mark.parametrize("goal", ["min", "max"])
def test_what_is_not_a_number_is_never_the_best(goal):
    nan = float("nan")
    for new, old in ((nan, 0.5), (nan, nan), (nan, None), (None, 0.5), (None, None)):
        assert not better(goal, new, old)
    for old in (nan, None):
        assert better(goal, 0.5, old)
    assert better(goal, 0.4, 0.5) == (goal == "min") and better(goal, 0.5, 0.4) == (goal == "max")
