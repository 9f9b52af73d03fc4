"""A contract for modules: ten and more planted faults are each named, and nothing else; sound modules pass."""

import dataclasses
import json
import os
import random
import re
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resnet_jax as rj
from resnet_jax.cli import main
from resnet_jax.models.densenet import DenseNet
from resnet_jax.models.googlenet import GoogLeNet
from resnet_jax.models.registry import cost
from resnet_jax.models.vit import ViT
from resnet_jax.ops.custom_kernels import sharded_platform
from resnet_jax.training import check_module
from resnet_jax.training.check_report import CHECKS
from resnet_jax.training.check_tracing import multiply_adds

SHAPE = (8, 8, 3)
Dtype = Any


def mean_of_places(x):
    return x.mean((1, 2))


# Sound modules.


class PlainCNN(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        x = nn.relu(nn.Conv(8, (3, 3))(images))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        return nn.Dense(5)(mean_of_places(x))


class Residual(nn.Module):
    """With a field `dtype`, and a branch that starts at zero."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(8, (3, 3), dtype=self.dtype)(images)
        y = nn.relu(nn.Conv(8, (3, 3), dtype=self.dtype)(x))
        x = x + nn.Conv(8, (3, 3), dtype=self.dtype, kernel_init=nn.initializers.zeros)(y)
        return nn.Dense(5, dtype=jnp.float32)(mean_of_places(nn.relu(x)))


class WithBatchNorm(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(8, (3, 3), name="conv")(images)
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name, name="norm")(x)
        return nn.Dense(5)(mean_of_places(nn.relu(x)))


class WithGroupNorm(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        x = nn.relu(nn.GroupNorm(4)(nn.Conv(8, (3, 3))(images)))
        return nn.Dense(5)(mean_of_places(x))


class WithDropout(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        x = nn.relu(nn.Dense(16)(images.reshape(images.shape[0], -1)))
        return nn.Dense(5)(nn.Dropout(0.5, deterministic=not train)(x))


class MLP(nn.Module):
    """Through a method of its own `setup`, and with one output for each image."""

    def setup(self):
        self.layers = [nn.Dense(16), nn.Dense(1)]

    def __call__(self, images, train):
        x = images.reshape(images.shape[0], -1)
        return self.layers[1](nn.tanh(self.layers[0](x)))[:, 0]


class SmallViT(nn.Module):
    dtype: Dtype = None

    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(16, (4, 4), strides=4, dtype=self.dtype)(images)
        x = x.reshape(x.shape[0], -1, 16)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        y = nn.MultiHeadDotProductAttention(2, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        x = x + nn.Dropout(0.1, deterministic=not train)(y)
        x = x + nn.Dense(16, dtype=self.dtype)(nn.gelu(nn.Dense(32, dtype=self.dtype)(nn.LayerNorm()(x))))
        return nn.Dense(5)(x.mean(1))


class Depthwise(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(12, (1, 1))(images)
        x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=12, strides=2)(x))
        return nn.Dense(5)(mean_of_places(nn.Conv(12, (1, 1))(x)))


class WithAuxiliaryHead(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        x = nn.relu(nn.Conv(8, (3, 3))(images))
        if train or self.is_initializing():
            logits = nn.Dense(5, name="auxiliary")(mean_of_places(x))
            self.sow("auxiliary_logits", "logits", logits)
        return nn.Dense(5, name="head")(mean_of_places(nn.relu(nn.Conv(8, (3, 3))(x))))


class Segmentation(nn.Module):
    """Gives a map, and not one vector for each image."""

    @nn.compact
    def __call__(self, images, train):
        return nn.Conv(2, (1, 1))(nn.relu(nn.Conv(8, (3, 3))(images)))


class OwnCollections(nn.Module):
    """Counts its calls, and keeps a mean beside `batch_stats`."""

    @nn.compact
    def __call__(self, images, train):
        x = nn.Dense(8)(images)
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        mean = self.variable("moments", "mean", jnp.zeros, x.shape[-1:])
        y = nn.relu(x - mean.value)
        if train and not self.is_initializing():
            count.value, mean.value = count.value + 1, 0.9 * mean.value + 0.1 * x.mean((0, 1, 2))
        return nn.Dense(5)(mean_of_places(y))


class OwnNoise(nn.Module):
    """Draws from the stream that it is given."""

    @nn.compact
    def __call__(self, images, train):
        x = nn.Dense(16)(images.reshape(images.shape[0], -1))
        if train:
            x = x + 0.1 * jax.random.normal(self.make_rng("dropout"), x.shape)
        return nn.Dense(5)(nn.relu(x))


SOUND = (PlainCNN, Residual, WithBatchNorm, WithGroupNorm, WithDropout, MLP, SmallViT, Depthwise, WithAuxiliaryHead)
SOUND += (Segmentation, OwnCollections, OwnNoise)


@pytest.mark.parametrize("module", SOUND, ids=lambda module: module.__name__)
def test_sound_modules_pass(module):
    report = rj.check(module(), SHAPE)
    assert report.ok, str(report)
    left_out = set() if hasattr(module, "dtype") else {"bfloat16"}
    assert set(report.left_out) == left_out | ({"shard_map"} if module is OwnNoise else set())


def shrunk(name):
    """A named model with every kind of layer that it has, narrow and with few of each; and the side of its images."""
    model = rj.create_model(name, num_classes=4)
    if isinstance(model, ViT):
        return model.clone(width=24, depth=2, heads=3, mlp=32, image_size=2 * model.patch), 2 * model.patch
    size = 8 if model.stem == "3x3" else 32
    if isinstance(model, GoogLeNet):
        return model.clone(widths=tuple(((8,) * 6,) for _ in model.widths)), size
    if isinstance(model, DenseNet):
        return model.clone(stage_sizes=(2, 1), growth=8), size
    # of 32 groups each needs a channel in the stem, which has half of its width first, and several values later
    width, stem, size = (32, 64, 2 * size) if model.norm == "group" else (16, 16, size)
    cardinality, base = (4, 32) if model.cardinality > 1 else (1, model.base_width)
    fields = {"widths": (width, width), "stem_width": stem, "cardinality": cardinality, "base_width": base}
    block = model.block if isinstance(model.block, str) else model.block[1:3]
    return model.clone(stage_sizes=(1, 1), block=block, **fields), size


OF_EACH_FAMILY = ("cifar_resnet20", "cifar_densenet_bc_100_12", "cifar_googlenet", "cifar_vit")


@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_named_models_pass(name):
    model, size = shrunk(name)
    report = rj.check(model, (size, size, 3))
    assert report.ok and not report.left_out, str(report)


def test_frozen_norms_and_dropped_paths_are_no_fault():
    fields = {"norm": "frozen_batch", "drop_path_rate": 0.2, "drop_rate": 0.1, "widths": (8, 8, 8), "stem_width": 8}
    report = rj.check(rj.create_model("cifar_resnet8", **fields), SHAPE)
    assert report.ok and not report.left_out, str(report)


class OfNNX(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, images, train):
        return self.norm(self.dense(mean_of_places(images)), use_running_average=not train)


def test_a_module_of_nnx_comes_over_the_bridge():
    (finding,) = rj.check(nnx.bridge.to_linen(OfNNX), SHAPE).findings
    assert (finding.check, finding.where) == ("shard_map", ("norm",))  # it has no axis_name, and all else is sound


# Faulty ones.


class NormOfAnotherCollection(nn.Module):
    collection: str

    @nn.compact
    def __call__(self, x, train):
        mean = self.variable(self.collection, "mean", jnp.zeros, x.shape[-1:])
        if train and not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * x.mean((0, 1, 2))
        return x - mean.value


class NormInEvaluation(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return x if train else x - x.mean(0)


class RandomShift(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x, train):
        return x + (random.random() if self.kind == "python" else np.random.normal(size=x.shape))


class RootAtZero(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return jnp.sqrt(jnp.maximum(x, 0))


class DividesByZero(nn.Module):
    """As a black image does: its deviation is 0."""

    @nn.compact
    def __call__(self, x, train):
        x = x - x[:, :1, :1]
        return x / x.std((1, 2, 3), keepdims=True)


class LoopWithoutGradient(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return jax.lax.while_loop(lambda c: c[0] < x.shape[1], lambda c: (c[0] + 1, c[1] / 2), (0, x))[1]


class NoParameters(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return mean_of_places(images)


class OtherUnderJit(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return 2 * x if isinstance(x, jax.core.Tracer) else x


class LooksAtValues(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return x if x.sum() > 0 else -x


class ConstantKernel(nn.Module):
    """As nobody writes it on purpose: the values come from NumPy's random numbers."""

    @nn.compact
    def __call__(self, x, train):
        kernel = self.param("kernel", lambda key, shape: jnp.float32(np.random.normal(size=shape)), (8, 8))
        return x @ kernel


class WithWeight(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return x @ self.param("weight", nn.initializers.lecun_normal(), (8, 8))


class UnusedLayer(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        nn.Dense(4, name="unused")(x)
        return nn.Dense(8, name="used")(x)


class HalfVariables(nn.Module):
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(8, dtype=self.dtype, param_dtype=self.dtype, name="dense")(x)


class LosesDigits(nn.Module):
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        return jax.lax.reduce_precision(x + 300, 8, 7) - 300 if self.dtype == jnp.bfloat16 else x


class HeldNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=True, name="norm")(x)


class LateDropout(nn.Module):
    deterministic: bool

    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(0.5, deterministic=self.deterministic, name="drop")(x)


class Doubled(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return x, x


class LateLayer(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(8, name="late")(x) if train else x


class Within(nn.Module):
    """A convolution, a part with a fault, and a head."""

    part: Any
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(8, (3, 3), dtype=self.dtype, name="conv")(images)
        own = {"dtype": self.dtype} if hasattr(self.part, "dtype") else {}
        x = self.part(name="part", **own)(x, train)
        return nn.Dense(5, name="head")(mean_of_places(nn.tanh(x)).astype(jnp.float32))


class DependsOnBatch(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(5, name="head")(images.reshape(1, -1)) * jnp.ones((images.shape[0], 1))


class WithoutTrain(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(5)(mean_of_places(images))


class TwoHeads(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(5)(mean_of_places(images)), nn.Dense(2)(mean_of_places(images))


class HalfLogits(nn.Module):
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(5, dtype=self.dtype)(mean_of_places(images))


class IgnoresDtype(nn.Module):
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(5)(mean_of_places(images))


class LocalNorm(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(8, (3, 3))(images)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(5)(mean_of_places(nn.relu(x)))


class NormOfTheBatch(nn.Module):
    """Whose statistics are always those of the batch."""

    @nn.compact
    def __call__(self, images, train):
        x = nn.BatchNorm(use_running_average=False, name="norm")(images)
        return nn.Dense(5)(mean_of_places(x))


class MeansOfAnAxis(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        x = nn.BatchNorm(use_running_average=not train, axis_name="data", name="norm")(images)
        return nn.Dense(5)(mean_of_places(x))


class OneVector(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(5)(images.mean((0, 1, 2)))


class Similarities(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        x = nn.Dense(4)(mean_of_places(images))
        return x @ x.T


class OtherOverDevices(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return x * (2 if sharded_platform() else 1)


class Classes(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(5)(mean_of_places(images)).argmax(-1)


class Probabilities(nn.Module):
    in_training: bool = True

    @nn.compact
    def __call__(self, images, train):
        logits = nn.Dense(5)(mean_of_places(images))
        return logits if train and not self.in_training else nn.softmax(logits)


EVERYTHING = ("conv/bias", "conv/kernel", "head/kernel", "loss")

FAULTS = {
    "norm of another collection": (Within(partial(NormOfAnotherCollection, "losses")), "collections", ("part",)),
    "norm that is held": (Within(HeldNorm), "collections", ("part/norm/mean", "part/norm/var")),
    "Python's random number": (Within(partial(RandomShift, "python")), "pure", ("part",)),
    "NumPy's random numbers": (Within(partial(RandomShift, "numpy")), "pure", ("part",)),
    "NumPy's random parameters": (Within(ConstantKernel), "key", ("part/kernel",)),
    "unused layer": (Within(UnusedLayer), "gradients", ("part/unused/bias", "part/unused/kernel")),
    "statistics of the evaluated batch": (Within(NormInEvaluation), "evaluation", ("part",)),
    "batch norm that always takes the batch": (NormOfTheBatch(), "evaluation", ("norm",)),
    "dropout in evaluation": (Within(partial(LateDropout, False)), "evaluation", ("part/drop",)),
    "dropout that drops nothing": (Within(partial(LateDropout, True)), "train", ("part/drop",)),
    "layer of training alone": (Within(LateLayer), "train", ("part/late",)),
    "half logits": (HalfLogits(), "dtype", ("HalfLogits",)),
    "half variables": (Within(HalfVariables), "dtype", ("part/dense/bias", "part/dense/kernel")),
    "digits lost in bfloat16": (Within(LosesDigits), "bfloat16", ("part",)),
    "dtype that is ignored": (IgnoresDtype(), "bfloat16", ("IgnoresDtype",)),
    "shape of the batch": (DependsOnBatch(), "shape", ("head/kernel",)),
    "similarities of the batch": (Similarities(), "shape", ("Similarities",)),
    "another result over devices": (Within(OtherOverDevices), "devices", EVERYTHING),
    "root at zero": (Within(RootAtZero), "finite", ("part",)),
    "division by zero": (Within(DividesByZero), "finite", ("part",)),
    "loop without a gradient": (Within(LoopWithoutGradient), "gradients", ("Within",)),
    "no parameters": (NoParameters(), "call", ("NoParameters",)),
    "no train": (WithoutTrain(), "call", ("WithoutTrain",)),
    "two heads": (TwoHeads(), "output", ("TwoHeads",)),
    "one vector for all images": (OneVector(), "output", ("OneVector",)),
    "classes": (Classes(), "output", ("Classes",)),
    "probabilities": (Probabilities(), "output", ("Probabilities",)),
    "probabilities in evaluation": (Probabilities(in_training=False), "output", ("Probabilities",)),
    "two results": (Within(Doubled), "call", ("Within",)),
    "kernel of another name": (Within(WithWeight), "decay", ("part/weight",)),
    "Python's if": (Within(LooksAtValues), "jit", ("part",)),
    "another result under jit": (Within(OtherUnderJit), "jit", ("part",)),
    "axis that is not there": (MeansOfAnAxis(), "jit", ("norm",)),
    "norm of one device": (LocalNorm(), "shard_map", ("norm",)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_and_no_other(name):
    module, kind, where = FAULTS[name]
    report = rj.check(module, SHAPE)
    assert [(finding.check, finding.where) for finding in report.findings] == [(kind, where)], str(report)
    assert kind in CHECKS and report.findings[0].problem and report.findings[0].remedy
    assert f"FOUND     {kind} " in str(report) and "1 finding" in str(report)


def test_a_state_that_is_read_otherwise_is_found(monkeypatch):
    read = flax.serialization.from_bytes

    def read_otherwise(target, stored):
        return jax.tree.map(lambda x: (x * 1.001).astype(x.dtype), read(target, stored))

    monkeypatch.setattr(flax.serialization, "from_bytes", read_otherwise)
    found = rj.check(PlainCNN(), SHAPE).findings
    assert [finding.check for finding in found] == ["resume"] and "Dense_0/kernel" in found[0].where


def test_the_report_has_figures_and_what_was_left_out(monkeypatch):
    monkeypatch.setattr(check_module, "MOST_DEVICES", 1)
    report = rj.check(PlainCNN(), SHAPE)
    assert report.ok and set(report.left_out) == {"devices", "shard_map", "bfloat16"}
    assert report.parameters == 9 * 3 * 8 + 8 + 9 * 8 * 8 + 8 + 8 * 5 + 5
    assert report.gmacs * 1e9 == pytest.approx(64 * 9 * 3 * 8 + 16 * 9 * 8 * 8 + 8 * 5)
    assert report.compile_seconds > 0 and report.memory > 4 * 4 * 8 * 8 * (3 + 8)
    lines = str(report).splitlines()
    assert lines[0] == "PlainCNN, images 8 x 8 x 3" and lines[-1] == "no findings"
    assert [line.split()[0] for line in lines if "JAX sees one device" in line] == ["left", "left"]
    assert dataclasses.asdict(report)["module"] == "PlainCNN"


def test_a_model_costs_what_the_table_of_models_says():
    model = rj.create_model("resnet18")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))
    macs = multiply_adds(model, shapes, (224, 224, 3))
    assert set(macs) == {"float32"} and macs["float32"] == pytest.approx(cost(model, 224).macs, rel=0.01)
    half = multiply_adds(model.clone(dtype=jnp.bfloat16), shapes, (224, 224, 3))
    assert half == {"bfloat16": macs["float32"] - 512_000, "float32": 512_000}  # the head


def test_rules_of_ones_own_cover_a_parameter():
    rules = ((".*/(kernel|weight)", 1.0), (".*/bias", 0.0))
    assert "decay" not in [finding.check for finding in rj.check(Within(WithWeight), SHAPE, decay_rules=rules).findings]


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (PlainCNN, SHAPE, "takes a flax.linen.Module, not the class PlainCNN: give an object such as"),
        (len, SHAPE, "takes a flax.linen.Module, not an object of builtin_function_or_method"),
        (PlainCNN(), (8, 8), "must be .height, width, channel."),
        (PlainCNN(), (8, 8, 0), "must be .height, width, channel."),
    ],
)
def test_what_is_no_module_is_named(module, shape, message):
    with pytest.raises(rj.InputError, match=message):
        rj.check(module, shape)


NET = """
import beside
import flax.linen as nn


class Net(nn.Module):
    classes: int = 3
    spare: bool = False

    @nn.compact
    def __call__(self, images, train):
        if self.spare:
            nn.Dense(4, name="spare")(images)
        return nn.Dense(self.classes)(images.mean((1, 2)))


net = Net(beside.CLASSES)
number = 3


def make():
    return Net(spare=True)


def make_of(classes):
    return Net(classes)
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    """The current folder, with a file of modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # the command changes it
    (tmp_path / "beside.py").write_text("CLASSES = 5")
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "bad.py").write_text("import nothing_of_this_name")


def test_the_command_ends_with_the_status_of_its_findings(net, capsys):
    assert main(["check", "net.py:net", "--image-size", "4", "--channels", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["module"], found["image_shape"], found["parameters"], found["devices"]) == ("Net", [4, 4, 1], 10, 8)
    assert main(["check", "net.py:make", "--image-size", "4"]) == 1
    out = capsys.readouterr().out
    assert "1. gradients, at spare/bias, spare/kernel:" in out and out.endswith("1 finding\n")


WRONG = """
import flax.linen as nn
import jax.numpy as jnp


def scaled(x, by):
    return jnp.multiply(x, by)


class Net(nn.Module):
    by: object = None

    @nn.compact
    def __call__(self, images, train):
        x = scaled(nn.Dense(3)(images.mean((1, 2))), "two" if self.by is None else self.by)
        return x if x[0, 0] > 0 else -x


def branches():
    return Net(2.0)
"""


def test_the_line_of_the_users_own_code_in_which_an_error_arose_is_named(net, capsys):
    """The innermost one, whether the error arose in it or in a library that it calls."""
    Path("wrong.py").write_text(WRONG)
    for name, line in (("Net", 7), ("branches", 16)):
        assert main(["check", f"wrong.py:{name}", "--image-size", "4"]) == 1
        out = capsys.readouterr().out
        assert f"look at wrong.py, line {line}\n" in out and "the message says" not in out, out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("net.py:Not", "net.py defines no 'Not'; it has Net, net"),
        ("net.py:number", "gives int, not a flax.linen.Module"),
        ("net.py:make_of", "make_of\\(\\) raises TypeError: .*; name a function without arguments"),
        ("none.py:net", "there is no such file; give FILE:NAME"),
        ("bad.py:net", "bad.py, line 1: ModuleNotFoundError"),
        ("rsnet18", "no model is called 'rsnet18'; did you mean resnet18"),
        ("net.py:net --devices 0", "--devices 0: give a number from 1"),
        ("net.py:net --image-size 0", "must be at least 1"),
    ],
)
def test_wrong_input_of_the_command_is_named(line, message, net, capsys):
    assert main(["check", *line.split()]) == 2
    assert re.search(message, capsys.readouterr().err)
