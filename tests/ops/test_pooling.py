import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.ops.custom_kernels import sharded_batch
from resnet_jax.ops.pooling import anti_alias, average_pool, ceil_max_pool, global_pool, max_pool

X = np.random.default_rng(0).normal(1.0, 2.0, size=(4, 9, 9, 32)).astype(np.float32)


def test_max_pool_pads_with_minus_infinity_on_both_sides():
    x = -np.abs(X)
    y = np.asarray(max_pool(jnp.asarray(x)))
    assert y.shape == (4, 5, 5, 32)
    np.testing.assert_array_equal(y[:, 0, 0], x[:, :2, :2].max((1, 2)))
    np.testing.assert_array_equal(y[:, 1, 2], x[:, 1:4, 3:6].max((1, 2)))


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("zero_border", [False, True])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_max_pool_and_its_gradient_are_those_of_xla(size, zero_border, platform):
    """Among equal values too, of which the first takes the gradient; NaN is not lost."""
    x = jnp.asarray(np.random.default_rng(0).integers(-2, 3, (3, size, size, 5)), jnp.float32)

    def plain(x):
        border = 0.0 if zero_border else -jnp.inf
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=border)
        return nn.max_pool(padded, (3, 3), strides=(2, 2))

    def ours(x):
        with sharded_batch(platform=platform):  # as a step over devices of this kind chooses
            return max_pool(x, zero_border=zero_border)

    np.testing.assert_array_equal(ours(x), plain(x))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=plain(x).shape), jnp.float32)
    gradients = [jax.grad(lambda x, pool=pool: (pool(x) * weights).sum())(x) for pool in (ours, plain)]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-6)
    broken = x.at[1, 4, 4, 2].set(jnp.nan)
    np.testing.assert_array_equal(jnp.isnan(ours(broken)), jnp.isnan(plain(broken)))


def test_average_pool_counts_only_the_pixels_that_are_there():
    y = np.asarray(average_pool(jnp.asarray(X), 2))
    assert y.shape == (4, 5, 5, 32)
    np.testing.assert_allclose(y[:, 0, 1], X[:, 0:2, 2:4].mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(y[:, 4, 4], X[:, 8, 8], rtol=1e-6)


@pytest.mark.parametrize(("window", "side"), [(3, 9), (3, 8), (2, 9)])
def test_the_last_window_may_hang_over_as_in_pytorch(window, side):
    torch = pytest.importorskip("torch")
    x = X[:, :side, :side]
    expected = torch.nn.functional.max_pool2d(torch.tensor(x.transpose(0, 3, 1, 2)), window, 2, ceil_mode=True)
    np.testing.assert_array_equal(ceil_max_pool(jnp.asarray(x), window), expected.numpy().transpose(0, 2, 3, 1))


def test_blur_is_a_depthwise_convolution_beside_a_mirrored_border():
    torch = pytest.importorskip("torch")
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    images = torch.nn.functional.pad(torch.tensor(X.transpose(0, 3, 1, 2)), (1, 1, 1, 1), mode="reflect")
    kernel = (taps[:, None] * taps)[None, None].repeat(32, 1, 1, 1)
    expected = torch.nn.functional.conv2d(images, kernel, stride=2, groups=32).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(anti_alias(jnp.asarray(X), "blur", 2), expected, rtol=1e-5, atol=1e-5)


def test_global_pools_are_numpys():
    mean, maximum = X.mean((1, 2)), X.max((1, 2))
    expected = {"avg": mean, "max": maximum, "avgmax": (mean + maximum) / 2, "none": X}
    expected["catavgmax"] = np.concatenate([mean, maximum], -1)
    for kind, values in expected.items():
        np.testing.assert_allclose(global_pool(jnp.asarray(X), kind), values, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="choose one of"):
        global_pool(jnp.asarray(X), "median")
