"""Residual networks as pure functions: models, one compiled training step, runs that resume exactly."""

from importlib import metadata
from typing import Any

from resnet_jax.config import Config, InputError
from resnet_jax.inference import Predictor, make_forward
from resnet_jax.models.fold import fold_batch_norm
from resnet_jax.models.gradcam import grad_cam
from resnet_jax.models.registry import create_model, feature_info, list_models
from resnet_jax.weights.convert import from_torch, to_torch
from resnet_jax.weights.load import load_pretrained

__version__ = metadata.version("resnet_jax")
__all__ = [
    "Config",
    "InputError",
    "Predictor",
    "__version__",
    "create_model",
    "feature_info",
    "fold_batch_norm",
    "from_torch",
    "grad_cam",
    "list_models",
    "load_pretrained",
    "make_forward",
    "to_torch",
    "train",
]


def __getattr__(name: str) -> Any:
    """`train` comes with its heavy imports only when it is asked for."""
    if name == "train":
        from resnet_jax.training.loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
