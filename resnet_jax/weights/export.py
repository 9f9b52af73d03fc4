"""Weights back out: files that timm and torchvision load strictly."""

import json
import os
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from resnet_jax.config import InputError
from resnet_jax.models.registry import create_model
from resnet_jax.weights.convert import from_torch, to_torch
from resnet_jax.weights.load import model_of
from resnet_jax.weights.sources import Weights, find_weights


def export(source: str, path: Path, form: str, name: str | None = None) -> tuple[str, int]:
    """Writes the weights of a source to a file, under the names that timm and torchvision use.

    Args:
      source: as for `load_pretrained`; of a run the moving average, if it kept one.
      form: `safetensors`, which also carries model, preprocessing and class names in its header, or `pth`.
      name: of the model, where the source does not say.

    Returns:
      The model's name and the number of tensors.

    Raises:
      InputError: the source cannot be read, torch is missing for `pth`, or the file cannot be written.
    """
    weights = find_weights(source)
    name, fields = model_of(weights, source, name)
    model = create_model(name, **fields)
    tensors = to_torch(model, from_torch(model, weights.tensors))
    beside = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(beside, replace(weights, tensors=tensors, name=name, fields=fields), form)
        os.replace(beside, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have kinds of their own
        raise InputError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    return name, len(tensors)


def save_tensors(path: Path, weights: Weights, form: str) -> None:
    """Writes tensors as `safetensors` or `pth`.

    Raises:
      InputError: torch is missing for `pth`.
    """
    if form == "safetensors":
        from safetensors.numpy import save_file

        said = {
            "name": weights.name,
            "fields": weights.fields,
            "preprocessing": asdict(weights.preprocessing) if weights.preprocessing else None,
            "class_names": weights.class_names,
            "several": weights.several,
            "calibration": asdict(weights.calibration),
        }
        save_file(dict(weights.tensors), path, metadata={"format": "pt", "resnet_jax": json.dumps(said)})
        return
    try:
        import torch
    except ImportError as error:
        raise InputError("--format pth needs torch; install it, or take --format safetensors") from error
    torch.save({name: torch.from_numpy(np.array(value)) for name, value in weights.tensors.items()}, path)
