"""Weights that leave: timm and torchvision load them strictly and compute the same."""

import dataclasses
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from resnet_jax import Predictor, create_model, load_pretrained, to_torch
from resnet_jax.cli import main
from resnet_jax.config import Config, DataConfig, FinetuneConfig, LogConfig, ModelConfig, ScheduleConfig, TrainConfig
from resnet_jax.recipe_files import load_config, recorded_recipe
from resnet_jax.training import resolve
from resnet_jax.training.loop import train
from resnet_jax.weights.export import save_tensors
from resnet_jax.weights.sources import Weights, find_weights

from ..conftest import ROOT
from .torch_twins import close, images_for, nchw, timm, torch

pytestmark = pytest.mark.xdist_group("export")  # one process makes what they share

SMALL = Config(
    model=ModelConfig(name="test_resnet", drop_rate=0.1, drop_path_rate=0.1),
    data=DataConfig(dataset="synthetic", synthetic_size=16, synthetic_classes=5, image_size=32),
    schedule=ScheduleConfig(warmup_epochs=0.0),
    train=TrainConfig(steps=2, batch_size=8),
    log=LogConfig(report=False),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(SMALL, folder)
    return folder


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_timm_loads_a_run_of_ours_strictly(run, tmp_path, form):
    path = tmp_path / f"out.{form}"
    assert main(["export", str(run), str(path)]) == 0
    module = timm.create_model("test_resnet", num_classes=5, checkpoint_path=str(path)).eval()
    model, variables = load_pretrained(str(run))
    images = images_for(size=32)
    with torch.no_grad():
        expected = module(nchw(images))
    close(jax.jit(model.apply)(variables, images), expected, 1e-4, "logits")
    again, same = load_pretrained(str(path), "test_resnet")
    jax.tree.map(np.testing.assert_array_equal, same, variables)
    if form == "safetensors":
        assert again == model


def test_a_file_from_a_run_knows_classes_and_preprocessing(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "out.safetensors")]) == 0
    weights = find_weights(str(tmp_path / "out.safetensors"))
    assert weights.name == "test_resnet" and len(weights.class_names) == 5
    assert weights.preprocessing.mean == recorded_recipe(run).data.mean and weights.preprocessing.image_size == 32


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return (print, ("the trap was sprung",))

    torch.save({"conv1.weight": Trap()}, tmp_path / "trap.pth")
    assert main(["export", str(tmp_path / "trap.pth"), str(tmp_path / "out.safetensors")]) == 2
    metadata = capsys.readouterr()
    assert "refused" in metadata.err and "sprung" not in metadata.out


def test_a_wrapped_and_damaged_pth(tmp_path, capsys):
    module = timm.create_model("test_resnet")
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, tmp_path / "wrapped.pth")
    _, variables = load_pretrained(str(tmp_path / "wrapped.pth"), "test_resnet")
    np.testing.assert_array_equal(variables["params"]["head"]["kernel"], module.state_dict()["fc.weight"].numpy().T)
    (tmp_path / "short.pth").write_bytes((tmp_path / "wrapped.pth").read_bytes()[:5000])
    assert main(["export", str(tmp_path / "short.pth"), str(tmp_path / "out.safetensors")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_linear_probe_starts_from_pretrained_weights_and_trains_the_head_alone(tmp_path, run):
    """With other classes, and with the preprocessing and the model that the weights name."""
    config = load_config(ROOT / "configs" / "finetune_folder.py")
    config = dataclasses.replace(
        config,
        model=ModelConfig(pretrained=str(run)),
        finetune=FinetuneConfig("linear_probe"),
        data=dataclasses.replace(SMALL.data, image_size=None, synthetic_classes=3, on_device=False),
        schedule=SMALL.schedule,
        train=TrainConfig(steps=3, batch_size=8, ema_decay=None),
        log=SMALL.log,
    )
    summary = train(config, tmp_path / "tuned")
    assert summary["steps"] == 3
    _, before = load_pretrained(str(run))
    model, after = load_pretrained(str(tmp_path / "tuned"))
    assert model.drop_rate == 0.1 and model.num_classes == 3
    assert find_weights(str(tmp_path / "tuned")).preprocessing.image_size == 32
    head = after["params"].pop("head")
    assert before["params"].pop("head")["bias"].shape == (5,) and np.all(head["bias"] != 0)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert train(config, tmp_path / "tuned") == summary


def test_a_published_tag_brings_its_preprocessing(tmp_path, monkeypatch):

    tag = Weights({}, "resnet50", {"num_classes": 1000}, find_tag_preprocessing("resnet50.tv2_in1k"))
    monkeypatch.setattr(resolve, "find_weights", lambda source: tag)
    config = resolve.resolve(Config(model=ModelConfig(pretrained="resnet50.tv2_in1k"))).config
    assert config.model.name == "resnet50" and config.data.mean == (0.485, 0.456, 0.406)
    assert (config.data.image_size, config.data.eval_image_size, config.augment.eval_crop) == (176, 224, 0.965)
    own = Config(model=ModelConfig(pretrained="x"), data=DataConfig(image_size=64, mean=(0.1, 0.1, 0.1)))
    kept = resolve.resolve(own).config.data
    assert (kept.image_size, kept.eval_image_size, kept.mean, kept.std) == (64, None, (0.1,) * 3, (0.229, 0.224, 0.225))


def find_tag_preprocessing(tag):
    from resnet_jax.weights.tags import find_tag

    return find_tag(tag).preprocessing


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A file that says which model it holds."""
    file = tmp_path_factory.mktemp("source") / "in.safetensors"
    model = create_model("test_resnet")
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    save_tensors(file, Weights(to_torch(model, variables), "test_resnet", {}), "safetensors")
    return str(file)


FORMS = ("safetensors", "pth", "stablehlo")


@pytest.mark.parametrize("form", FORMS)
def test_exporting_to_a_place_that_cannot_be_written(form, source, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for target, says in (
        (tmp_path / "file" / f"out.{form}", "cannot be written"),
        (f"/proc/no/out.{form}", "cannot be written"),
        (tmp_path / f"{'x' * 300}.{form}", "File name too long"),
    ):
        assert main(["export", source, str(target)]) == 2
        assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_leaves_what_was_there(form, source, tmp_path, capsys):
    """A limit on the size of files stands for the disk."""
    out = tmp_path / f"out.{form}"
    out.write_text("what was there")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        assert main(["export", source, str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert f"{out} cannot be written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out] and out.read_text() == "what was there"


def test_an_export_that_is_ended_leaves_nothing_beside_its_target(source, tmp_path):
    command = [sys.executable, "-m", "resnet_jax", "export", str(source), str(tmp_path / "net.stablehlo")]
    with subprocess.Popen(command, env=os.environ | {"GLIBC_TUNABLES": ""}) as process:
        while process.poll() is None and not os.listdir(tmp_path):
            time.sleep(0.01)
        (beside,) = os.listdir(tmp_path)
        process.terminate()
    assert beside != "net.stablehlo" and process.returncode == -signal.SIGTERM
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_an_export_has_the_permissions_of_any_new_file(form, source, tmp_path):
    """A server under another user reads it."""
    out, before = tmp_path / f"out.{form}", os.umask(0o022)
    try:
        assert main(["export", source, str(out)]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o644


@pytest.mark.parametrize("form", FORMS)
def test_devices_pipes_and_folders_are_not_replaced(form, source, tmp_path, capsys):
    os.mkfifo(tmp_path / f"pipe.{form}")
    (tmp_path / f"folder.{form}").mkdir()
    (tmp_path / f"link.{form}").symlink_to("/dev/null")
    before = sorted(tmp_path.iterdir())
    for target in before:
        assert main(["export", source, str(target)]) == 2
        assert "no ordinary file" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert stat.S_ISFIFO((tmp_path / f"pipe.{form}").stat().st_mode) and Path("/dev/null").is_char_device()


def test_a_link_stays_and_its_file_is_written(source, tmp_path):
    (tmp_path / "link.pth").symlink_to(tmp_path / "real.pth")
    assert main(["export", source, str(tmp_path / "link.pth")]) == 0
    assert (tmp_path / "link.pth").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.pth", "real.pth"]
    assert load_pretrained(str(tmp_path / "real.pth"), "test_resnet")[0].num_classes == 1000


def test_a_bare_file_is_exported_with_the_preprocessing_that_predict_takes(tmp_path, source):
    save_file(load_file(source), tmp_path / "bare.safetensors")
    assert (
        main(["export", str(tmp_path / "bare.safetensors"), str(tmp_path / "o.safetensors"), "--name", "test_resnet"])
        == 0
    )
    metadata = find_weights(str(tmp_path / "o.safetensors")).preprocessing
    assert metadata == Predictor.from_source(tmp_path / "bare.safetensors", "test_resnet").preprocessing
    assert metadata == find_tag_preprocessing("test_resnet.r160_in1k")
