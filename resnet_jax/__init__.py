"""Residual networks as pure functions: models, one compiled training step, runs that resume exactly."""

from importlib import metadata
from typing import Any

from resnet_jax.config import Config, InputError
from resnet_jax.inference import make_forward
from resnet_jax.models.fold import fold_batch_norm
from resnet_jax.models.registry import create_model, list_models

__version__ = metadata.version("resnet_jax")
__all__ = [
    "Config",
    "InputError",
    "__version__",
    "create_model",
    "fold_batch_norm",
    "list_models",
    "make_forward",
    "train",
]


def __getattr__(name: str) -> Any:
    """`train` comes with its heavy imports only when it is asked for."""
    if name == "train":
        from resnet_jax.training.loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
