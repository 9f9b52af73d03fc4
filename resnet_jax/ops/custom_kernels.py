"""The switch of the custom kernels, and the setting for batches that are split over devices.

Both are read while JAX traces a function: what is compiled already keeps the algorithms it was traced with.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from jax import lax

_enabled = ContextVar("custom_kernels", default=os.environ.get("RESNET_JAX_CUSTOM_KERNELS", "1") != "0")
_sharded: ContextVar[str] = ContextVar("sharded_batch", default="")  # the platform, or "" for one device


@contextmanager
def use_custom_kernels(enabled: bool) -> Iterator[None]:
    """Turns this package's own algorithms for CPUs and NVIDIA GPUs on or off; a context manager and a decorator.

    They give what XLA's own operations give, up to rounding, in less time (`ops/cpu.py`, `ops/gpu.py`), and are on by
    default. Off, every operation is its plain reference: for a translator that does not know them (ONNX), to compare,
    or to find out whether one of them is at fault. The environment variable RESNET_JAX_CUSTOM_KERNELS=0, read when the
    package is imported, turns them off for a whole process.

    Example:
      >>> with use_custom_kernels(False):
      ...     y = jax.jit(jnp.sin)(0.0)
    """
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


def custom_kernels_enabled() -> bool:
    """Returns whether functions that are traced now take the custom kernels."""
    return _enabled.get()


@contextmanager
def sharded_batch(sharded: bool = True, platform: str | None = None) -> Iterator[None]:
    """Says that batches are split over several devices in what is traced inside; a context manager and a decorator.

    On CPUs some custom kernels cut a batch into parts or join it with another dimension. Of a batch that `jax.jit`
    splits over a mesh, images would then travel between devices; inside, those kernels are left out. And kernels are
    chosen for one platform when a function is traced: a choice that is left to the lowering stays in the program as a
    conditional where it holds a sum over devices, which nothing then orders among the other sums. Results are the same
    up to rounding.

    Args:
      sharded: whether they are.
      platform: of the devices, `cpu`, `gpu` or `tpu`; None takes JAX's default.

    Example::

      train_step = jax.jit(sharded_batch(mesh.size > 1)(train_step))
    """
    token = _sharded.set((platform or jax.default_backend()) if sharded else "")
    try:
        yield
    finally:
        _sharded.reset(token)


def sharded_platform() -> str:
    """Returns the platform of the devices that batches are said to be split over; "" where they are not."""
    return _sharded.get()


def by_platform(platform: str, *args: Any, default: Callable[..., Any], **choices: Callable[..., Any]) -> Any:
    """Calls the function of a platform.

    Args:
      platform: of `sharded_platform`; "" leaves the choice to the lowering of the program.
      args: of the function.
      default: where no choice is of the platform.
      choices: by `cpu`, `cuda` and `tpu`.
    """
    if not platform:
        return lax.platform_dependent(*args, default=default, **choices)
    return choices.get("cuda" if platform == "gpu" else platform, default)(*args)
