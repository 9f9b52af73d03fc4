import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh
from PIL import Image

from resnet_jax.commands import call
from resnet_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    InputError,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from resnet_jax.data.dataset import Dataset
from resnet_jax.data.order import example_index, grid_of
from resnet_jax.recipe_flags import take_varied
from resnet_jax.runs.folder import read_summary, runs_under
from resnet_jax.runs.trackers import read_lines
from resnet_jax.training import sweep as sweep_module
from resnet_jax.training import sweep_members, sweep_programs
from resnet_jax.training.checkpoints import Checkpoints
from resnet_jax.training.loop import train
from resnet_jax.training.parts import Parts
from resnet_jax.training.resolve import with_values
from resnet_jax.training.sweep import format_outcome, outcome, sweep
from resnet_jax.training.sweep_programs import RunningMember
from resnet_jax.training.verify import verify

from ..small import digits

pytestmark = pytest.mark.xdist_group("sweep")

TIMINGS = ("images_per_second", "data_wait")


class Net(nn.Module):
    """Small, with all that a step may carry: running statistics and dropout."""

    drop_rate: float = 0.2
    outputs: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(nn.Conv(8, (3, 3), strides=2)(x)))
        return nn.Dense(self.outputs)(nn.Dropout(self.drop_rate, deterministic=not train)(x.mean((1, 2))))


def recipe(devices=1, **train):
    """A short run of the digits whose length, by the split, is another one for each seed."""
    base = digits()
    return digits(
        augment=AugmentConfig(crop="pad", pad=1, flip="random"),
        optimizer=OptimizerConfig(learning_rate=0.2),
        train=TrainConfig(
            **(
                {"epochs": 1.5, "batch_size": 64, "ema_decay": 0.9, "eval_every_epochs": 0.4, "steps_per_call": 5}
                | train
            )
        ),
        schedule=dataclasses.replace(base.schedule, warmup_epochs=0.3, warmup_factor=0.1),
        parallel=ParallelConfig(devices=devices),
        log=dataclasses.replace(base.log, every_steps=7, tensorboard=False, report=False),
    )


def states(folder):
    """The leaves of each checkpoint of a run, as stock Orbax reads them."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    steps = sorted(path.name for path in (folder / "checkpoints").iterdir())
    read = ocp.PyTreeCheckpointer().restore
    return {step: jax.tree.leaves(read(folder / "checkpoints" / step / "state")) for step in steps}


def lines_of(folder):
    lines = read_lines(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def assert_equal_to_its_run(member, tmp_path, config, rounding=0.0, **parts):
    """The member's checkpoints and lines are those of `train` with its recipe, but for the test split."""
    alone = tmp_path / "alone"
    train(config, alone, **parts)
    found, expected = states(member), states(alone)
    assert list(found) == list(expected)
    for step, leaves in expected.items():
        for ours, theirs in zip(found[step], leaves, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=rounding, atol=rounding)
    lines = [line for line in lines_of(alone) if "test/loss" not in line]
    assert len(lines_of(member)) == len(lines)
    for ours, theirs in zip(lines_of(member), lines, strict=True):
        assert ours == pytest.approx(theirs, rel=10 * rounding, abs=10 * rounding)


def bits_in_turn(tmp_path):
    """Members that take turns on one device are their runs, of other lengths and data by the seed; one compilation."""
    values, lines = {"optimizer.learning_rate": [0.1, 0.3], "train.seed": [0, 3]}, []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("jax").handlers = [handler]
    with jax.log_compiles():
        found = sweep(recipe(), values, tmp_path / "sweep", model=Net())
    assert sum(line.startswith("Compiling jit(train_members)") for line in lines) == 1, lines
    assert [row["values"] for row in found["members"]] == [
        {"optimizer.learning_rate": rate, "train.seed": seed} for rate in (0.1, 0.3) for seed in (0, 3)
    ]
    config = dataclasses.replace(recipe(seed=3), optimizer=OptimizerConfig(learning_rate=0.3))
    place = tmp_path / "sweep" / "members" / found["members"][-1]["name"]
    assert_equal_to_its_run(place, tmp_path, config, model=Net())
    assert {row["state"] for row in runs_under(tmp_path / "sweep")} == {"finished"}


def bits_of_numbers(tmp_path):
    """Every number that is an input of the program has the bits of the constant of a single run."""
    one = {"optimizer.momentum": 0.5, "train.label_smoothing": 0.3, "train.ema_decay": 0.5, "model.drop_rate": 0.3}
    other = {"optimizer.momentum": 0.9, "train.label_smoothing": 0.1, "train.ema_decay": 0.9, "model.drop_rate": 0.1}
    one, other = one | {"schedule.name": "step"}, other | {"schedule.name": "one_cycle"}
    base = dataclasses.replace(recipe(epochs=0.4), model=ModelConfig(name="cifar_resnet8"))
    pair = [(values, with_values(base, values)) for values in (one, other)]
    sweep_module.grid = lambda config, varied: pair  # not the 32 members of their grid
    found = sweep(base, {name: [one[name], other[name]] for name in one}, tmp_path / "sweep")
    assert not (tmp_path / "sweep" / "together").exists()
    for row, (_, config) in zip(found["members"], pair, strict=True):
        assert_equal_to_its_run(tmp_path / "sweep" / "members" / row["name"], tmp_path / row["name"], config)


@pytest.mark.parametrize("case", [bits_in_turn, bits_of_numbers])
def test_on_one_device_members_are_their_runs_bit_for_bit(case, tmp_path):
    # In a process that compiles as the command does: without optimization LLVM joins products and sums differently.
    code = f"import pathlib; from {__name__} import {case.__name__} as case; case(pathlib.Path({str(tmp_path)!r}))"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("per_device", [1, 2])
def test_members_over_devices_are_their_runs_to_rounding(per_device, tmp_path):
    values = {"optimizer.weight_decay": [0.0, 1e-2], "train.seed": [0, 1, 3]}
    found = sweep(recipe(devices=2), values, tmp_path / "sweep", model=Net(), members_per_device=per_device)
    for i in (0, 5):
        row, place = found["members"][i], tmp_path / str(i)
        config = recipe(seed=row["values"]["train.seed"])
        decay = row["values"]["optimizer.weight_decay"]
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, weight_decay=decay))
        assert_equal_to_its_run(tmp_path / "sweep/members" / row["name"], place, config, 1e-5, model=Net())
    verified = verify(tmp_path / "sweep/members" / found["members"][0]["name"], 1, seed=0, model=Net())
    assert verified.ok and not verified.exact, str(verified)
    assert f"a member of a sweep that took {2 * per_device} members at once" in str(verified)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_members_of_one_step_a_call_are_verified_within_rounding(tmp_path):
    short = recipe(epochs=0.4, steps_per_call=1)
    found = sweep(short, {"optimizer.weight_decay": [0.0, 1e-2]}, tmp_path / "sweep", model=Net())
    verified = verify(tmp_path / "sweep/members" / found["members"][0]["name"], "all", model=Net())
    assert verified.ok and not verified.exact and "a sweep that made one step a call" in str(verified), str(verified)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_every_member_says_which_pictures_were_left_out_as_its_run_does(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(8):
            path = tmp_path / "data" / split / "ab"[i % 2] / f"{i}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8)).save(path)
        path.write_bytes(b"BM, and no picture")
    base = recipe(steps=4, batch_size=4, eval_every_epochs=1.0, ema_decay=None)
    data = dataclasses.replace(base.data, dataset=f"folder:{tmp_path / 'data'}", on_bad_image="skip")
    base = dataclasses.replace(base, data=data, schedule=dataclasses.replace(base.schedule, warmup_epochs=0.0))
    found = sweep(base, {"optimizer.weight_decay": [0.0, 1e-2]}, tmp_path / "sweep", model=Net())
    train(base, tmp_path / "alone", model=Net())
    alone = read_summary(tmp_path / "alone")["skipped_images"]
    assert alone["count"] == 2
    for row in found["members"]:
        folder = tmp_path / "sweep/members" / row["name"]
        assert read_summary(folder)["skipped_images"] == alone
        verified = verify(folder, "all", model=Net())
        assert not any("skipped" in difference.what for difference in verified.differences), str(verified)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_images_with_several_labels_are_compared_by_their_precision_after_a_trial(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (150, 3))
    images = (rng.integers(0, 90, (150, 8, 8, 3)) + 50 * labels[:, None, None, :]).astype(np.uint8)
    data = Dataset((images[:100], labels[:100]), (images[100:], labels[100:]), None, ("a", "b", "c"), multilabel=True)
    base = recipe(epochs=1, loss="binary")
    net = Net(outputs=3)
    own = {"model": net, "dataset": data}
    found = sweep(base, {"train.seed": [0, 1]}, tmp_path / "sweep", **own, members_per_device="auto")
    said = capsys.readouterr().out
    assert "data: own: 3 classes" in said and "digits" not in said
    page = (tmp_path / "sweep/sweep.html").read_text()
    assert "dataset (a pair of arrays)" in page and ": validation map (moving average) " in page
    assert "trial: 1 a device together" in said and "trial: 2 a device together" in said
    assert re.search(
        r"epoch \S+: 2 members, best validation map \(moving average\) from \S+\s% to \S+\s%(, \d+ s left)?\n", said
    )
    assert not found["own_validation"] and "validation map, mean ± standard deviation over the seeds:\n" in said
    assert [row["metric"] for row in found["members"]] == ["ema/validation/map"] * 2 and found["test"] is None
    place = tmp_path / "sweep/members" / found["members"][0]["name"]
    assert_equal_to_its_run(place, tmp_path, base, 1e-5, **own)


def under_way(step=0):
    """A member of 8 steps, 4 an epoch."""
    plan = SimpleNamespace(total=8, per_epoch=4.0, eval_every=4, save_every=4, log_every=4)
    run = SimpleNamespace(plan=plan, config=recipe())
    best = {"metric": "validation/accuracy", "value": 0.25 + step / 8, "step": step} if step else None
    return RunningMember(None, run, None, None, None, SimpleNamespace(step=step, best=best, no_better=0))


def test_a_members_seconds_are_those_of_its_own_calls():
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("members",))
    programs = SimpleNamespace(width=1, most=4, mesh=mesh, data=None, at_once=1)

    def train_slowly(state, *_):
        time.sleep(state)
        return state, {"loss": np.ones((1, 4))}

    group = [under_way(), under_way(), under_way(step=8)]
    told = sweep_members.advance(group, programs, train_slowly, [0.2, 0.0, 0.2], [None] * 3)
    assert [(one is group[i], n) for i, (one, _, n) in enumerate(told)] == [(True, 1), (True, 1)]
    assert group[0].trained >= 0.2 > group[1].trained > 0.0 == group[2].trained


def test_the_line_on_a_sweep_tells_how_far_all_are_and_the_time_that_is_left():
    told = sweep_members.progress_line([under_way(4), under_way(2)], 3.0).replace("\N{NO-BREAK SPACE}", " ")
    assert told == "epoch 0.5: 2 members, best validation accuracy from 50.00 % to 75.00 %, 5 s left"
    assert sweep_members.progress_line([under_way(8)], 3.0).startswith("epoch 2.0: 1 members, best")
    assert "left" not in sweep_members.progress_line([under_way(8)], 3.0)


class Halt(Exception):
    """Ends a sweep in the middle."""


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_sweep_that_was_ended_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    values, original, saves = {"optimizer.learning_rate": [0.1, 1e30], "train.seed": [0, 3]}, Checkpoints.save, []

    def save(checkpoints, step, *rest):
        original(checkpoints, step, *rest)
        saves.append(step)
        if len(saves) == 2:
            checkpoints.settle()
            raise Halt

    monkeypatch.setattr(Checkpoints, "save", save)
    monkeypatch.setattr(sweep_members, "fastest_per_device", lambda *_: 1)
    with pytest.raises(Halt):
        sweep(recipe(), values, tmp_path / "halted", model=Net(), members_per_device="auto")
    monkeypatch.delattr(sweep_members, "fastest_per_device")  # a later start keeps to what was found
    monkeypatch.setattr(Checkpoints, "save", original)
    with pytest.raises(InputError, match="holds another sweep"):
        sweep(recipe(), values | {"train.seed": [0, 4]}, tmp_path / "halted", model=Net())
    halted = sweep(workdir=tmp_path / "halted", model=Net(), members_per_device="auto")
    whole = sweep(recipe(), values, tmp_path / "whole", model=Net())
    assert halted == whole
    for row in whole["members"]:
        if row["status"] == "finished":
            there, here = (states(tmp_path / name / "members" / row["name"]) for name in ("halted", "whole"))
            jax.tree.map(np.testing.assert_array_equal, there, here)
            there, here = (lines_of(tmp_path / name / "members" / row["name"]) for name in ("halted", "whole"))
            assert there == here
    # At a rate of 1e30 a member diverges, and the others go on.
    assert [row["status"] for row in whole["members"]] == ["finished", "finished", "diverged", "diverged"]
    assert "is not finite at step" in whole["members"][2]["why"]
    assert whole["settings"][-1]["diverged"] == 2 and whole["settings"][0]["values"] == {"optimizer.learning_rate": 0.1}


def test_a_sweep_that_goes_on_needs_the_parts_that_it_was_started_with(tmp_path, monkeypatch):
    config, values, folder = recipe(epochs=0.2), {"train.steps": [1, 2]}, tmp_path / "sweep"
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, on_device=False))
    images, labels = np.zeros((64, 8, 8, 3), np.uint8), np.arange(64) % 10
    own = {"model": Net(), "dataset": Dataset((images, labels), (images, labels))}

    def halt(*_):
        raise Halt

    monkeypatch.setattr(sweep_module, "train_alone", halt)
    with pytest.raises(Halt):
        sweep(config, values, folder, **own)
    for parts, missing in (({}, "model .*Net.*, dataset"), ({"model": Net()}, "dataset")):
        with pytest.raises(InputError, match=f"the sweep in .* parts of its user's own: {missing} .*--config FILE"):
            sweep(workdir=folder, **parts)
    other = own | {"model": Net(0.5)}
    with pytest.raises(Halt):
        sweep(workdir=folder, **other)  # nothing had been trained yet
    (folder / "members/0").mkdir(parents=True)
    (folder / "members/0/metrics.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"the source of model .*--train.accept_parts"):
        sweep(workdir=folder, **own)
    with pytest.raises(Halt):
        sweep(with_values(config, {"train.accept_parts": True}), workdir=folder, **own)


def test_members_on_other_pictures_are_not_compared_with_those_that_are_finished(tmp_path, monkeypatch):
    config, values, folder = recipe(epochs=0.2), {"train.steps": [1, 2]}, tmp_path / "sweep"
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, on_device=False))
    images, labels = np.zeros((64, 8, 8, 3), np.uint8), np.arange(64) % 10
    own = {"model": Net(), "dataset": Dataset((images, labels), (images, labels))}
    original = sweep_module.train_alone

    def halt_at_the_second(member, *rest):
        if member.name.startswith("1"):
            raise Halt
        return original(member, *rest)

    monkeypatch.setattr(sweep_module, "train_alone", halt_at_the_second)
    with pytest.raises(Halt):
        sweep(config, values, folder, **own)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"not as the finished member in .*0-steps=1.*validation: 32 lost"):
        sweep(config, values, folder, **own | {"dataset": Dataset((images, labels), (images[:32], labels[:32]))})
    assert len(sweep(config, values, folder, **own)["members"]) == 2


def test_what_one_program_cannot_do_runs_one_by_one_and_test_is_seen_for_the_chosen_alone(tmp_path, capsys):
    config = recipe(epochs=0.2, eval_every_epochs=0.2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, on_device=False))
    found = sweep(config, {"optimizer.nesterov": [True, False], "train.seed": [0, 1]}, tmp_path / "sweep", model=Net())
    said = capsys.readouterr().out
    assert "2 members one after another: the data is not kept on the device" in said
    assert found["own_validation"] and "the seeds, each of which held out a validation split of its own:\n" in said
    assert "Each seed held out a validation split\nof its own" in (tmp_path / "sweep/sweep.html").read_text()
    folders = [tmp_path / "sweep/members" / row["name"] for row in found["members"]]
    assert all("test" not in read_summary(folder) and "validation" in read_summary(folder) for folder in folders)
    assert not any("test/loss" in line for folder in folders for line in lines_of(folder))
    assert not any((folder / "report.html").exists() for folder in folders)
    verified = verify(folders[0], 0, model=Net())
    assert verified.ok and any("did not look at its test split" in note for note in verified.notes)
    assert found["chosen"] in {row["name"] for row in found["members"]} and found["test"]["test"]["count"] == 360
    assert json.loads((tmp_path / "sweep/sweep.json").read_text()) == found
    table = (tmp_path / "sweep/table.csv").read_text().splitlines()
    assert table[0].startswith("member,optimizer.nesterov,train.seed,status") and len(table) == 5
    assert sweep(workdir=tmp_path / "sweep", model=Net()) == found  # a sweep that has ended stays as it is


def row(name, rate, seed, value, metric="validation/accuracy"):
    values = {"optimizer.learning_rate": rate, "train.seed": seed}
    return {"name": name, "values": values, "metric": metric if value is not None else None, "value": value}


def test_the_setting_is_chosen_by_its_mean_over_the_seeds_and_then_its_best_member():
    rows = [row("a", 0.1, 0, 0.5), row("b", 0.1, 1, 0.7), row("c", 0.2, 0, 0.2), row("d", 0.2, 1, 0.9)]
    rows += [row("e", 0.4, 0, 0.99), row("f", 0.4, 1, None)]
    found = outcome(rows, Config())
    assert [s["values"]["optimizer.learning_rate"] for s in found["settings"]] == [0.1, 0.2, 0.4]
    best = found["settings"][0]
    assert best["mean"] == pytest.approx(0.6) and best["spread"] == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert found["chosen"] == "b"
    losses = [row("a", 0.1, 0, 0.5, "validation/loss"), row("b", 0.2, 0, 0.7, "validation/loss")]
    assert outcome(losses, Config())["chosen"] == "a"
    assert outcome([row("a", 0.1, 0, None)], Config())["chosen"] is None


def test_one_member_is_one_member():
    rows = [row("a", 0.1, 0, 0.5), row("b", 0.2, 0, 0.7), row("c", 0.2, 1, 0.7)]
    lines = format_outcome({**outcome(rows, recipe()), "test": None, "own_validation": False})
    assert [line.rpartition("(")[2] for line in lines[1:3]] == ["2 members)", "1 member)"]


def test_several_values_are_taken_out_of_a_command_line():
    words = ["sweep", "--optimizer.learning_rate", "0.05,1e-1", "--train.seed=0..2,7", "--model.name", "a,b"]
    left, varied = take_varied(
        [*words, "--train.epochs", "3", "--model.drop-rate", "None,0.1", "--data.dataset", "csv:a,b"]
    )
    assert left == ["sweep", "--train.epochs", "3", "--data.dataset", "csv:a,b"]
    rates = {"optimizer.learning_rate": [0.05, 0.1], "model.drop_rate": [None, 0.1]}
    assert varied == rates | {"train.seed": [0, 1, 2, 7], "model.name": ["a", "b"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing is varied: give a field several values, such as --train.seed 0..4"),
        (["--train.seed", "4..0"], "--train.seed 4..0: give a range of whole numbers that rises"),
        (["--train.seed", "0,,1"], "a value is missing between two commas"),
        (["--train.seed", "0,0"], "train.seed has the value 0 twice"),
        (["--optimizer.learning_rate", "0.1,fast"], "optimizer.learning_rate is 'fast'"),
        (["--optimizer.momentum", "0.9,1.0"], "optimizer.momentum"),
        (["--log.every_steps", "1,2"], "a sweep cannot vary log.every_steps: it does not change a result"),
        (["--train.seed", "0,1", "--train.metric", "none"], "a sweep chooses by the validation split"),
        (["--train.seed", "0,1", "--members_per_device", "0"], "give auto or a number from 1"),
        (["--train.seed", "0..9999", "--optimizer.momentum", "0.1,0.2"], "the grid has 20,000 members"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_said_in_words(flags, message, tmp_path):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        call(["sweep", *flags, "--workdir", str(tmp_path / "sweep")])


def test_a_field_that_is_not_there_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(InputError, match=r"optimizer.learning_rat, .*: give optimizer.learning_rate"):
        sweep(Config(), {"optimizer.learning_rat": [0.1, 0.2]}, tmp_path)
    train_folder = tmp_path / "run"
    train_folder.mkdir()
    (train_folder / "config.json").write_text(json.dumps(dataclasses.asdict(Config())))
    with pytest.raises(InputError, match="holds a run, not a sweep"):
        sweep(Config(), {"train.seed": [0, 1]}, train_folder)


def test_the_order_of_examples_is_the_same_where_seed_and_number_are_inputs():
    positions = np.arange(200, dtype=np.uint32)
    order = jax.jit(lambda grid, seed: example_index(positions, grid, seed, jax.numpy))
    for size, seed in ((77, 0), (96, 4294967295)):
        found = order(np.asarray(grid_of(size), np.uint32), np.uint32(seed))
        np.testing.assert_array_equal(found, example_index(positions, size, seed))


def test_examples_that_splits_share_are_held_once():
    images = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    split = {"image": images, "label": np.arange(4, dtype=np.int32)}
    parts = [jax.tree.map(lambda x, keep=keep: x[keep], split) for keep in ([0, 1, 2], [2, 3, 0])]
    whole, places = sweep_programs.shared_examples(parts)
    assert len(whole["image"]) == 4
    for part, place in zip(parts, places, strict=True):
        jax.tree.map(lambda x, y, place=place: np.testing.assert_array_equal(x[place], y), whole, part)


def test_recipes_that_differ_in_numbers_share_a_program():
    base = digits()
    same = dataclasses.replace(base, train=dataclasses.replace(base.train, seed=5, epochs=3, label_smoothing=0.1))
    assert sweep_programs.structure_of(base) == sweep_programs.structure_of(same)
    for other in (
        dataclasses.replace(base, train=dataclasses.replace(base.train, batch_size=32)),
        dataclasses.replace(base, train=dataclasses.replace(base.train, ema_decay=None)),
        dataclasses.replace(base, data=DataConfig()),
    ):
        assert sweep_programs.structure_of(base) != sweep_programs.structure_of(other)
    assert sweep_programs.why_alone(base, Parts()) is None
    assert "hooks" in sweep_programs.why_alone(base, Parts(hooks=(object(),)))
