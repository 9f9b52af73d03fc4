"""What the hardware can do: the rate of a large matrix product and the bandwidth of a large copy, measured here."""

import time
from typing import Any

import jax
import jax.numpy as jnp


def measure_limits(dtype: str) -> dict[str, float]:
    """`flops`: of a square matrix product in `dtype`; `bytes`: read and written a second by a scaled copy."""
    gpu = jax.default_backend() != "cpu"
    size, elements = (8192, 2**30) if gpu else (3072, 2**26)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    x = jnp.arange(elements, dtype=jnp.float32)
    product = best_time(jax.jit(lambda a: a @ a), a)
    copy = best_time(jax.jit(lambda x: x * 1.5), x)
    return {"flops": 2 * size**3 / product, "bytes": 2 * x.nbytes / copy}


def best_time(function: Any, *arguments: Any) -> float:
    """Least of ten times, after a warm-up."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return min(times)


def forward_flops(model: Any, size: int) -> float:
    """Floating-point operations of one image through a model, two for a multiply-add, from its unoptimised program."""
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    lowered = jax.jit(lambda v, x: model.apply(v, x)).lower(variables, images)
    return float(lowered.cost_analysis()["flops"])
