"""A run as evidence: a sound one passes, and forgeries are called what they are."""

import dataclasses
import json
import shutil
import signal

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from PIL import Image

from resnet_jax.cli import main
from resnet_jax.config import InputError, ParallelConfig, TrainConfig
from resnet_jax.recipe_files import load_config
from resnet_jax.runs.report_page import make_report
from resnet_jax.runs.signals import Stop, Stopped
from resnet_jax.training import loop
from resnet_jax.training.build import build_model, sharded_shapes, state_maker
from resnet_jax.training.checkpoints import Checkpoints, read_checkpoint
from resnet_jax.training.sharding import make_mesh
from resnet_jax.training.verify import Verification, verify
from resnet_jax.training.verify_compare import Rounding, compare_arrays, measure_growth, relative_distance, same_figure

pytestmark = pytest.mark.xdist_group("verify")  # one process makes what they share


def recipe(seed=0, **train):
    """Twelve steps with a checkpoint each four, and evaluations and lines at other steps than those."""
    base = load_config("digits_resnet20")
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, name="cifar_resnet8"),
        augment=dataclasses.replace(base.augment, flip="random", mixup=0.2),
        train=TrainConfig(
            **{
                "steps": 12,
                "batch_size": 32,
                "ema_decay": 0.9,
                "eval_every_epochs": 0.17,
                "seed": seed,
                "steps_per_call": 2,
            }
            | train
        ),
        schedule=dataclasses.replace(base.schedule, warmup_epochs=0.1),
        parallel=ParallelConfig(devices=1),
        checkpoint=dataclasses.replace(base.checkpoint, every_steps=4, keep=9),
        log=dataclasses.replace(base.log, every_steps=3, tensorboard=False, report=False),
    )


def stopped_after(calls):
    """A signal that comes after so many calls of the compiled steps."""
    left = iter(range(calls))

    def due(stop):
        stop.signal = None if next(left, None) is not None else signal.SIGTERM
        return stop.asked()

    return due


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that a signal stopped at step 11, at which nothing else happens; and that of another seed."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "due", stopped_after(6))
        with pytest.raises(Stopped, match="after step 11"):
            loop.train(recipe(), folder / "0")
    loop.train(recipe(), folder / "0")
    loop.train(recipe(1), folder / "1")
    return folder


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the first run, to be changed."""
    return shutil.copytree(runs / "0", tmp_path / "run")


def contents(folder):
    """Bytes and times of all files of a folder."""
    return {str(p): (p.is_file() and p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def rewrite(path, change):
    """Changes what a JSON file holds."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def read(folder, step):
    """State and record of a checkpoint."""
    config = recipe()
    shapes = sharded_shapes(state_maker(config, build_model(config, 10), lambda step: 0.0), make_mesh(1))
    return read_checkpoint(folder, lambda _: shapes, str(step))


def write(folder, step, state, record):
    """Puts a checkpoint with a manifest of its own in the place of another one."""
    with Checkpoints(folder, 99) as checkpoints:
        checkpoints.save(step, state, record)


def named(report):
    """Where, and at which steps, something differs."""
    return [(difference.where, difference.step) for difference in report.differences]


def test_a_sound_run_passes_bit_by_bit_and_nothing_in_it_is_touched(runs):
    before = contents(runs / "0")
    report = verify(runs / "0", "all")
    assert report.ok and report.exact and not report.notes, str(report)
    assert {4, 8, 11, 12} <= set(report.kept) and report.replayed[0][0] == 0 and report.replayed[-1] == (11, 12)
    assert contents(runs / "0") == before


def test_edited_missing_and_added_lines_summary_and_best_are_each_named(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_place = {(line["step"], "train/loss" in line): line for line in lines if "test/loss" not in line}
    by_place[3, True]["train/loss"] *= 0.99
    by_place[6, True]["learning_rate"] *= 1.001
    by_place[6, False]["validation/accuracy"] += 1e-9
    lines.remove(by_place[9, True])
    lines.insert(2, {"step": 5, "epoch": 5 / 36, "train/loss": 1.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rewrite(run / "best.json", lambda best: best.update(step=4))
    rewrite(run / "summary.json", lambda summary: summary["ema/test"].update(accuracy=0.99))
    report = verify(run, "all")
    says = {place: difference.what for place, difference in zip(named(report), report.differences, strict=True)}
    edited = [("metrics.jsonl", step) for step in (3, 5, 6, 6, 9)]
    assert named(report) == [*edited, ("best.json", None), ("summary.json", None)] and report.exact, str(report)
    assert "line of training was edited: train/loss" in says["metrics.jsonl", 3]
    assert "there is a line of training that the replay does not write" in says["metrics.jsonl", 5]
    assert "line of validation was edited: validation/accuracy" in says["metrics.jsonl", 6]
    assert "line of training is missing" in says["metrics.jsonl", 9]
    assert "of step 4, and the best line" in says["best.json", None]
    assert "ema/test/accuracy is 0.99, and evaluating" in says["summary.json", None]


def test_a_swapped_checkpoint_and_a_changed_bit_are_named_and_nothing_beside_them(runs, run):
    shutil.rmtree(run / "checkpoints" / "8")
    shutil.copytree(runs / "1" / "checkpoints" / "8", run / "checkpoints" / "8")
    state, record = read(run, 12)
    kernel = np.array(state.params["head"]["kernel"])
    kernel.view(np.uint32)[2, 3] ^= 1
    state.params["head"]["kernel"] = jax.numpy.asarray(kernel)
    write(run, 12, state, record)
    report = verify(run, "all")
    assert named(report) == [("checkpoints/8", 8), ("checkpoints/8", 8), ("checkpoints/12", 12)], str(report)
    recipe_says, arrays_say, bit = (difference.what for difference in report.differences)
    assert "another run's" in recipe_says and "train.seed: 0 -> 1" in recipe_says
    assert "swapped, or trained otherwise" in arrays_say
    assert "1 of its values was changed: params/head/kernel[2, 3] is" in bit


def test_a_recipe_is_held_against_the_checkpoints_and_both_against_the_replay(run):
    rewrite(run / "config.json", lambda config: config["optimizer"].update(learning_rate=0.2))
    report = verify(run, 0)
    assert named(report) == [("config.json", None)] and "learning_rate: 0.1 -> 0.2" in report.differences[0].what

    for step in report.kept:
        state, record = read(run, step)
        record["recipe"]["optimizer"]["learning_rate"] = 0.2
        write(run, step, state, record)
    report = verify(run, 1, seed=0)
    ((_, end),) = report.replayed
    assert named(report)[0] == (f"checkpoints/{end}", end) and report.differences[0].step == end, str(report)


def test_other_versions_and_devices_are_named_and_compared_within_rounding(runs, run):
    """The run of one device says that it had three: its replay takes the two over which a batch divides."""

    def change(summary):
        summary["versions"]["flax"], summary["device"] = "0.1.0", "3 x cpu"

    rewrite(run / "summary.json", change)
    write(run, 8, read(runs / "1", 12)[0].replace(step=np.int32(8)), read(run, 8)[1])
    report = verify(run, 2, seed=23)
    assert report.replayed == ((0, 4), (6, 8)) and not report.exact
    assert named(report)[0] == ("checkpoints/8", 8) and len(report.differences) <= 2, str(report)
    assert any("steps 6 to 8: a change of the last bit grows to" in note for note in report.notes)
    assert "swapped, or trained otherwise" in report.differences[0].what
    assert any("flax 0.1.0" in note for note in report.notes)
    assert any("on 3 x cpu, and the replay on 2 x cpu" in note for note in report.notes)


def test_a_changed_picture_is_named_and_data_may_lie_elsewhere(tmp_path):
    random = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "data" / ("train" if i < 16 else "test") / "ab"[i % 2] / f"{i}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8)).save(path)
    config = recipe(steps=2, batch_size=8, metric="none", ema_decay=None)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, dataset=f"folder:{tmp_path / 'data'}"),
        schedule=dataclasses.replace(config.schedule, warmup_epochs=0.0),
    )
    loop.train(config, tmp_path / "run")
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    Image.fromarray(random.integers(0, 255, (8, 9, 3), np.uint8)).save(tmp_path / "data/train/a/0.bmp")
    assert verify(tmp_path / "run", 0, data=f"folder:{tmp_path / 'moved'}").ok
    report = verify(tmp_path / "run", "all")
    assert named(report)[:2] == [("data", None), ("checkpoints/2", 2)], str(report)
    assert "train: 1 of those looked at have another size or content" in report.differences[0].what


class Small(nn.Module):
    """A network of the user's own, with dropout."""

    width: int = 16

    @nn.compact
    def __call__(self, images, train):
        hidden = nn.relu(nn.Dense(self.width)(images.reshape(len(images), -1)))
        return nn.Dense(10)(nn.Dropout(0.3, deterministic=not train)(hidden))


def test_a_run_with_parts_of_its_users_own_needs_them_and_names_others(tmp_path):
    run = tmp_path / "run"
    loop.train(recipe(steps=6, metric="none", ema_decay=None), run, model=Small(), optimizer=optax.adam(1e-3))
    assert verify(run, "all", model=Small(), optimizer=optax.adam(1e-3)).ok
    with pytest.raises(InputError, match=r"parts of its user's own: model \(.*Small\)"):
        verify(run, 0, optimizer=optax.adam(1e-3))
    report = verify(run, 1, seed=0, model=Small(17), optimizer=optax.adam(1e-3))
    assert report.replayed == ((4, 6),) and named(report) == [("parts", None), ("checkpoints/6", 6)], str(report)
    assert "source of model" in report.differences[0].what
    assert "of another model: params/Dense_0/bias is (16,)" in report.differences[1].what


def test_edited_figures_of_the_report_are_named_without_a_replay_and_the_headline_says_so(run):
    head = str(Verification("runs/a", (4, 8), (), True, None)).splitlines()[0]
    assert "no step was replayed" in head and "nothing differs" not in head
    make_report(run)
    rewrite(run / "measures.json", lambda held: held.update(accuracy=0.9))
    rewrite(run / "measures.json", lambda held: held["calibrated"].update(ece=0.0))
    rewrite(run / "calibration.json", lambda held: held.update(temperature=9.0))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    selected = json.loads((run / "summary.json").read_text())["selected"]
    (line,) = (line for line in lines if line["step"] == selected and "validation/loss" in line)
    line["validation/loss"] += 1.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = verify(run, 0)
    files = ["metrics.jsonl", "measures.json", "measures.json", "calibration.json"]
    assert named(report) == [("metrics.jsonl", selected), *((file, None) for file in files[1:])], str(report)
    assert "4 things differ; no step was replayed" in str(report).splitlines()[0]
    line, accuracy, ece, temperature = (difference.what for difference in report.differences)
    assert "and evaluating the checkpoint of step" in line and "replay" not in line
    assert "accuracy is 0.9, and evaluating the checkpoint gives 0." in accuracy
    assert "calibrated/ece is 0.0" in ece and "temperature is 9.0" in temperature


def test_the_command_ends_with_0_1_or_2(run, tmp_path, capsys):
    assert main(["verify", str(run), "--intervals", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    (run / "checkpoints" / "8" / "record" / "metadata").write_text("{}")
    assert main(["verify", str(run), "--intervals", "0"]) == 1
    assert "DIFFERS  checkpoints/8: record/metadata has" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "none")]) == 2 and "holds no run" in capsys.readouterr().err
    with pytest.raises(InputError, match="intervals -1"):
        verify(run, -1)


def test_arrays_that_differ_by_rounding_alone_are_told_from_changed_ones():
    before = {"params/a": np.zeros((4, 4), np.float32), "params/b": np.ones(4, np.float32)}
    after = {name: array + 1 for name, array in before.items()}
    rounded = {name: array * np.float32(1.0001) for name, array in after.items()}
    trained = {name: array * np.float32(1.5) for name, array in after.items()}
    for exact, replayed, words in (
        (True, after, None),
        (True, rounded, "by rounding alone"),
        (False, rounded, None),
        (True, trained, "swapped"),
        (False, trained, "swapped"),
    ):
        found = compare_arrays(Rounding(exact, 1.0), after, replayed, before, 0, 4)
        assert found == [] if words is None else words in found[0]


def test_rounding_that_training_amplifies_is_measured_and_allowed():
    before = {"params/a": np.zeros((4, 4), np.float32)}
    kept, replayed, nudged = ({"params/a": np.full((4, 4), x, np.float32)} for x in (1.2, 1.0, 1.1))
    lines = [{"step": 3, "train/loss": 2.0, "learning_rate": 0.1}], [{"step": 3, "train/loss": 2.1, "learning_rate": 1}]
    plain = Rounding(False, 1.0)
    measured = measure_growth(plain, (replayed, nudged), lines)
    assert compare_arrays(plain, kept, replayed, before, 0, 4) and not same_figure(plain, "train/loss", 2.3, 2.0)
    assert not compare_arrays(measured, kept, replayed, before, 0, 4) and same_figure(measured, "train/loss", 2.3, 2.0)
    assert not same_figure(measured, "train/loss", 2.9, 2.0) and not same_figure(measured, "learning_rate", 0.2, 0.1)
    assert relative_distance(replayed, nudged, before) == pytest.approx(0.1, rel=1e-5)
