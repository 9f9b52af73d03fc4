"""Residual networks as pure functions: models, one compiled training step, runs that resume exactly.

A name of the public face is imported when it is first asked for: what needs no JAX starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from resnet_jax.typed import from_extra

if TYPE_CHECKING:
    from resnet_jax import analysis
    from resnet_jax.config import Config, InputError
    from resnet_jax.data.dataset import Dataset
    from resnet_jax.models.registry import create_model, feature_info, list_models, register_model
    from resnet_jax.predict.fold_batch_norm import fold_batch_norm
    from resnet_jax.predict.gradcam import grad_cam
    from resnet_jax.predict.predictor import Predictor, make_forward
    from resnet_jax.runs.wandb_mlflow import MlflowHook, WandbHook
    from resnet_jax.training.build import restore
    from resnet_jax.training.check_module import check
    from resnet_jax.training.loop import train
    from resnet_jax.training.metrics import means
    from resnet_jax.training.sharding import make_mesh, shard_batch
    from resnet_jax.training.state import create_state
    from resnet_jax.training.step import make_eval_step, make_train_step
    from resnet_jax.training.sweep import sweep
    from resnet_jax.training.verify import verify
    from resnet_jax.weights.convert import from_torch, to_torch
    from resnet_jax.weights.load import features, load_pretrained

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Dataset",
    "InputError",
    "MlflowHook",
    "Predictor",
    "WandbHook",
    "__version__",
    "analysis",
    "check",
    "create_model",
    "create_state",
    "feature_info",
    "features",
    "fold_batch_norm",
    "from_torch",
    "grad_cam",
    "list_models",
    "load_pretrained",
    "make_eval_step",
    "make_forward",
    "make_mesh",
    "make_train_step",
    "means",
    "register_model",
    "restore",
    "shard_batch",
    "sweep",
    "to_torch",
    "train",
    "verify",
]

_HOMES = {
    "config": ("Config", "InputError"),
    "models.registry": ("create_model", "feature_info", "list_models", "register_model"),
    "predict.fold_batch_norm": ("fold_batch_norm",),
    "predict.gradcam": ("grad_cam",),
    "predict.predictor": ("Predictor", "make_forward"),
    "data.dataset": ("Dataset",),
    "runs.wandb_mlflow": ("MlflowHook", "WandbHook"),
    "training.loop": ("train",),
    "training.metrics": ("means",),
    "training.sharding": ("make_mesh", "shard_batch"),
    "training.build": ("restore",),
    "training.check_module": ("check",),
    "training.state": ("create_state",),
    "training.step": ("make_eval_step", "make_train_step"),
    "training.sweep": ("sweep",),
    "training.verify": ("verify",),
    "weights.convert": ("from_torch", "to_torch"),
    "weights.load": ("features", "load_pretrained"),
}


def __getattr__(name: str) -> Any:
    """Returns a name of the public face, which is imported when it is first asked for."""
    if name == "analysis":
        return import_module(f"{__name__}.analysis")
    for home, names in _HOMES.items():
        if name in names:
            with from_extra("train", f"{__name__}.{name}"):
                value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns the names of the public face, also those that are not imported yet."""
    return [*globals(), *__all__]
