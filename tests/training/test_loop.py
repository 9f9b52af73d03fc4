import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

from resnet_jax.config import AugmentConfig, Config, DataConfig, InputError, LogConfig, TrainConfig
from resnet_jax.recipes import from_dict, to_dict
from resnet_jax.sharding import make_mesh
from resnet_jax.training import checkpoints, loop
from resnet_jax.training.evaluation import evaluate_run
from resnet_jax.training.recipe import build_model, sharded_shapes, state_maker
from resnet_jax.training.trackers import Diverged, read_lines

TIMINGS = ("images_per_second", "data_wait")


def recipe(steps=23, devices=1, **train):
    """A short run of the digits with everything on: augmentation, EMA, evaluation in between, odd intervals."""
    base = Config()
    return dataclasses.replace(
        base,
        augment=AugmentConfig(crop="pad", pad=1, flip="random", mixup=0.2),
        train=TrainConfig(**({"steps": steps, "batch_size": 32, "ema_decay": 0.9, "eval_every_epochs": 0.2} | train)),
        schedule=dataclasses.replace(base.schedule, warmup_epochs=0.1),
        parallel=dataclasses.replace(base.parallel, devices=devices),
        checkpoint=dataclasses.replace(base.checkpoint, every_steps=5, keep=3),
        log=dataclasses.replace(base.log, every_steps=7, tensorboard=False),
    )


def final_state(folder, config):
    model = build_model(config, 10)
    template = sharded_shapes(state_maker(config, model, lambda step: 0.0), make_mesh(1))
    with checkpoints.open_checkpoints(folder, 1) as manager:
        return jax.device_get(checkpoints.restore(manager, template))


def lines_of(folder):
    lines = read_lines(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


class Stop(Exception):
    """A run that ends in the middle."""


def train_until(step, config, folder, monkeypatch):
    """Trains, and ends the run right after the checkpoint of a step was asked for."""
    original = checkpoints.save

    def save(manager, at, *rest):
        original(manager, at, *rest)
        if at == step:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", save)
        with pytest.raises(Stop):
            loop.train(config, folder)


@pytest.mark.parametrize("place", ["device", "host"])
def test_a_resumed_run_is_the_undisturbed_run_bit_for_bit(tmp_path, monkeypatch, place):
    config = recipe()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, on_device=place == "device"))
    loop.train(config, tmp_path / "whole")
    train_until(10, config, tmp_path / "parts", monkeypatch)  # in the middle of an epoch and of a log interval
    train_until(15, config, tmp_path / "parts", monkeypatch)
    summary = loop.train(config, tmp_path / "parts")
    whole, parts = (final_state(tmp_path / name, config) for name in ("whole", "parts"))
    chex.assert_trees_all_equal(whole[0], parts[0])
    assert whole[1] == parts[1]
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "parts")
    assert [line["step"] for line in lines_of(tmp_path / "parts") if "train/loss" in line] == [7, 14, 21, 23]
    assert summary["steps"] == 23


def test_steps_per_call_resume_the_same(tmp_path, monkeypatch):
    config = recipe(steps=17, steps_per_call=3)
    loop.train(config, tmp_path / "whole")
    train_until(12, config, tmp_path / "parts", monkeypatch)
    loop.train(config, tmp_path / "parts")
    chex.assert_trees_all_equal(*(final_state(tmp_path / name, config)[0] for name in ("whole", "parts")))
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "parts")


def test_host_and_device_data_train_alike_on_one_and_eight_devices(tmp_path):
    losses = []
    for devices, on_device in ((1, True), (8, True), (8, False)):
        config = dataclasses.replace(recipe(steps=7, devices=devices), augment=AugmentConfig(crop="none"))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, on_device=on_device))
        summary = loop.train(config, tmp_path / f"{devices}{on_device}")
        assert summary["test"]["count"] == 360
        losses.append(lines_of(tmp_path / f"{devices}{on_device}")[0]["train/loss"])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The default recipe, shortened to half."""
    config = dataclasses.replace(
        Config(),
        train=dataclasses.replace(Config().train, epochs=18.0),
        parallel=dataclasses.replace(Config().parallel, devices=1),
    )
    folder = tmp_path_factory.mktemp("digits")
    return folder, config, loop.train(config, folder)


def test_digits_are_learned(digits):
    folder, _, summary = digits
    assert summary["test"]["accuracy"] >= 0.97
    assert summary["ema"]["accuracy"] >= 0.97
    assert summary["test"]["count"] == 360
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert {"jax", "flax", "python"} <= set(summary["versions"])
    assert summary["images_per_second"] > 0 and summary["skipped_images"]["count"] == 0


def test_a_run_leaves_its_folder_in_order(digits):
    folder, config, _ = digits
    assert (folder / "curves.png").stat().st_size > 10_000
    assert list(folder.glob("events.out.tfevents.*"))
    lines = read_lines(folder / "metrics.jsonl")
    train = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train] == [*range(15, 270, 15), 270]
    assert set(train[0]) == {"step", "epoch", "train/loss", "train/accuracy", "learning_rate", *TIMINGS}
    assert {"eval/loss", "eval/accuracy", "ema/loss", "ema/accuracy"} <= set(lines[-1])
    assert from_dict(json.loads((folder / "config.json").read_text())) == config


def test_evaluate_needs_the_folder_alone(digits):
    folder, _, summary = digits
    result = evaluate_run(folder, per_class=True)
    assert result["step"] == summary["steps"]
    np.testing.assert_allclose(result["test"]["accuracy"], summary["test"]["accuracy"])
    np.testing.assert_allclose(result["test"]["loss"], summary["test"]["loss"], rtol=1e-4)
    classes = result["test"]["classes"]
    assert list(classes) == [str(i) for i in range(10)]
    right = sum(c["accuracy"] * c["count"] for c in classes.values())
    np.testing.assert_allclose(right / 360, summary["test"]["accuracy"])
    best = evaluate_run(folder, best=True)
    assert best["step"] == summary["best"]["step"]
    np.testing.assert_allclose(best["ema"]["accuracy"], summary["best"]["accuracy"])


def test_evaluation_touches_nothing_of_a_run_that_may_be_under_way(digits):
    folder, _, _ = digits
    half_written = folder / "checkpoints" / "999.orbax-checkpoint-tmp"
    half_written.mkdir()
    evaluate_run(folder)
    assert half_written.is_dir()
    half_written.rmdir()


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(Config())))
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
        config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.3), log=LogConfig(9)
    )
    with pytest.raises(InputError, match=r"another recipe: optimizer.learning_rate: 0.1 -> 0.3\. Give another"):
        loop.train(other, folder)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """The rate leaps from 0.01 to 1e18 after step 13; the checkpoint of step 10 is the last that is good."""
    config = recipe(steps=40)
    wild = dataclasses.replace(config.optimizer, learning_rate=1e18)
    leap = dataclasses.replace(
        config.schedule, name="constant", warmup_epochs=13 * 32 / 1437, warmup_factor=1e-20, warmup_shape="constant"
    )
    config = dataclasses.replace(config, optimizer=wild, schedule=leap)
    with pytest.raises(Diverged, match=r"not finite at step 1[45], with learning rate 1e\+18; .* that of step 10,"):
        loop.train(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    state, _ = final_state(tmp_path, config)
    assert state.step == 10
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert max(line["step"] for line in read_lines(tmp_path / "metrics.jsonl")) <= 14


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        loop.train(recipe(), tmp_path / "file" / "run")


def test_a_batch_that_does_not_divide_names_the_nearest(tmp_path):
    with pytest.raises(InputError, match="8 devices; the nearest that does is 32"):
        loop.train(recipe(devices=8, batch_size=30), tmp_path)


def test_bad_images_of_a_folder_end_in_the_summary(tmp_path):
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
        recipe(steps=12, batch_size=8),
        data=DataConfig(dataset=f"folder:{tmp_path / 'data'}", on_device=False, on_bad_image="skip"),
    )
    summary = loop.train(config, tmp_path / "run")
    assert summary["test"]["count"] == 9
    assert summary["skipped_images"] == {"count": 1, "names": [str(broken)]}
    strict = dataclasses.replace(config, data=dataclasses.replace(config.data, on_bad_image="error"))
    with pytest.raises(InputError, match=r"dark/3\.png cannot be decoded"):
        loop.train(strict, tmp_path / "strict")


def test_a_trace_of_some_steps_is_written(tmp_path):
    config = recipe(8, eval_every_epochs=9.0)
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, profile=(3, 5)))
    loop.train(config, tmp_path / "run")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
