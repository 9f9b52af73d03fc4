"""A 1x1 convolution with batch normalisation as one product, whose statistics come from what goes in.

With x the pixels [pixel, in] and w the kernel of one output, `mean(x w) = mean(x) w` and `var(x w) = w' cov(x) w`.
Where a convolution widens four times, as at the end of a bottleneck, cov(x) is cheap, and the norm becomes part of the
kernel: nothing reads the wide images once more for the statistics or for their gradients, and nothing keeps them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Pair = tuple[Array, Array]

WIDER = 4
"""So many times as many channels come out as go in, and it is faster on a GPU."""


def normalized_product(
    x: Array, kernel: Array, scale: Array, bias: Array, epsilon: float, axis_name: str | None = None
) -> tuple[Array, Array, Array]:
    """`x @ kernel`, normalised over all axes but the last, times scale plus bias; with the mean and biased variance.

    Statistics are computed in float32. The result is computed in x's dtype, to which the kernel is rounded after the
    norm's factors have gone into it; its mean is `bias` all the same.

    Args:
      x: [batch, height, width, in].
      kernel: [in, out] in float32.
      scale, bias: [out] in float32.
      axis_name: statistics are those of all devices of this mapped axis.

    Returns:
      [batch, height, width, out] in x's dtype, mean [out] and variance [out] in float32.
    """
    x_mean, var = _moments(x, kernel, axis_name)
    folded = (kernel * scale * lax.rsqrt(var + epsilon)).astype(x.dtype)
    shift = bias - _exactly(x_mean, folded.astype(jnp.float32))
    y = (x.reshape(-1, x.shape[-1]) @ folded).reshape(*x.shape[:-1], -1)
    return (y.astype(jnp.float32) + shift).astype(x.dtype), _exactly(x_mean, kernel), var


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _moments(x: Array, kernel: Array, axis_name: str | None) -> Pair:
    """The mean of x [in], and the biased variance of `x @ kernel` [out]."""
    x_mean, _, var = _statistics(x, kernel, axis_name)
    return x_mean, var


@_moments.defjvp
def _moments_jvp(axis_name: str | None, primals: Pair, tangents: Pair) -> tuple[Pair, Pair]:
    """Along x the covariance changes by a matrix and its transpose, which weigh the same here: one product for both."""
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    x_mean, spread, var = _statistics(x, kernel, axis_name)
    # In x's dtype, and so is the product that this one transposes to, which leads to the gradient of x.
    x_mean_dot, mixed = _over(axis_name, (_mean(x_dot), _second_moment(x, x_dot, x.dtype)))
    mixed = mixed - jnp.outer(x_mean, x_mean_dot)
    var_dot = 2 * (kernel * _exactly(mixed, kernel) + kernel_dot * spread).sum(0)
    return (x_mean, var), (x_mean_dot, var_dot)


def _statistics(x: Array, kernel: Array, axis_name: str | None) -> tuple[Array, Array, Array]:
    """The mean of x [in], `cov(x) @ kernel` [in, out], and the variance of `x @ kernel` [out]."""
    x_mean, square = _over(axis_name, (_mean(x), _second_moment(x, x, jnp.float32)))
    spread = _exactly(square - jnp.outer(x_mean, x_mean), kernel)
    return x_mean, spread, jnp.maximum((kernel * spread).sum(0), 0.0)


def _over(axis_name: str | None, moments: Pair) -> Pair:
    return moments if axis_name is None else lax.pmean(moments, axis_name)


def _mean(x: Array) -> Array:
    return x.astype(jnp.float32).mean((0, 1, 2))


def _second_moment(x: Array, y: Array, dtype: jnp.dtype) -> Array:
    x, y = (v.reshape(-1, v.shape[-1]) for v in (x, y))
    contracted = (((0,), (0,)), ((), ()))
    return lax.dot_general(x, y, contracted, preferred_element_type=dtype).astype(jnp.float32) / x.shape[0]


_exactly = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
