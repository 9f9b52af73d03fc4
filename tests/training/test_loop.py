import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from resnet_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    InputError,
    LogConfig,
    ParallelConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from resnet_jax.runs.folder import describe_run
from resnet_jax.runs.reporter import Diverged
from resnet_jax.runs.trackers import read_lines
from resnet_jax.training import loop
from resnet_jax.training.build import build_model, sharded_shapes, state_maker
from resnet_jax.training.checkpoints import Checkpoints, read_checkpoint
from resnet_jax.training.evaluation import evaluate_run
from resnet_jax.training.optimizers import make_optimizer
from resnet_jax.training.programs import recipe_step
from resnet_jax.training.sharding import make_mesh

from ..runs.small_recipe import Small
from ..small import digits as digits_recipe

pytestmark = pytest.mark.xdist_group("loop")  # one process makes what they share

TIMINGS = ("images_per_second", "data_wait")


def recipe(steps=23, devices=1, **train):
    """A short run of the digits with everything on: augmentation, EMA, evaluation in between, odd intervals."""
    base = digits_recipe()
    return digits_recipe(
        model=dataclasses.replace(base.model, name="cifar_resnet8"),
        augment=AugmentConfig(crop="pad", pad=1, flip="random", mixup=0.2),
        train=TrainConfig(**({"steps": steps, "batch_size": 32, "ema_decay": 0.9, "eval_every_epochs": 0.2} | train)),
        schedule=dataclasses.replace(base.schedule, warmup_epochs=0.1),
        parallel=dataclasses.replace(base.parallel, devices=devices),
        checkpoint=dataclasses.replace(base.checkpoint, every_steps=5, keep=3),
        log=dataclasses.replace(base.log, every_steps=7, tensorboard=False, report=False),
    )


def final_state(folder, config):
    model = build_model(config, 10)
    template = sharded_shapes(state_maker(config, model, lambda step: 0.0), make_mesh(1))
    return jax.device_get(read_checkpoint(folder, lambda _: template))


def lines_of(folder):
    lines = read_lines(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


class Stop(Exception):
    """A run that ends in the middle."""


def train_until(step, config, folder, monkeypatch):
    """Trains, and ends the run right after the checkpoint of a step was asked for."""
    original = Checkpoints.save

    def save(checkpoints, at, *rest):
        original(checkpoints, at, *rest)
        if at == step:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        with pytest.raises(Stop):
            loop.train(config, folder)


@pytest.mark.parametrize("there_before", [[], ["checkpoints", "events.out.tfevents.1.before"]])
def test_a_start_that_fails_in_its_first_step_leaves_nothing_of_its_own(there_before, tmp_path):
    def fails(logits, batch):
        raise Stop

    for name in there_before:
        (tmp_path / name).mkdir()
    config = recipe()
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, tensorboard=True))
    with pytest.raises(Stop):
        loop.train(config, tmp_path, model=Small(), loss=fails)
    assert sorted(os.listdir(tmp_path)) == there_before


def test_a_run_that_ends_early_closes_its_loader_at_once(tmp_path, monkeypatch):
    """Not when its error goes, which holds its frames: the memory of worker processes would be held until then."""
    ended, original = [], loop.train_batches

    def watched(*args, **kwargs):
        try:
            yield from original(*args, **kwargs)
        finally:
            ended.append(True)

    monkeypatch.setattr(loop, "train_batches", watched)

    def save(*_):
        raise Stop

    monkeypatch.setattr(Checkpoints, "save", save)
    config = recipe(steps=8)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, on_device=False))
    with pytest.raises(Stop) as kept:
        loop.train(config, tmp_path, model=Small())
    assert ended and kept.tb is not None


@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (2, 2), (4, 1), (8, 1)])
def test_a_checkpoint_of_eight_devices_goes_on_with_any_number(eight, devices, fsdp, tmp_path):
    """To rounding: the same data in the same order, the state whole or spread."""
    config, folder, whole = eight
    shutil.copytree(folder, tmp_path / "run")
    loop.train(dataclasses.replace(config, parallel=ParallelConfig(devices=devices, fsdp=fsdp)), tmp_path / "run")
    chex.assert_trees_all_close(final_state(tmp_path / "run", config)[0], whole[0], rtol=2e-3, atol=2e-4)
    assert lines_of(tmp_path / "run")[-1]["step"] == 8


@pytest.mark.parametrize("fsdp", [1, 2])
def test_the_step_of_a_spread_state_is_not_cached_on_a_cpu(fsdp, tmp_path):
    """XLA ends a process that trains by such a step from the cache: its devices wait for each other without end."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    compilation_cache.reset_cache()
    try:
        config = dataclasses.replace(recipe(steps=8), parallel=ParallelConfig(devices=2, fsdp=fsdp))
        loop.train(config, tmp_path / "run")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    kept = [path.name for path in (tmp_path / "cache").glob("*several_steps*")]
    assert bool(kept) == (fsdp == 1)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A run of eight devices with its state spread over four, stopped at step 5, and its end without a stop."""
    config = recipe(steps=8, eval_every_epochs=9.0)
    config = dataclasses.replace(config, parallel=ParallelConfig(devices=8, fsdp=4))
    folder = tmp_path_factory.mktemp("eight")
    with pytest.MonkeyPatch.context() as patch:
        train_until(5, config, folder / "part", patch)
    shutil.copytree(folder / "part", folder / "whole")
    loop.train(config, folder / "whole")
    return config, folder / "part", final_state(folder / "whole", config)


def test_a_run_goes_on_with_its_blocks_in_a_loop_and_back(tmp_path, monkeypatch):
    config = recipe(steps=8)
    looped = dataclasses.replace(config, model=dataclasses.replace(config.model, scan=True))
    loop.train(config, tmp_path / "whole")
    train_until(5, looped, tmp_path / "parts", monkeypatch)
    summary = loop.train(config, tmp_path / "parts")
    whole, parts = (final_state(tmp_path / name, config)[0] for name in ("whole", "parts"))
    chex.assert_trees_all_close(whole, parts, rtol=1e-3, atol=1e-4)
    assert evaluate_run(tmp_path / "parts")["test"]["accuracy"] == summary["test"]["accuracy"]


def test_host_and_device_data_train_alike_on_one_and_eight_devices(tmp_path):
    losses = []
    for devices, on_device in ((1, True), (8, False)):
        config = dataclasses.replace(recipe(steps=7, devices=devices), augment=AugmentConfig(crop="none"))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, on_device=on_device))
        summary = loop.train(config, tmp_path / f"{devices}{on_device}")
        assert summary["validation"]["count"] == 282 and summary["test"]["count"] == 360
        losses.append(lines_of(tmp_path / f"{devices}{on_device}")[0]["train/loss"])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The default recipe, shortened to a quarter, as a process of its own."""
    folder = tmp_path_factory.mktemp("digits")
    command = [sys.executable, "-m", "resnet_jax.cli", "train", "--workdir", str(folder), "--train.epochs", "9"]
    subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, check=True, capture_output=True)
    config = digits_recipe(train=dataclasses.replace(Config().train, epochs=9.0))
    return folder, config, json.loads((folder / "summary.json").read_text())


def test_digits_are_learned(digits):
    _, _, summary = digits
    assert summary["test"]["accuracy"] >= 0.9
    assert summary["ema/test"]["accuracy"] >= 0.9
    assert summary["test"]["count"] == 360 and summary["validation"]["count"] == 282
    assert {"jax", "flax", "python"} <= set(summary["versions"])
    assert summary["images_per_second"] > 0 and summary["skipped_images"]["count"] == 0


def test_a_run_leaves_its_folder_in_order(digits):
    folder, config, _ = digits
    assert (folder / "curves.png").stat().st_size > 10_000 and (folder / "report.html").stat().st_size > 10_000
    assert list(folder.glob("events.out.tfevents.*"))
    lines = read_lines(folder / "metrics.jsonl")
    train = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train] == [*range(15, 109, 15), 109]
    assert set(train[0]) == {"step", "epoch", "train/loss", "train/accuracy", "learning_rate", *TIMINGS}
    for line, split in zip(lines[-2:], ("validation", "test"), strict=True):
        names = {f"{kind}{split}/{name}" for kind in ("", "ema/") for name in ("loss", "accuracy")}
        assert names <= set(line) and all(split in name for name in line if name != "step")
    assert sum("test/loss" in line for line in lines) == 1
    assert from_dict(json.loads((folder / "config.json").read_text())) == config


def test_evaluate_needs_the_folder_alone(digits):
    folder, _, summary = digits
    result = evaluate_run(folder, per_class=True)
    assert result["step"] == summary["selected"] == summary["best"]["step"] and result["split"] == "test"
    np.testing.assert_allclose(result["test"]["accuracy"], summary["test"]["accuracy"])
    np.testing.assert_allclose(result["test"]["loss"], summary["test"]["loss"], rtol=1e-4)
    classes = result["test"]["classes"]
    assert list(classes) == [str(i) for i in range(10)]
    right = sum(c["accuracy"] * c["count"] for c in classes.values())
    np.testing.assert_allclose(right / 360, summary["test"]["accuracy"])
    best = evaluate_run(folder, "best", split="validation")
    assert best["step"] == summary["best"]["step"] and summary["best"]["metric"] == "ema/validation/accuracy"
    np.testing.assert_allclose(best["ema/validation"]["accuracy"], summary["best"]["value"])
    assert evaluate_run(folder, "latest")["step"] == summary["steps"]
    with pytest.raises(InputError, match="no checkpoint of step 3 is kept: give best, latest or one of"):
        evaluate_run(folder, "3")


def test_evaluation_touches_nothing_of_a_run_that_may_be_under_way(digits):
    folder, _, _ = digits
    half_written = folder / "checkpoints" / "999.orbax-checkpoint-tmp"
    half_written.mkdir()
    evaluate_run(folder)
    assert half_written.is_dir()
    half_written.rmdir()


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(digits_recipe())))
    with pytest.raises(InputError, match="holds no checkpoint"):
        evaluate_run(tmp_path)


def test_a_finished_run_is_left_alone(digits):
    folder, config, summary = digits
    before = (folder / "metrics.jsonl").read_text()
    assert loop.train(config, folder) == summary
    assert (folder / "metrics.jsonl").read_text() == before


def test_another_recipe_is_refused_by_its_fields(digits):
    folder, config, _ = digits
    other = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.3), log=LogConfig(9, report=False)
    )
    with pytest.raises(InputError, match=r"another recipe: optimizer.learning_rate: 0.1 -> 0.3\. Give another"):
        loop.train(other, folder)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """The rate leaps from 0.01 to 1e18 after step 13; the checkpoint of step 10 is the last that is good."""
    config = recipe(steps=40)
    wild = dataclasses.replace(config.optimizer, learning_rate=1e18)
    leap = dataclasses.replace(
        config.schedule, name="constant", warmup_epochs=13 * 32 / 1155, warmup_factor=1e-20, warmup_shape="constant"
    )
    config = dataclasses.replace(config, optimizer=wild, schedule=leap)
    with pytest.raises(Diverged, match=r"not finite at step 1[45], with learning rate 1e\+18; .* that of step 10,"):
        loop.train(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    state, _ = final_state(tmp_path, config)
    assert state.step == 10
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert max(line["step"] for line in read_lines(tmp_path / "metrics.jsonl")) <= 14


def leaping(policy, dtype, rate=1e30, **train):
    """A run whose learning rate leaps from 0.1 to `rate` after step 13."""
    config = recipe(on_nonfinite=policy, **train)
    schedule = dataclasses.replace(
        config.schedule,
        name="constant",
        warmup_epochs=13 * 32 / 1155,
        warmup_factor=0.1 / rate,
        warmup_shape="constant",
    )
    optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
    model = dataclasses.replace(config.model, compute_dtype=dtype)
    return dataclasses.replace(config, schedule=schedule, optimizer=optimizer, model=model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_that_are_not_finite_are_left_out_and_counted(tmp_path, dtype):
    """The first update of 1e30 is finite, what the net then computes is not: from there on all are skipped."""
    config = leaping("skip", dtype, steps=40, nonfinite_limit=5)
    with pytest.raises(Diverged, match=r"for 5 updates in a row, with learning rate 1e\+30"):
        loop.train(config, tmp_path)
    state, record = final_state(tmp_path, config)
    assert state.step == 15 and record["skipped_updates"] in ({"total": 1, "in_row": 1}, {"total": 2, "in_row": 2})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    (line,) = [line for line in lines_of(tmp_path) if line["step"] == 14 and "train/loss" in line]
    assert line["skipped_updates"] == record["skipped_updates"]["total"] - 1 and np.isfinite(line["train/loss"])


def test_a_skipped_update_leaves_all_of_the_state_but_its_step(tmp_path):
    config = recipe(on_nonfinite="skip")
    model, optimizer = build_model(config, 10), make_optimizer(config.optimizer, lambda step: 0.1)
    step = jax.jit(recipe_step(config, model, optimizer))
    state = state_maker(config, model, lambda step: 0.1)()
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
    batch = {"image": images, "label": np.arange(32, dtype=np.int32) % 10, "mirrored": np.zeros(32, bool)}
    state, sums = step(state, batch)
    assert sums["skipped"] == 0 and sums["count"] == 32
    broken = state.replace(params=state.params | {"head": jax.tree.map(lambda x: x * np.inf, state.params["head"])})
    after, sums = step(broken, batch)
    assert sums["skipped"] == 1 and sums["count"] == sums["loss"] == 0 and after.step == broken.step + 1
    chex.assert_trees_all_equal(after.replace(step=broken.step, opt_state=None), broken.replace(opt_state=None))
    floats = [[x for x in jax.tree.leaves(s.opt_state) if x.dtype == np.float32] for s in (after, broken)]
    chex.assert_trees_all_equal(*floats)


@pytest.mark.parametrize(("dtype", "rate", "arrives"), [("float32", 256.0, True), ("bfloat16", 1e30, False)])
def test_a_run_that_diverges_goes_back_and_on_more_slowly(tmp_path, dtype, rate, arrives, capsys):
    """From step 13 on the rate is too high: at 256 a few halvings are enough, at 1e30 the run gives up."""
    config = leaping("rollback", dtype, rate=rate, steps=20, nonfinite_limit=3 if arrives else 1)
    if arrives:
        assert loop.train(config, tmp_path / "run")["steps"] == 20
    else:
        with pytest.raises(Diverged, match=r"learning rate 5e\+29"):
            loop.train(config, tmp_path / "run")
    predicted = capsys.readouterr().out
    assert "with learning rate 256; going back" in predicted or "1e+30; going back" in predicted
    assert 1 <= predicted.count("going back to step") == predicted.count("resuming at step") <= 3
    assert final_state(tmp_path / "run", config)[1]["rollbacks"] == (predicted.count("going back") if arrives else 0)
    logged = [line["step"] for line in lines_of(tmp_path / "run") if "train/loss" in line]
    assert logged == ([7, 14, 20] if arrives else logged) and len(logged) == len(set(logged))


def test_the_device_is_given_one_call_ahead_and_no_more(tmp_path, monkeypatch):
    """With steps that take a while: otherwise a run would end long after a signal."""
    finished, finished_when_called, make = [], [], loop.compile_phases

    def slowly(loss):
        time.sleep(0.1)
        finished.append(loss)
        return loss

    def make_slow(*arguments, **options):
        (steps,) = make(*arguments, **options)
        slow = jax.jit(lambda loss: jax.pure_callback(slowly, jax.typeof(loss), loss))

        def slow_steps(*given):
            finished_when_called.append(len(finished))
            state, sums = steps(*given)
            return state, sums | {"loss": slow(sums["loss"])}

        return [slow_steps]

    monkeypatch.setattr(loop, "compile_phases", make_slow)
    config = recipe(12, steps_per_call=1)
    loop.train(dataclasses.replace(config, log=dataclasses.replace(config.log, every_steps=12)), tmp_path / "run")
    assert len(finished) == 12 and all(done >= i - 1 for i, done in enumerate(finished_when_called))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        loop.train(recipe(), tmp_path / "file" / "run")


def test_a_batch_that_does_not_divide_names_the_nearest(tmp_path):
    with pytest.raises(InputError, match="8 devices; the nearest that does is 32"):
        loop.train(recipe(devices=8, batch_size=30), tmp_path)


def test_bad_images_of_a_folder_end_in_the_summary(tmp_path, capsys):
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for name, level in (("dark", 0), ("light", 200)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = level + rng.integers(0, 55, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    broken = tmp_path / "data" / "test" / "dark" / "3.png"
    broken.write_text("no picture")
    config = dataclasses.replace(
        recipe(steps=12, batch_size=8, eval_every_epochs=99.0),
        data=DataConfig(dataset=f"folder:{tmp_path / 'data'}", image_size=8, on_device=False, on_bad_image="skip"),
    )
    summary = loop.train(config, tmp_path / "run")
    assert summary["test"]["count"] == 9
    assert summary["skipped_images"] == {"count": 1, "names": [str(broken)]}
    strict = dataclasses.replace(config, data=dataclasses.replace(config.data, on_bad_image="error"))
    capsys.readouterr()
    with pytest.raises(InputError, match=r"dark/3\.png cannot be decoded"):
        loop.train(strict, tmp_path / "strict")
    row = describe_run(tmp_path / "strict")
    assert row["state"] == "failed" and "3.png cannot be decoded" in row["problem"]
    again = loop.train(config, tmp_path / "strict")
    assert again["skipped_images"]["names"] == [str(broken)] and again["test"] == summary["test"]
    assert describe_run(tmp_path / "strict")["state"] == "finished"
    assert capsys.readouterr().err.count("3.png cannot be decoded") == 1


def test_a_trace_of_some_steps_is_written(tmp_path):
    config = recipe(8, eval_every_epochs=9.0)
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, profile="3:5"))
    loop.train(config, tmp_path / "run")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
