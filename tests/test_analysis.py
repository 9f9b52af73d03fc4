"""Curvature of a loss, against explicit Hessians of `jax.hessian`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import resnet_jax as rj
from resnet_jax.analysis import (
    hessian_eigenvalues,
    hessian_trace,
    hessian_vector_product,
    lanczos,
    spectral_density,
)

KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def network():
    """Loss and parameters of a residual network with batch norm, and its Hessian, [parameters, parameters]."""
    model = rj.create_model(
        "cifar_resnet8", num_classes=3, widths=(2, 2, 2), stem_width=2, act="silu", zero_init_last=False
    )
    images, labels = jax.random.normal(jax.random.key(0), (12, 4, 4, 3)), jnp.arange(12) % 3
    variables = jax.jit(model.init)(jax.random.key(3), images[:1])

    def loss(params):
        logits, _ = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    flat, unravel = ravel_pytree(variables["params"])
    matrix = jax.jit(jax.hessian(lambda v: loss(unravel(v))))(flat)
    return loss, variables["params"], np.asarray(matrix, np.float64)


def quadratic(matrix):
    """A loss whose Hessian is a matrix, in terms of a vector."""
    return lambda x: 0.5 * x @ jnp.asarray(matrix, x.dtype) @ x


def test_products_are_those_with_the_explicit_hessian(network):
    loss, params, matrix = network
    flat, unravel = ravel_pytree(params)
    vector = jax.random.normal(KEY, flat.shape)
    product = ravel_pytree(jax.jit(partial(hessian_vector_product, loss))(params, unravel(vector)))[0]
    expected = matrix @ np.asarray(vector, np.float64)
    assert np.linalg.norm(product - expected) < 1e-4 * np.linalg.norm(expected)


def test_eigenvalues_of_a_network_are_those_of_the_explicit_hessian(network):
    """Largest, smallest, and the trace as the sum of all, to 1e-4."""
    loss, params, matrix = network
    expected = np.linalg.eigvalsh(matrix)
    assert expected[0] < -1e-2 * expected[-1]  # there is something to find at both ends
    found = jax.jit(lambda p: lanczos(loss, p, KEY, 60))(params)
    np.testing.assert_allclose(found.values[:-4:-1], expected[:-4:-1], rtol=1e-4)
    np.testing.assert_allclose(found.values[:3], expected[:3], rtol=1e-4)
    assert float(found.weights.sum()) == pytest.approx(1.0, abs=1e-5)
    distances = np.abs(np.asarray(found.values)[:, None] - expected).min(1)
    assert np.all(distances <= found.errors + 1e-5 * expected[-1])
    everything = lanczos(quadratic(matrix), jnp.zeros(len(matrix)), KEY, 10_000).values
    np.testing.assert_allclose(everything, expected, atol=1e-5 * expected[-1])
    assert float(everything.sum()) == pytest.approx(np.trace(matrix), rel=1e-4)


def test_the_trace_is_estimated_from_products_with_that_hessian(network):
    """The same vectors with the explicit matrix give the same; the standard error is that of Hutchinson's estimator."""
    loss, params, matrix = network
    mean, error = jax.jit(lambda p: hessian_trace(loss, p, KEY, 8))(params)
    expected = hessian_trace(quadratic(matrix), jnp.zeros(len(matrix)), KEY, 8)
    np.testing.assert_allclose([mean, error], expected, rtol=1e-4)
    many = hessian_trace(quadratic(matrix), jnp.zeros(len(matrix)), KEY, 2000)
    assert abs(float(many.mean) - np.trace(matrix)) < 4 * float(many.standard_error)
    off = np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2)
    assert float(many.standard_error) == pytest.approx(np.sqrt(2 * off / 2000), rel=0.1)


def test_the_trace_of_a_diagonal_hessian_is_exact():
    found = hessian_trace(quadratic(np.diag([3.0, -1.0, 0.5])), jnp.zeros(3), KEY, 2)
    assert float(found.mean) == pytest.approx(2.5, rel=1e-6) and float(found.standard_error) < 1e-6


@pytest.mark.parametrize("values", [[2.0], [0.0] * 3, [5.0] * 3 + [-1.0] * 2 + [0.0], np.geomspace(1e-3, 1e3, 30)])
def test_all_eigenvalues_are_found_also_where_they_are_equal_or_zero(values):
    """With as many iterations as parameters, or more, from a rotated matrix."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(len(values), len(values))))[0]
    matrix = rotation @ np.diag(values) @ rotation.T
    found = lanczos(quadratic(matrix), jnp.ones(len(values)), KEY, 50)
    np.testing.assert_allclose(found.values, np.sort(values), atol=1e-5 * max(1.0, *values))
    assert np.isfinite(found.weights).all() and np.isfinite(found.errors).all()


def test_the_most_extreme_eigenvalues_come_first():
    loss, params = quadratic(np.diag([4.0, -7.0, 1.0, 3.0])), jnp.zeros(4)
    np.testing.assert_allclose(hessian_eigenvalues(loss, params, KEY, 2), [4.0, 3.0], rtol=1e-5)
    np.testing.assert_allclose(hessian_eigenvalues(loss, params, KEY, 2, smallest=True), [-7.0, 1.0], rtol=1e-5)


def test_results_depend_on_the_key_alone_compiled_or_not():
    loss, params = quadratic(np.diag(np.arange(20.0))), jnp.zeros(20)
    first, again = (jax.jit(lambda p: lanczos(loss, p, KEY, 8))(params) for _ in range(2))
    other, plain = lanczos(loss, params, jax.random.key(2), 8), lanczos(loss, params, KEY, 8)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    np.testing.assert_allclose(first.values, plain.values, rtol=1e-5, atol=1e-5)
    assert not np.allclose(first.weights, other.weights, atol=1e-3)
    full = quadratic(np.ones((20, 20)))
    one, same, another = (float(hessian_trace(full, params, jax.random.key(k), 4).mean) for k in (0, 0, 1))
    assert one == same != another


def test_the_density_has_integral_one_and_its_hills_at_the_eigenvalues():
    matrix, grid = np.diag([0.0] * 6 + [10.0] * 2), jnp.linspace(-5.0, 15.0, 2001)
    density = spectral_density(quadratic(matrix), jnp.zeros(8), KEY, grid, width=0.3, samples=200, iterations=8)
    step = float(grid[1] - grid[0])
    assert float(density.sum()) * step == pytest.approx(1.0, abs=1e-3)
    assert float(density[grid > 5.0].sum()) * step == pytest.approx(0.25, abs=0.05)
    assert abs(float(grid[jnp.argmax(density)])) < 0.02
    assert abs(float(grid[1000 + jnp.argmax(density[1000:])]) - 10.0) < 0.02


def test_parameters_of_float32_and_float64_go_together_and_others_are_named():
    with jax.enable_x64(True):
        params = {"a": jnp.asarray([0.1, 0.2], jnp.float64), "b": jnp.asarray([[0.3]], jnp.float32)}

        def loss(tree):
            return jnp.sin(tree["a"][0] * tree["a"][1]) + tree["b"][0, 0] ** 4 * tree["a"][0]

        flat, unravel = ravel_pytree({name: x.astype(jnp.float64) for name, x in params.items()})
        expected = np.linalg.eigvalsh(jax.hessian(lambda v: loss(unravel(v)))(flat))
        np.testing.assert_allclose(lanczos(loss, params, KEY, 3).values, expected, rtol=1e-5, atol=1e-6)
        assert lanczos(loss, params, KEY, 3).values.dtype == jnp.float64
    for leaf in (jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.int32), np.ones(2, np.complex64)):
        for function in (lanczos, hessian_eigenvalues, hessian_trace):
            with pytest.raises(rj.InputError, match=rf"params\['layer'\]\['w'\] is {leaf.dtype}: .* need float32"):
                function(lambda p: p["layer"]["w"].sum(), {"layer": {"w": leaf}}, KEY, 2)


def test_numbers_that_cannot_be_are_named():
    loss, params = quadratic(np.eye(3)), jnp.zeros(3)
    with pytest.raises(rj.InputError, match="count is 4: 50 iterations on 3 parameters give 3 eigenvalues"):
        hessian_eigenvalues(loss, params, KEY, 4)
    with pytest.raises(rj.InputError, match="iterations is 0: at least 1"):
        lanczos(loss, params, KEY, 0)
    with pytest.raises(rj.InputError, match="samples is 1: at least 2"):
        hessian_trace(loss, params, KEY, 1)
    with pytest.raises(rj.InputError, match="params hold no array"):
        lanczos(lambda p: 0.0, {}, KEY, 1)


def test_it_is_there_without_an_import_of_its_own():
    assert rj.analysis.lanczos is lanczos
