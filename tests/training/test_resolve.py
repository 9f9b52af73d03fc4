"""What a recipe leaves open is found where a run begins, in one order, and what is given stays as it is."""

import dataclasses
import json
import threading

import numpy as np
import pytest
from PIL import Image

from resnet_jax import Dataset, InputError
from resnet_jax.cli import main
from resnet_jax.config import AugmentConfig, Config, DataConfig, FinetuneConfig, ModelConfig, to_dict
from resnet_jax.data.dataset import ArraySource
from resnet_jax.data.watch import Stalled
from resnet_jax.recipe_files import load_config, recorded_recipe
from resnet_jax.training import loop, resolve
from resnet_jax.training.parts import Parts
from resnet_jax.training.programs import make_prepare
from resnet_jax.weights.sources import Weights
from resnet_jax.weights.tags import Preprocessing

from ..small import parse_recipe, save_small_network

LOOK = Preprocessing((0.1,) * 3, (0.2,) * 3, 16, 24, 0.9, "bicubic")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three classes of twelve pictures of 40 x 30 pixels, whose red, green and blue have means of their own."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for shift, name in enumerate(("ant", "bee", "cat")):
        (root / name).mkdir()
        for i in range(12):
            pixels = rng.integers(0, 60, (30, 40, 3)) + np.asarray([30 * shift, 80, 160])
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def of_weights(monkeypatch, name="cifar_resnet8", fields=None, look=LOOK):
    weights = Weights({}, name, fields or {}, look)
    monkeypatch.setattr(resolve, "find_weights", lambda source: weights)


def test_the_digits_are_a_recipe_like_any_other():
    found = resolve.resolve(Config())
    assert found.config == load_config("digits_resnet20") == resolve.resolve(load_config("digits_resnet20")).config
    assert set(found.origins.values()) == {"recipe digits_resnet20"} and found.dataset is None
    given = resolve.resolve(Config(augment=AugmentConfig(erasing=0.5))).config
    assert given.data.on_device is False  # since erasing works on the host


@pytest.mark.parametrize(
    ("name", "size", "augment"),
    [(None, 32, ("pad", 4, "random", 1.0)), ("resnet18", 224, ("random_resized", 28, "random", 0.875))],
)
def test_pictures_of_ones_own_have_the_models_size_and_their_own_mean(photographs, name, size, augment):
    config = Config(model=ModelConfig(name), data=DataConfig(dataset=f"folder:{photographs}"))
    found = resolve.resolve(config)
    data, chosen = found.config.data, found.config.augment
    assert found.config.model.name == (name or "cifar_resnet20")
    assert data.image_size == size and (chosen.crop, chosen.pad, chosen.flip, chosen.eval_crop) == augment
    pictures = [
        np.asarray(Image.open(found.dataset.train[i][0])).reshape(-1, 3) for i in range(len(found.dataset.train))
    ]
    np.testing.assert_allclose(data.mean, np.concatenate(pictures).mean(0) / 255, atol=0.01)
    assert data.std[0] > data.std[1] > 0
    assert data.on_device is (size == 32) and chosen.interpolation == "bilinear"
    assert f"data.image_size {size} (usual for {found.config.model.name})" in found.line()
    assert f"measured on {len(pictures)} of {len(pictures)} training pictures" in found.line()
    assert resolve.resolve(config).config == found.config
    assert resolve.resolve(found.config).line() == ""


def test_weights_come_before_what_is_usual_and_what_is_given_before_them(monkeypatch, photographs):
    of_weights(monkeypatch, fields={"shortcut": "A", "drop_rate": 0.1})
    data = DataConfig(dataset=f"folder:{photographs}")
    config = resolve.resolve(Config(model=ModelConfig(pretrained="x"), data=data)).config
    assert (config.model.name, config.model.shortcut, config.model.drop_rate) == ("cifar_resnet8", "A", 0.1)
    assert (config.data.mean, config.data.image_size, config.data.eval_image_size) == ((0.1,) * 3, 16, 24)
    assert (config.augment.eval_crop, config.augment.interpolation, config.augment.pad) == (0.9, "bicubic", 2)
    model = ModelConfig("cifar_resnet8", pretrained="x", shortcut="B", drop_rate=0.0)
    augment = AugmentConfig(eval_crop=1.0, interpolation="bilinear", crop="none", flip="none")
    given = Config(model=model, data=dataclasses.replace(data, image_size=8, on_device=False), augment=augment)
    config = resolve.resolve(given).config
    assert config.model == model and config.augment == dataclasses.replace(augment, pad=1)
    assert (config.data.image_size, config.data.eval_image_size, config.data.std) == (8, None, (0.2,) * 3)


def test_a_run_that_is_resumed_comes_before_weights(monkeypatch):
    of_weights(monkeypatch)
    config = Config(model=ModelConfig(pretrained="x"), finetune=FinetuneConfig("full"))
    first = resolve.resolve(config).config
    of_weights(monkeypatch, "cifar_resnet20", look=None)
    again = resolve.resolve(config, before=first)
    assert again.config == first and set(again.origins.values()) == {"as the run in this folder began"}


def test_another_model_than_that_of_the_weights_is_one_line(monkeypatch, tmp_path, capsys):
    save_small_network(tmp_path / "net.safetensors")
    flags = ["train", "--model.pretrained", str(tmp_path / "net.safetensors"), "--workdir", str(tmp_path / "run")]
    assert main([*flags, "--model.name", "cifar_resnet20"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has weights of cifar_resnet8, and model.name is cifar_resnet20: leave model.name out" in line
    of_weights(monkeypatch, None)
    with pytest.raises(InputError, match=r"does not say which model it belongs to: add --model.name"):
        resolve.resolve(Config(model=ModelConfig(pretrained="x")))
    assert resolve.resolve(Config(model=ModelConfig("resnet18", pretrained="x"))).config.model.name == "resnet18"


def test_weights_of_a_flag_bring_their_model_in_place_of_the_recipes():
    assert parse_recipe(["--config", "finetune_folder", "--model.pretrained", "x"])[0].model.name is None
    assert parse_recipe(["--config", "finetune_folder", "--model.pretrained", "None"])[0].model.name == "resnet50"
    given = ["--model.pretrained=x", "--model.name", "cifar_resnet20", "--data.image_size", "8"]
    config = parse_recipe(["--config", "finetune_folder", *given])[0]
    assert (config.model.name, config.data.image_size) == ("cifar_resnet20", 8)


def test_what_is_misspelt_is_said_before_weights_are_fetched_and_pictures_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(resolve, "find_weights", lambda source: pytest.fail("weights were looked for"))
    monkeypatch.setattr(resolve, "measure", lambda *_: pytest.fail("pictures were measured"))
    wrong = Config(model=ModelConfig(pretrained="X"), data=DataConfig(dataset=f"folder:{tmp_path / 'none'}"))
    with pytest.raises(InputError, match="none"):
        resolve.resolve(wrong)
    with pytest.raises(InputError, match="did you mean resnet"):
        resolve.resolve(Config(model=ModelConfig(name="resnet81", pretrained="X")))


def test_a_switch_that_may_be_open_is_still_a_switch():
    for flags, expected in (
        (["--data.on_device"], True),
        (["--data.no_on_device"], False),
        (["--data.on_device", "False"], False),
        (["--data.no-on-device", "--train.seed", "3"], False),
        (["--data.on_device", "None"], None),
    ):
        assert parse_recipe(flags)[0].data.on_device is expected


def test_data_of_ones_own_is_resolved_by_the_same_function():
    images = np.random.default_rng(0).integers(0, 256, (60, 12, 12, 3), dtype=np.uint8)
    found = resolve.resolve(Config(), Parts(dataset=Dataset((images, np.arange(60) % 3))))
    assert (found.config.data.dataset, found.config.data.image_size) == ("own", 32)
    np.testing.assert_allclose(found.config.data.mean, (images / 255).mean((0, 1, 2)), atol=0.02)
    assert found.config.augment.flip == "random" and found.config.data.on_device is True
    places = resolve.resolve(Config(), Parts(dataset=Dataset((images, np.arange(60) / 60)))).config.augment
    assert (places.crop, places.flip) == ("none", "none")  # a label that is no class may say where something is


def test_the_split_has_to_fit_the_device():
    config = Config(data=DataConfig(image_size=32), augment=AugmentConfig(crop="pad"))
    assert resolve.fits_device(config, 300_000) == (True, "the training images take 878.9 MiB")
    assert not resolve.fits_device(config, 400_000)[0]
    assert not resolve.fits_device(dataclasses.replace(config, data=DataConfig(image_size=32, workers=2)), 10)[0]
    assert not resolve.fits_device(dataclasses.replace(config, augment=AugmentConfig(crop="random_resized")), 10)[0]


def test_what_is_open_is_never_used():
    with pytest.raises(InputError, match=r"data.mean is None, which only the start of a run resolves"):
        make_prepare(Config(), None, Parts(outputs=3))


def test_a_start_that_failed_binds_nothing(photographs, tmp_path, monkeypatch, capsys):
    """Neither one that an error ended before its first step, nor one that was killed there."""

    def fails(*_):
        raise InputError("no step")

    small = ["--train.batch_size", "8", "--train.steps", "2", "--log.no_report", "--log.no_tensorboard"]
    start = ["train", "--workdir", str(tmp_path), *small, "--parallel.devices", "1", "--data.dataset"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit_with_rollbacks", fails)
        assert main([*start, f"folder:{photographs}", "--model.name", "cifar_resnet14"]) == 2
    assert recorded_recipe(tmp_path) is None and not (tmp_path / "pictures.npz").exists()
    (tmp_path / "config.json").write_text(json.dumps(to_dict(load_config("imagenet_resnet50"))))
    (tmp_path / "metrics.jsonl").write_text("")
    capsys.readouterr()
    config = load_config("digits_resnet20")
    config = dataclasses.replace(
        config,
        data=DataConfig(dataset=f"folder:{photographs}", image_size=8),
        model=ModelConfig("cifar_resnet8"),
        train=dataclasses.replace(config.train, batch_size=8, steps=2, ema_decay=None),
        log=dataclasses.replace(config.log, report=False, tensorboard=False),
        parallel=dataclasses.replace(config.parallel, devices=1),
    )
    summary = loop.train(config, tmp_path)
    out = capsys.readouterr().out
    assert summary["steps"] == 2 and recorded_recipe(tmp_path).model.name == "cifar_resnet8"
    assert "data.mean 0." in out and "measured on" in out and "; data.on_device True (the training images take" in out
    assert "schedule.warmup_epochs 2 is" in out and "shortened to 0" in out
    assert "\nstep 1/2  epoch 0." in out and "  train loss " in out.partition("\nstep 1/2")[2].splitlines()[0]


def test_a_picture_that_never_comes_is_named_while_it_is_measured(monkeypatch):
    fit, listed, over = resolve.fit, resolve.listed, threading.Event()

    def hangs(raw, *given, **options):
        if raw[0, 0, 0] == 255:
            over.wait(20)
        return fit(raw, *given, **options)

    def listed_then_over(names):
        over.set()
        return listed(names)

    monkeypatch.setattr(resolve, "fit", hangs)
    monkeypatch.setattr(resolve, "listed", listed_then_over)
    source = ArraySource(np.repeat(np.arange(253, 256, dtype=np.uint8), 192).reshape(3, 8, 8, 3), np.zeros(3, int))
    config = Config(data=DataConfig(image_size=8, timeout=0.5), augment=AugmentConfig(interpolation="bilinear"))
    with pytest.raises(Stalled, match=r"= 0.5 seconds: under way were example 2 of the arrays, to learn size, mean or"):
        resolve.measure(source, config)
