"""What the hardware can do: the rate of a large matrix product and the bandwidth of a large copy, measured here."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.ops import use_custom_kernels


def measure_limits(dtype: str) -> dict[str, float]:
    """Returns operations a second of a square matrix product in `dtype` (`flops`), and bytes read and written a second
    by a scaled copy (`bytes`).
    """
    gpu = jax.default_backend() != "cpu"
    size, elements = (8192, 2**30) if gpu else (3072, 2**26)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    x = jnp.arange(elements, dtype=jnp.float32)
    product = best_time(jax.jit(lambda a: a @ a), a)
    copy = best_time(jax.jit(lambda x: x * 1.5), x)
    return {"flops": 2 * size**3 / product, "bytes": 2 * x.nbytes / copy}


def best_time(function: Any, *arguments: Any) -> float:
    """Returns the least of ten times, after a warm-up."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return min(times)


def forward_flops(model: Any, size: int) -> float:
    """Counts floating-point operations of one image through a model, two for a multiply-add: convolutions and matrix
    products.

    They are counted in the traced program, since not every platform's XLA counts them.
    """
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    with use_custom_kernels(False):
        return float(operations(jax.make_jaxpr(lambda v, x: model.apply(v, x))(variables, images)))


def operations(program: Any) -> int:
    """Counts the operations of a jaxpr's convolutions and matrix products, also in the functions that it calls."""
    total = 0
    for equation in getattr(program, "jaxpr", program).eqns:
        shape = equation.outvars[0].aval.size
        if equation.primitive.name == "conv_general_dilated":
            kernel, outputs = equation.invars[1].aval, equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * shape * kernel.size // kernel.shape[outputs]
        elif equation.primitive.name == "dot_general":
            summed = equation.params["dimension_numbers"][0][0]
            total += 2 * shape * math.prod(equation.invars[0].aval.shape[axis] for axis in summed)
        total += sum(operations(value) for value in equation.params.values() if hasattr(value, "eqns"))
    return total
