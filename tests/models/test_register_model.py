"""Modules of a user's own among the named models."""

import dataclasses
import json
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import resnet_jax as rj
from resnet_jax.cli import main
from resnet_jax.config import Config, DataConfig, ModelConfig
from resnet_jax.data.sources import load_dataset
from resnet_jax.lab import relatives
from resnet_jax.lab.fit import load
from resnet_jax.models import registry
from resnet_jax.models.registry import cost, count_parameters
from resnet_jax.recipe_files import load_config
from resnet_jax.runs.forecast import forecast
from resnet_jax.training.build import build_model

from ..conftest import ROOT

RECIPE = """
import flax.linen as nn
import jax.numpy as jnp
import resnet_jax as rj
from resnet_jax.config import Config, ModelConfig, ScheduleConfig, TrainConfig

@rj.register_model("net-of-the-file")
class Net(nn.Module):
    num_classes: int
    width: int = 8
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, images, train, endpoints=False):
        x = nn.Conv(self.width, (3, 3), 2, dtype=self.dtype, name="stem")(images)
        x = nn.relu(nn.BatchNorm(not train, name="norm")(x)).mean((1, 2)).astype(jnp.float32)
        logits = nn.Dense(self.num_classes, name="head")(x)
        return (logits, {"features": x}) if endpoints else logits

config = Config(model=ModelConfig(name="net-of-the-file"), train=TrainConfig(steps=4, batch_size=96, seed=3),
                schedule=ScheduleConfig(warmup_epochs=0.1))
"""


@pytest.fixture(autouse=True)
def nothing_stays_registered(monkeypatch):
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))


@pytest.fixture
def net():
    """A module without `dtype` and `in_channels`, which must be told `train`."""

    @rj.register_model("net")
    class Net(nn.Module):
        num_classes: int
        width: int = 8

        @nn.compact
        def __call__(self, images, train):
            x = nn.relu(nn.Conv(self.width, (3, 3), feature_group_count=1, name="conv1")(images))
            x = nn.relu(nn.BatchNorm(not train, name="bn1")(x))
            return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))

    return Net


def test_it_is_created_listed_and_counted(net):
    assert rj.list_models("ne[st]*") == ["net"]
    model = rj.create_model("net", num_classes=5, width=4, dtype=jnp.float32, in_channels=3)
    assert model == net(num_classes=5, width=4)
    parameters = (9 * 3 + 1) * 4 + 2 * 4 + (4 + 1) * 5
    assert cost(model, 32) == (parameters, 32 * 32 * 4 * (27 + 2) + 20)
    with pytest.raises(rj.InputError, match="net needs num_classes"):
        rj.create_model("net")
    with pytest.raises(rj.InputError, match=r"net has no field 'widht'; did you mean width"):
        rj.create_model("net", num_classes=2, widht=3)
    with pytest.raises(rj.InputError, match="net has no field 'dtype'"):
        rj.create_model("net", num_classes=2, dtype=jnp.bfloat16)


def test_a_function_is_registered_too(net):
    @rj.register_model("wide_net")
    def wide(num_classes, **fields):
        return net(num_classes, width=64, **fields)

    assert rj.create_model("wide_net", num_classes=3) == net(3, 64)
    rj.register_model("none")(lambda num_classes: "a module")
    with pytest.raises(rj.InputError, match=r"gave str, expected a flax.linen.Module"):
        rj.create_model("none", num_classes=3)


def test_a_name_is_registered_once(net):
    def other(num_classes):
        return net(num_classes)

    for name in ("net", "resnet50"):
        with pytest.raises(rj.InputError, match=f"'{name}' is taken already; give .*other another name"):
            rj.register_model(name)(other)
    assert rj.register_model("net")(net) is net
    with pytest.raises(rj.InputError, match="a name is made of letters"):
        rj.register_model("a.net")(other)
    with pytest.raises(rj.InputError, match=r"Dense takes no num_classes.* give the module such a field"):
        rj.register_model("dense")(nn.Dense)
    assert rj.list_models("*net")[-1:] != ["a.net"] and rj.list_models("dense") == []


def test_weights_go_by_the_paths_of_the_module_and_by_the_path_of_a_file(net, tmp_path, caplog):
    model = rj.create_model("net", num_classes=5)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), False)
    statistics = {"bn1": {"mean": jnp.arange(8.0), "var": jnp.arange(1.0, 9.0)}}
    variables |= {"batch_stats": statistics}
    tensors = rj.to_torch(model, variables)
    assert {name: value.shape for name, value in tensors.items()} == {
        "conv1.weight": (8, 3, 3, 3), "conv1.bias": (8,), "bn1.weight": (8,), "bn1.bias": (8,), 
        "bn1.running_mean": (8,), "bn1.running_var": (8,), "bn1.num_batches_tracked": (),
        "head.weight": (5, 8), "head.bias": (5,),
    }  # fmt: skip
    for name, part in (("conv1", "params"), ("head", "params")):
        kernel = variables[part][name]["kernel"]
        np.testing.assert_array_equal(tensors[f"{name}.weight"], np.moveaxis(kernel, (-1, -2), (0, 1)))
    file = tmp_path / "weights.safetensors"
    save_file(tensors, file)
    same, loaded = rj.load_pretrained(str(file), "net")
    assert same == model
    jax.tree.map(np.testing.assert_array_equal, loaded, dict(variables))
    fewer, loaded = rj.load_pretrained(str(file), "net", num_classes=2)
    assert "has 5 classes, the model 2: its head is made anew" in caplog.text
    assert fewer.num_classes == 2 and loaded["params"]["head"]["kernel"].shape == (8, 2)
    np.testing.assert_array_equal(loaded["params"]["conv1"]["kernel"], variables["params"]["conv1"]["kernel"])
    save_file({name.replace("conv1.b", "conv2.b"): value for name, value in tensors.items()}, file)
    with pytest.raises(rj.InputError, match=r"missing: conv1.bias \(did you mean conv2.bias"):
        rj.load_pretrained(str(file), "net")


def test_a_module_without_a_head_keeps_all_that_it_has(tmp_path):
    """And arrays that PyTorch would call by one name keep their own."""

    @rj.register_model("headless")
    class Headless(nn.Module):
        num_classes: int = 4

        @nn.compact
        def __call__(self, images, train):
            kernel = self.param("kernel", nn.initializers.normal(), (3, 5, 2))
            scale = self.param("scale", nn.initializers.ones, (5,))
            seen = self.variable("batch_stats", "scale", jnp.ones, (5,))
            x = images.mean((1, 2)) @ kernel[..., 0] * scale * seen.value
            return nn.Dense(self.num_classes, use_bias=False)(x)

    model = rj.create_model("headless")
    variables = jax.tree.map(lambda x: x + 1, model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), False))
    tensors = rj.to_torch(model, variables)
    assert set(tensors) == {"params.kernel", "params.scale", "batch_stats.scale", "Dense_0.weight"}
    save_file(tensors, tmp_path / "weights.safetensors")
    _, loaded = rj.load_pretrained(str(tmp_path / "weights.safetensors"), "headless")
    jax.tree.map(np.testing.assert_array_equal, loaded, dict(variables))


@pytest.fixture
def run(tmp_path):
    """The folder of a run of a recipe's own module, started as a command, and the recipe."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    flags = ["--config", str(tmp_path / "recipe.py"), "--parallel.devices", "1"]
    assert main(["train", *flags, "--workdir", str(tmp_path / "run")]) == 0
    return tmp_path


def test_a_recipe_registers_what_it_names(run, capsys):
    assert json.loads((run / "run" / "config.json").read_text())["model"]["name"] == "net-of-the-file"
    assert main(["train", "--config", str(run / "recipe.py"), "--workdir", str(run / "run")]) == 0  # it goes on
    out = run / "out.safetensors"
    assert main(["evaluate", str(run / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("{")[2].join(("{", "")))["test"]["count"] == 360
    assert main(["export", str(run / "run"), str(out)]) == 0
    assert load_file(out)["stem.weight"].shape == (8, 3, 3, 3)
    probe = ["--model.pretrained", str(out), "--finetune.mode", "linear_probe", "--train.ema_decay", "None"]
    assert main(["train", "--config", str(run / "recipe.py"), *probe, "--workdir", str(run / "probe")]) == 0
    before, after = (rj.load_pretrained(str(source))[1] for source in (out, run / "probe"))
    np.testing.assert_array_equal(before["params"]["stem"]["kernel"], after["params"]["stem"]["kernel"])
    assert (before["params"]["head"]["kernel"] != after["params"]["head"]["kernel"]).any()
    predictor = rj.Predictor.from_source(str(out))
    pixels = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    assert predictor.class_names == tuple("0123456789")
    np.testing.assert_allclose(predictor(pixels), rj.Predictor.from_run(run / "run")(pixels), atol=1e-6)
    capsys.readouterr()
    assert main(["knn", str(run / "run"), "--config", str(run / "recipe.py"), "--split", "validation", "--json"]) == 0
    found, data = json.loads(capsys.readouterr().out), load_dataset(rj.Config().data, seed=3)
    assert (found["count"], found["train_count"]) == (len(data.validation), len(data.train)) != (282, 1155)
    assert found["channels"] == 8 and found["accuracy"] > 0.3
    del registry.MODELS["net-of-the-file"]
    assert main(["export", str(run / "run"), str(out)]) == 2
    assert "one of your own is there after `register_model`" in capsys.readouterr().err


def test_the_module_of_the_page_trains_by_its_name_and_gives_its_weights(tmp_path, capsys):
    blocks = re.findall(r"```{code-cell} ipython3\n(.*?)```", (ROOT / "docs" / "own_module.md").read_text(), re.S)
    recipe = "".join(block for block in blocks if "class Mixer" in block or "register_model" in block)
    settings = 'rj.config.ModelConfig("mixer_tiny"), train=rj.config.TrainConfig(steps=2, batch_size=96)'
    file, run = tmp_path / "mixer.py", str(tmp_path / "run")
    file.write_text(f"{recipe}\nimport resnet_jax.config\n\nconfig = rj.Config({settings})\n")
    flags = ["--config", str(file), "--parallel.devices", "1", "--log.no_report"]
    assert main(["train", *flags, "--workdir", run]) == 0
    assert f"resnet-jax evaluate {run} --config FILE --per-class" in capsys.readouterr().out
    model, variables = rj.load_pretrained(run)
    assert (model.num_classes, model.image_size) == (10, 8)
    assert model.apply(variables, jnp.zeros((1, 8, 8, 3)), train=False).shape == (1, 10)
    larger = ["--model.pretrained", run, "--data.image_size", "16", "--workdir", str(tmp_path / "larger")]
    assert main(["train", *flags, *larger]) == 2
    assert "shape: Dense_0.weight is [16, 16], the model has [64, 64]" in capsys.readouterr().err


def test_a_module_without_the_fields_that_it_needs_is_told_which():
    class Flat(nn.Module):
        classes: int

        @nn.compact
        def __call__(self, images, train):
            return nn.Dense(self.classes)(images.reshape(len(images), -1))

    @rj.register_model("flat")
    def flat(num_classes):
        return Flat(num_classes)

    with pytest.raises(rj.InputError, match=r"model.name flat: the module Flat has no field num_classes, by which"):
        build_model(Config(ModelConfig("flat"), DataConfig(image_size=8)), 3)

    class Flatter(Flat):
        num_classes: int = 3

    model = Flatter(3)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), False)
    message = r"params/Dense_0/kernel is \[192, 3\], and Flatter has \[12288, 3\].* needs a field image_size"
    with pytest.raises(rj.InputError, match=message):
        rj.to_torch(model, variables)


def test_its_plan_is_made(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    config = load_config(tmp_path / "recipe.py")
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=7))
    for chosen, classes in ((small, 7), (config, 1000)):  # which is what the plan of a named model takes
        assert forecast(chosen, 1)["parameters"] == 28 * 8 + 2 * 8 + 9 * classes


def test_parameters_may_depend_on_the_size_of_the_images():
    @rj.register_model("flat")
    class Flat(nn.Module):
        num_classes: int
        image_size: int = 8

        @nn.compact
        def __call__(self, images, train):
            return nn.Dense(self.num_classes, name="head")(images.reshape(len(images), -1))

    model = build_model(Config(ModelConfig("flat"), DataConfig(image_size=16)), 10)
    assert model.image_size == 16 and count_parameters(model) == (3 * 16**2 + 1) * 10


def test_it_stands_among_the_relatives(monkeypatch, tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    kept = {"name": "plain", "seed": 0, "layers": 8, "parameters": 1, "macs": 1, "kept": 1, "images_per_second": 1.0}
    monkeypatch.setattr(relatives.Notebook, "part", lambda *_: [kept | {"train_error": 0.1, "test_error": 0.1}])
    monkeypatch.setattr(relatives, "RELATIVES", {"plain": ("cifar_plain20", {}, 8)})
    monkeypatch.setattr(relatives, "load", partial(load, train=192, test=32))
    flags = ["--quick", "--seeds", "0", "--config", str(tmp_path / "recipe.py"), "--out", str(tmp_path)]
    assert main(["lab", "relatives", *flags]) == 0
    ours, own = rows = json.loads((tmp_path / "relatives.json").read_text())["rows"]
    assert (ours["name"], own["name"]) == ("plain", "net-of-the-file (own)")
    assert own["parameters"] == 28 * 8 + 16 + 9 * 10 and own["kept"] > 4 * 4 * 8 * 4 and own["layers"] is None
    assert [row["layers"] for row in relatives.table(rows)] == [8, "?"]
    assert "net-of-the-file (own)" in (tmp_path / "index.html").read_text()
