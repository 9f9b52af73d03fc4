"""Writes weights: files that timm and torchvision load strictly, and folders that stock Orbax opens."""

import json
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resnet_jax.config import InputError, known
from resnet_jax.files import in_bucket, path_of, write_whole
from resnet_jax.models.registry import create_model
from resnet_jax.typed import from_extra
from resnet_jax.weights.convert import to_torch
from resnet_jax.weights.load import fit_weights, model_of, names_of_outputs, preprocessing_of
from resnet_jax.weights.sources import Weights, find_weights


def export(
    source: str, path: Path, form: str, name: str | None = None, checkpoint: str | None = None, **parts: Any
) -> tuple[str, int]:
    """Writes the weights of a source, under the names of timm and torchvision, or for Orbax under those of the module.

    Args:
      source: as for `load_pretrained`; of a run the moving average is written, if there is one.
      path: of the file; for `orbax` of a new folder.
      form: `safetensors`, which also carries model, preprocessing and class names in its header, `pth`, or `orbax`: the
        tree `{"params", "batch_stats"}`, float32, for `StandardCheckpointer().restore(path)`.
      name: of the model, where the source does not say.
      checkpoint: of a run, as for `find_weights`.
      **parts: `model` and `optimizer` of the user's own, with which a run was trained; such a model takes `orbax`.

    Returns:
      The model's name and the number of tensors.

    Raises:
      InputError: the source cannot be read, torch is missing for `pth`, or the file cannot be written.
    """
    if parts.get("model") is not None:
        return export_own_model(source, path, form, checkpoint, parts)
    weights = find_weights(source, name, checkpoint)
    name, fields = model_of(weights, source)
    model = create_model(name, **fields)
    variables = fit_weights(model, weights.tensors, source)
    if form == "orbax":
        from resnet_jax.training.checkpoints import write_tree

        write_tree(variables, path)
        return name, len(jax.tree.leaves(variables))
    tensors = to_torch(model, variables)
    names = weights.class_names and names_of_outputs(fields["num_classes"], weights.class_names, source)
    look = preprocessing_of(weights, source)
    with written_beside(path) as beside:
        save_tensors(
            beside, replace(weights, tensors=tensors, fields=fields, preprocessing=look, class_names=names), form
        )
    return name, len(tensors)


def export_own_model(
    source: str, path: Path, form: str, checkpoint: str | None, parts: dict[str, Any]
) -> tuple[str, int]:
    """Writes the variables of a run whose model is its user's own; arguments and errors as for `export`."""
    from resnet_jax.training.build import read_run
    from resnet_jax.training.checkpoints import write_tree
    from resnet_jax.training.parts import make_parts

    if form != "orbax":
        raise InputError(f"{path}: PyTorch's names are known for models of ours alone; take --format orbax")
    config, state, _ = read_run(path_of(source, "SOURCE"), checkpoint, make_parts(parts), optimizer=False)
    variables = state.averages or state.variables
    write_tree(variables, path)
    return known(config.model.name, "model.name"), len(jax.tree.leaves(variables))


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Creates a file beside `path` to write into; it replaces `path` when the block ends, and is removed if that fails.

    It has the permissions that the umask gives a new file, whatever the library that writes it sets.

    Raises:
      InputError: `path` is a folder or a device, cannot be written, or the disk is full; what was there stays.
    """

    if in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            beside = Path(folder) / path.name
            yield beside
            try:
                write_whole(path, beside.read_bytes())
            except OSError as error:
                raise InputError(f"{path} cannot be written: {error}") from error
        return
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise InputError(f"{path} is no ordinary file: give the name of a file to write")
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{uuid.uuid4().hex}{target.suffix}")
        beside.open("xb").close()
        mode = beside.stat().st_mode
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error
    try:
        yield beside
        if beside.stat().st_mode != mode:  # safetensors writes a file of its own, for its owner alone
            beside.chmod(stat.S_IMODE(mode))
        beside.replace(target)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def save_tensors(path: Path, weights: Weights, form: str) -> None:
    """Writes tensors as `safetensors` or `pth`.

    Raises:
      InputError: torch is missing for `pth`, safetensors for `safetensors`.
      OSError: the file cannot be written.
    """
    if form == "safetensors":
        with from_extra("hub", "--format safetensors"):
            from safetensors import SafetensorError
            from safetensors.numpy import save_file

        metadata = {
            "name": weights.name,
            "fields": weights.fields,
            "preprocessing": asdict(weights.preprocessing) if weights.preprocessing else None,
            "class_names": weights.class_names,
            "multilabel": weights.multilabel,
            "calibration": asdict(weights.calibration),
        }
        try:
            save_file(dict(weights.tensors), path, metadata={"format": "pt", "resnet_jax": json.dumps(metadata)})
        except SafetensorError as error:  # such as a full disk
            raise OSError(str(error)) from error
        return
    try:
        import torch
    except ImportError as error:
        raise InputError("--format pth needs torch; install it, or take --format safetensors") from error
    try:
        torch.save({name: torch.from_numpy(np.array(value)) for name, value in weights.tensors.items()}, path)
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0]) from error
