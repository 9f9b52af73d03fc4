"""A contract for modules: ten and more planted faults are each named, and nothing else; sound modules pass."""

import random
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.models.densenet import DenseNet
from resnet_jax.models.googlenet import GoogLeNet
from resnet_jax.models.vit import ViT
from resnet_jax.training.check_report import CHECKS

SHAPE = (8, 8, 3)
Dtype = Any


def mean_of_places(x):
    return x.mean((1, 2))


def image_norm(images):
    return images / jnp.sqrt(jnp.square(images).sum((1, 2, 3), keepdims=True) + 1e-6)


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


class OwnNoise(nn.Module):
    """Draws from the stream that it is given."""

    @nn.compact
    def __call__(self, images, train):
        x = nn.Dense(16)(images.reshape(images.shape[0], -1))
        if train:
            x = x + 0.1 * jax.random.normal(self.make_rng("dropout"), x.shape)
        return nn.Dense(5)(nn.relu(x))


SOUND = (PlainCNN, Residual, WithBatchNorm, WithGroupNorm, WithDropout, MLP, SmallViT, Depthwise, WithAuxiliaryHead)
SOUND += (Segmentation, OwnNoise)


@pytest.mark.parametrize("module", SOUND, ids=lambda module: module.__name__)
def test_sound_modules_pass(module):
    report = rj.check(module(), SHAPE)
    assert report.ok, str(report)
    left_out = set() if hasattr(module, "dtype") else {"bfloat16"}
    assert set(report.left_out) == left_out | ({"shard_map"} if module is OwnNoise else set())


def shrunk(name):
    """A named model with all kinds of layers that it has, in the smallest form; and the side of its images."""
    model = rj.create_model(name, num_classes=4)
    if isinstance(model, ViT):
        return model.clone(width=24, depth=2, heads=3, mlp=32, image_size=2 * model.patch), 2 * model.patch
    if isinstance(model, GoogLeNet):
        return model.clone(widths=tuple(tuple((8,) * 6 for _ in stage[:2]) for stage in model.widths)), 32
    sizes = tuple(min(2, size) for size in model.stage_sizes)
    if isinstance(model, DenseNet):
        return model.clone(stage_sizes=sizes, growth=8), 32
    width = 32 if model.norm == "group" else 16
    cardinality, base = (4, 32) if model.cardinality > 1 else (1, model.base_width)
    fields = {"widths": (width,) * len(sizes), "stem_width": width, "cardinality": cardinality, "base_width": base}
    return model.clone(stage_sizes=sizes, **fields), 32


OF_EACH_FAMILY = ("test_resnet", "resnetv2_50x1_bit", "seresnextaa101d_32x8d", "cifar_botnet20", "cifar_plain1202")
OF_EACH_FAMILY += ("densenetblur121d", "googlenet", "vit_tiny")


@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_named_models_pass(name):
    model, size = shrunk(name)
    report = rj.check(model, (size, size, 3))
    assert report.ok and not report.left_out, str(report)


# Faulty ones.


class NormOfAnotherCollection(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        mean = self.variable("moments", "mean", jnp.zeros, x.shape[-1:])
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


class Classes(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(5)(mean_of_places(images)).argmax(-1)


FAULTS = {
    "norm of another collection": (Within(NormOfAnotherCollection), "collections", ("part",)),
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
    "root at zero": (Within(RootAtZero), "finite", ("part",)),
    "no train": (WithoutTrain(), "call", ("WithoutTrain",)),
    "two heads": (TwoHeads(), "output", ("TwoHeads",)),
    "one vector for all images": (OneVector(), "output", ("OneVector",)),
    "classes": (Classes(), "output", ("Classes",)),
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
