import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.ops import use_custom_kernels
from resnet_jax.ops.batch_statistics import (
    batch_moments,
    ghost_batches,
    normalized,
    normalized_conv1x1,
    plain_normalized_conv1x1,
    update_running_average,
)
from resnet_jax.ops.custom_kernels import sharded_batch

RNG = np.random.default_rng(0)
X = RNG.normal(1.0, 2.0, size=(4, 5, 7, 6)).astype(np.float32)
SCALE, BIAS = RNG.normal(size=(2, 6)).astype(np.float32)


def test_moments_are_numpys():
    mean, var = batch_moments(X)
    assert mean.dtype == var.dtype == jnp.float32
    np.testing.assert_allclose(mean, X.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, X.var((0, 1, 2)), rtol=1e-5)


def test_moments_of_ghost_batches_are_those_of_each():
    mean, var = batch_moments(ghost_batches(jnp.asarray(X), 2))
    assert mean.shape == var.shape == (2, 1, 1, 1, 6)
    for i, part in enumerate(np.split(X, 2)):
        np.testing.assert_allclose(mean[i, 0, 0, 0], part.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(var[i, 0, 0, 0], part.var((0, 1, 2)), rtol=1e-5)


def test_normalisation_and_running_averages_are_pytorchs():
    torch = pytest.importorskip("torch")
    running = [torch.full((6,), 0.5), torch.full((6,), 2.0)]
    before = [v.numpy().copy() for v in running]
    images, *parameters = (torch.tensor(v) for v in (X.transpose(0, 3, 1, 2), SCALE, BIAS))
    expected = torch.nn.functional.batch_norm(images, *running, *parameters, training=True, momentum=0.1, eps=1e-5)
    mean, var = batch_moments(X)
    actual = normalized(X, mean, var, SCALE, BIAS, 1e-5, jnp.float32)
    np.testing.assert_allclose(actual, expected.numpy().transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
    count = X.size // 6
    corrections = (1.0, count / (count - 1))
    for old, batch, correction, theirs in zip(before, (mean, var), corrections, running, strict=True):
        ours = update_running_average(old, batch, 0.9, correction)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


def test_a_convolution_and_its_norm_as_one_are_the_two():
    """With the custom kernels and without; what an NVIDIA GPU computes is in `test_gpu.py`."""
    kernel = RNG.normal(size=(1, 1, 6, 24)).astype(np.float32)
    scale, bias = RNG.normal(size=(2, 24)).astype(np.float32)
    expected = jax.jit(lambda *v: plain_normalized_conv1x1(*v, 1e-5))(X, kernel, scale, bias)
    on = normalized_conv1x1(X, kernel, scale, bias, 1e-5)
    with use_custom_kernels(False):
        off = normalized_conv1x1(X, kernel, scale, bias, 1e-5)
    y = X @ kernel[0, 0]
    whitened = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5)
    for found in (on, off, expected):
        np.testing.assert_allclose(found[0], whitened * scale + bias, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[1], y.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[2], y.var((0, 1, 2)), rtol=1e-4)


def test_the_order_of_a_tpu_is_the_same_norm_to_rounding():
    rng = np.random.default_rng(0)
    x, scale, bias = (jnp.asarray(rng.normal(1.0, 2.0, shape), jnp.float32) for shape in ((4, 5, 5, 8), 8, 8))

    def norm(x):
        return normalized(x, *batch_moments(x), scale, bias, 1e-5, jnp.float32)

    expected, gradient = norm(x), jax.grad(lambda x: (norm(x) ** 3).sum())(x)
    with sharded_batch(platform="tpu"):
        np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(jax.grad(lambda x: (norm(x) ** 3).sum())(x), gradient, rtol=1e-4, atol=1e-3)
        assert (norm(x) != expected).any()
