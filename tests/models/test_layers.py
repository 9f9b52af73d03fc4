import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models.layers import BatchNorm, Conv, ConvNorm, GroupNorm
from resnet_jax.ops import use_custom_kernels
from resnet_jax.training.finetune import frozen_statistics

X = np.random.default_rng(0).normal(1.0, 2.0, size=(4, 9, 9, 32)).astype(np.float32)


def test_batch_norm_agrees_with_flax():
    ours, theirs = BatchNorm(), nn.BatchNorm(momentum=0.9, epsilon=1e-5)
    variables = ours.init(jax.random.key(0), X)
    expected, their_stats = theirs.apply(variables, X, use_running_average=False, mutable=["batch_stats"])
    actual, our_stats = ours.apply(variables, X, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), our_stats, their_stats)
    variables = variables | our_stats
    expected = theirs.apply(variables, X, use_running_average=True)
    np.testing.assert_allclose(ours.apply(variables, X), expected, rtol=1e-5, atol=1e-5)


def test_unbiased_variance_is_that_of_pytorch():
    norm = BatchNorm(unbiased_variance=True)
    _, moved = norm.apply(norm.init(jax.random.key(0), X), X, train=True, mutable=["batch_stats"])
    expected = 0.9 + 0.1 * X.reshape(-1, 32).var(0, ddof=1)
    np.testing.assert_allclose(moved["batch_stats"]["var"], expected, rtol=1e-5)


def test_group_norm_agrees_with_flax():
    ours = GroupNorm(groups=8)
    variables = ours.init(jax.random.key(0), X)
    expected = nn.GroupNorm(num_groups=8, epsilon=1e-5).apply(variables, X)
    np.testing.assert_allclose(ours.apply(variables, X, True), expected, rtol=1e-4, atol=1e-5)


class Widening(nn.Module):
    """What an NVIDIA GPU computes as one product, in bfloat16."""

    apart: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        conv, norm = Conv(128, 1, dtype=jnp.bfloat16, name="conv1"), BatchNorm(dtype=jnp.bfloat16, name="norm1")
        return norm(conv(x), train) if self.apart else ConvNorm(conv, norm)(x, train)


def trained(module, variables):
    return jax.jit(lambda v: module.apply(v, X, train=True, mutable=["batch_stats"]))(variables)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_convolution_with_its_norm_is_the_two_under_their_own_names(enabled):
    one, two = Widening(), Widening(apart=True)
    variables = one.init(jax.random.key(0), X)
    chex.assert_trees_all_equal(variables, two.init(jax.random.key(0), X))
    assert {name: set(part) for name, part in variables["params"].items()} == {
        "conv1": {"kernel"},
        "norm1": {"scale", "bias"},
    }
    with use_custom_kernels(enabled):
        chex.assert_trees_all_close(trained(one, variables), trained(two, variables), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(one.apply(variables, X), two.apply(variables, X))


def test_statistics_can_be_frozen_where_a_convolution_has_its_norm_with_it():
    one = Widening()
    variables = one.init(jax.random.key(0), X)
    with frozen_statistics(lambda path: path == "norm1/scale"):
        y, updated = trained(one, variables)
    chex.assert_trees_all_equal(updated["batch_stats"], variables["batch_stats"])
    np.testing.assert_array_equal(y, jax.jit(one.apply)(variables, X))
    with frozen_statistics(lambda path: False):
        assert np.any(trained(one, variables)[1]["batch_stats"]["norm1"]["mean"])
