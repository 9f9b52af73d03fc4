"""Curvature of a loss: products with its Hessian, extreme eigenvalues, trace and spectral density, without the matrix.

Every function takes `loss(params) -> scalar`, any function of a tree of float32 or float64 arrays that JAX can
differentiate twice, and is pure: a function of its arguments and the key. Inside `jax.jit` it is one program, compiled
once for all calls; outside, each product with the Hessian is a call, which on a CPU is far faster for a network with
XLA's convolutions, such as `nn.Conv`, that are slow in a compiled loop. GPUs and TPUs round the factors of float32
products: `jax.default_matmul_precision("highest")` around the call keeps them.

Example:
  def loss(params):  # of a network whose norms take the statistics of the batch, as in training
      variables = {"params": params, "batch_stats": state.batch_stats}
      logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  sharpness = jax.jit(lambda params: rj.analysis.hessian_eigenvalues(loss, params, jax.random.key(0))[0])(state.params)

Sources: Pearlmutter 1994 (products), Hutchinson 1990 (trace), Ghorbani, Krishnan and Xiao 2019 (arXiv:1901.10159,
Lanczos with full reorthogonalisation and stochastic Lanczos quadrature for networks).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from resnet_jax.typed import InputError

Array = jax.Array
PyTree = Any
Loss = Callable[[PyTree], Array]

_dot = partial(jnp.dot, precision=lax.Precision.HIGHEST)


class RitzValues(NamedTuple):
    """What `lanczos` finds, each [iterations].

    Attributes:
      values: estimates of eigenvalues, ascending; those at both ends converge first, from inside.
      weights: the share of each in the start vector, squared; they sum to 1.
      errors: an eigenvalue lies within this distance of the value, up to rounding.
    """

    values: Array
    weights: Array
    errors: Array


class TraceEstimate(NamedTuple):
    """A mean over random vectors, and its standard error, both scalars."""

    mean: Array
    standard_error: Array


def hessian_vector_product(loss: Loss, params: PyTree, vector: PyTree) -> PyTree:
    """Computes the Hessian of a loss times a vector, at the cost of about two gradients.

    Args:
      loss: `loss(params) -> scalar`.
      params: where; a tree of float arrays.
      vector: a tree as `params`, of the same shapes and dtypes.

    Returns:
      A tree as `params`.

    Example:
      >>> rj.analysis.hessian_vector_product(lambda x: (x**3).sum(), jnp.ones(2), jnp.array([1.0, 2.0])).tolist()
      [6.0, 12.0]
    """
    return jax.jvp(jax.grad(loss), (params,), (vector,))[1]


def lanczos(loss: Loss, params: PyTree, key: Array, iterations: int) -> RitzValues:
    """Approximates the spectrum of the Hessian of a loss by Lanczos' method from a random vector.

    All basis vectors are orthogonalised against all others, twice, so that no eigenvalue comes up again by rounding.
    They take `iterations` times the memory of the parameters. Where the vectors span all that the start vector
    reaches, a new random one goes on. With as many iterations as parameters the values are all eigenvalues.

    Args:
      loss: `loss(params) -> scalar`.
      params: where; a tree of float32 or float64 arrays.
      key: of which the start vector is drawn.
      iterations: products with the Hessian; at most as many as there are parameters are computed.

    Raises:
      InputError: a leaf is neither float32 nor float64, or there is no iteration.

    Example:
      >>> loss = lambda x: (jnp.array([3.0, 1.0]) * x**2).sum() / 2
      >>> np.asarray(rj.analysis.lanczos(loss, jnp.zeros(2), jax.random.key(0), 2).values).round(3)
      array([1., 3.], dtype=float32)
    """
    return _lanczos(*_raveled(loss, params), key, iterations)


def _lanczos(flat: Array, product: Callable[[Array], Array], key: Array, iterations: int) -> RitzValues:
    steps = min(_at_least(1, iterations, "iterations"), flat.size)
    tolerance = 100 * jnp.finfo(flat.dtype).eps

    def orthogonalised(vector: Array, basis: Array) -> Array:
        for _ in range(2):
            vector = vector - _dot(_dot(basis, vector), basis)
        return vector

    def drawn(basis: Array, i: Array | int) -> Array:
        vector = orthogonalised(jax.random.normal(jax.random.fold_in(key, i), flat.shape, flat.dtype), basis)
        return vector / jnp.linalg.norm(vector)

    def step(carry: tuple[Array, Array, Array], i: Array) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
        basis, vector, largest = carry
        basis = basis.at[i].set(vector)
        image = product(vector)
        rest = orthogonalised(image, basis)
        size, largest = jnp.linalg.norm(rest), jnp.maximum(largest, jnp.linalg.norm(image))
        exhausted = size <= tolerance * largest
        following = jnp.where(exhausted, drawn(basis, i + 1), rest / size)
        return (basis, following, largest), (_dot(vector, image), jnp.where(exhausted, 0.0, size))

    basis = jnp.zeros((steps, flat.size), flat.dtype)
    start = (basis, drawn(basis, 0), jnp.zeros((), flat.dtype))
    _, (diagonal, beside) = _scan(step, start, jnp.arange(steps))
    matrix = jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1)
    values, vectors = jnp.linalg.eigh(matrix)
    return RitzValues(values, vectors[0] ** 2, beside[-1] * jnp.abs(vectors[-1]))


def hessian_eigenvalues(
    loss: Loss, params: PyTree, key: Array, count: int = 1, iterations: int = 50, smallest: bool = False
) -> Array:
    """Computes the largest eigenvalues of the Hessian of a loss, or the smallest, by `lanczos`.

    The first converges to four digits within some 20 to 50 iterations in most networks, later ones take more;
    `lanczos` returns bounds of the errors. An eigenvalue that occurs several times may be found once only.

    Args:
      loss: `loss(params) -> scalar`.
      params: where; a tree of float32 or float64 arrays.
      key: of which the start vector is drawn.
      count: how many.
      iterations: products with the Hessian.
      smallest: whether to return the smallest (most negative) ones instead.

    Returns:
      [count], the most extreme first. Largest means largest with its sign: the first is the sharpness.

    Raises:
      InputError: a leaf is neither float32 nor float64, or `count` exceeds the iterations or the parameters.

    Example:
      >>> loss = lambda x: (jnp.array([3.0, 1.0, -1.0]) * x**2).sum() / 2
      >>> np.asarray(rj.analysis.hessian_eigenvalues(loss, jnp.zeros(3), jax.random.key(0), count=2)).round(3)
      array([3., 1.], dtype=float32)
    """
    values = lanczos(loss, params, key, iterations).values
    if not 1 <= count <= len(values):
        raise InputError(
            f"count is {count}: {iterations} iterations on {_size(params)} parameters give {len(values)} eigenvalues; "
            "take more iterations, or a count between 1 and that"
        )
    return values[:count] if smallest else values[::-1][:count]


def hessian_trace(loss: Loss, params: PyTree, key: Array, samples: int = 32) -> TraceEstimate:
    """Estimates the trace of the Hessian of a loss by Hutchinson's method, with vectors of random signs.

    Args:
      loss: `loss(params) -> scalar`.
      params: where; a tree of float32 or float64 arrays.
      key: of which the vectors are drawn.
      samples: how many vectors, one product with the Hessian each; at least 2.

    Returns:
      Mean and standard error. Of a diagonal Hessian a single vector gives the trace exactly.

    Raises:
      InputError: a leaf is neither float32 nor float64, or there are fewer than two samples.

    Example:
      >>> loss = lambda x: (jnp.array([3.0, 1.0, -1.0]) * x**2).sum() / 2
      >>> round(float(rj.analysis.hessian_trace(loss, jnp.zeros(3), jax.random.key(0)).mean), 3)
      3.0
    """
    flat, product = _raveled(loss, params)
    _at_least(2, samples, "samples")

    def one(key: Array) -> Array:
        signs = jax.random.rademacher(key, flat.shape, flat.dtype)
        return _dot(signs, product(signs))

    found = _map(one, jax.random.split(key, samples))
    return TraceEstimate(found.mean(), found.std(ddof=1) / samples**0.5)


def spectral_density(
    loss: Loss, params: PyTree, key: Array, grid: Array, width: float, samples: int = 4, iterations: int = 50
) -> Array:
    """Estimates the density of the eigenvalues of the Hessian of a loss, by stochastic Lanczos quadrature.

    Args:
      loss: `loss(params) -> scalar`.
      params: where; a tree of float32 or float64 arrays.
      key: of which the start vectors are drawn.
      grid: at which eigenvalues, [points].
      width: standard deviation of the normal density that stands for each eigenvalue.
      samples: start vectors.
      iterations: products with the Hessian for each.

    Returns:
      [points], with integral 1.

    Raises:
      InputError: a leaf is neither float32 nor float64, or there is no sample or no iteration.

    Example:
      >>> loss = lambda x: (jnp.array([3.0, 1.0]) * x**2).sum() / 2
      >>> grid = jnp.linspace(-2, 6, 401)
      >>> density = rj.analysis.spectral_density(loss, jnp.zeros(2), jax.random.key(0), grid, width=0.3)
      >>> round(float(density.sum() * 0.02), 3)
      1.0
    """
    _at_least(1, samples, "samples")
    flat, product = _raveled(loss, params)

    def one(key: Array) -> Array:
        found = _lanczos(flat, product, key, iterations)
        return jax.scipy.stats.norm.pdf(jnp.asarray(grid)[:, None], found.values, width) @ found.weights

    return _map(one, jax.random.split(key, samples)).mean(0)


def _scan(step: Callable[[Any, Array], tuple[Any, Any]], carry: Any, xs: Array) -> tuple[Any, Any]:
    """Returns what `lax.scan` does; outside of a compiled function by a loop of Python's."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((carry, xs))):
        return lax.scan(step, carry, xs)
    found = []
    for x in xs:
        carry, of_step = step(carry, x)
        found.append(of_step)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *found)


def _map(function: Callable[[Array], Array], xs: Array) -> Array:
    """Returns the results of a function for each of xs, one after another."""
    return _scan(lambda carry, x: (carry, function(x)), None, xs)[1]


def _raveled(loss: Loss, params: PyTree) -> tuple[Array, Callable[[Array], Array]]:
    """Returns parameters as a vector, and a function that multiplies a vector with the Hessian there."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if (dtype := jnp.result_type(leaf)) not in (jnp.float32, jnp.float64):
            raise InputError(
                f"params{jax.tree_util.keystr(path)} is {dtype}: second derivatives need float32 or float64; convert "
                "it, and leave what is no parameter to the loss function"
            )
    flat, unravel = ravel_pytree(params)
    if not flat.size:
        raise InputError("params hold no array: give a tree with at least one parameter")
    return flat, jax.jit(lambda v: ravel_pytree(hessian_vector_product(loss, params, unravel(v)))[0])


def _size(params: PyTree) -> int:
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))


def _at_least(least: int, value: int, name: str) -> int:
    if value < least:
        raise InputError(f"{name} is {value}: at least {least} are needed")
    return value
