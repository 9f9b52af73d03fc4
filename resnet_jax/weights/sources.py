"""Finds weights: a published tag, the Hugging Face hub, a file, a folder, a run of ours."""

import argparse
import atexit
import contextlib
import json
import logging
import math
import pickle
import re
import shutil
import tempfile
import typing
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import jax
import numpy as np

from resnet_jax.config import Config, InputError, ModelConfig, from_dict, known, known_size, sides
from resnet_jax.files import in_bucket, path_of, read_file, read_json
from resnet_jax.models.registry import MODELS, create_model, model_fields, nearest, variable_shapes
from resnet_jax.output import first_line, say
from resnet_jax.recipe_files import recorded_parts
from resnet_jax.typed import from_extra, shown, shown_name, typed
from resnet_jax.weights.convert import as_array, to_torch
from resnet_jax.weights.tags import UNCALIBRATED, Calibration, Preprocessing, find_tag, tags_of

logger = logging.getLogger("resnet_jax")

FILES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
TYPES = ("F64", "F32", "F16", "BF16", "C64", "BOOL", *(f"{kind}{bits}" for kind in "IU" for bits in (8, 16, 32, 64)))
"""Types of safetensors that are read; of these the floating-point ones can be weights."""

WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights"),
)
"""Keys under which training scripts save a state dict; the first one that is there is taken: moving averages first."""

DEPTH = 4
"""State dicts lie no deeper than this."""

LARGEST = 2**14
"""Pixels of a side beyond which a `config.json` cannot be right."""


@dataclass(frozen=True)
class Weights:
    """Tensors under PyTorch's names, and what is known of the model they belong to.

    Attributes:
      tensors: name -> array.
      name: of the model; None where the source does not say.
      fields: of its module, that differ from the named model's.
      preprocessing: how images are prepared; None where the source does not say.
      class_names: None where the source does not say.
      multilabel: an image may have several of these classes.
      calibration: of the probabilities.
    """

    tensors: Mapping[str, Any]
    name: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    multilabel: bool = False
    calibration: Calibration = UNCALIBRATED


def find_weights(source: str, name: str | None = None, checkpoint: str | None = None) -> Weights:
    """Reads the weights of a source.

    Args:
      source: a tag or model (`resnet50.tv2_in1k`, `resnet50`), `hf-hub:OWNER/NAME`, a `.safetensors`, `.pth`, `.pt`,
        `.ckpt` or `.bin` file, a folder with weights and `config.json`, or the folder of a run.
      name: of the model; None takes the one that the source names.
      checkpoint: of a run: `best`, `latest` or a step; None takes the best one where the run selected one.

    Raises:
      InputError: there is no such source, or it cannot be read; the message says what would help.
    """
    weights = _found(source, checkpoint)
    return replace(weights, name=name) if name else weights


def known_of_weights(source: str) -> Weights:
    """Returns what `find_weights` does, but for the tensors of a tag or of the hub, which are not fetched."""
    return _found(source, None, fetch=False)


def _found(source: str, checkpoint: str | None, fetch: bool = True) -> Weights:
    if source.startswith("hf-hub:") and checkpoint is None:
        return _from_hub(source.removeprefix("hf-hub:"), fetch)
    path = path_of(source, "the source of weights")
    if (path / "checkpoints").is_dir():
        return _from_run(path, checkpoint)
    if checkpoint is not None:
        raise InputError(f"--checkpoint {checkpoint}: {source} is no folder of a run, and nothing else has checkpoints")
    if in_bucket(path) and path.is_file():
        path = fetched(path)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_file(path)
    if path.exists():
        raise InputError(f"{source} is neither a file nor a folder")
    if path.suffix in FILES:
        raise InputError(f"{source}: there is no such file")
    tag = find_tag(source)
    tensors = read_tensors(_download(tag.repository, "model.safetensors")) if fetch else {}
    return Weights(tensors, tag.name, {"num_classes": tag.num_classes}, tag.preprocessing)


def fetched(path: Path) -> Path:
    """Copies a file in a bucket to this machine, under its name, until the process ends.

    Raises:
      InputError: it cannot be read.
    """
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        (folder / path.name).write_bytes(read_file(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return folder / path.name


def _download(repository: str, name: str) -> Path:
    """Returns a file of the hub in its cache; what has to be fetched is said first. A hub that cannot be reached is not
    waited for.
    """
    with from_extra("hub", f"fetching {name} of {repository}"):
        import huggingface_hub.utils.logging
        from huggingface_hub.constants import ENDPOINT
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    huggingface_hub.utils.logging.set_verbosity_error()  # of its logger, which has its own level once it is imported
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or ".." in repository:
        raise InputError(f"{repository!r} is no name of a repository; it looks like OWNER/NAME")
    try:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name, local_files_only=True))
        except LocalEntryNotFoundError:
            size = None
        with contextlib.suppress(HfHubHTTPError):  # the download says it, some after a few tries
            size = huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, name)).size
        large = "" if size is None else f" ({size / 1e6:,.1f} MB)"
        say(f"fetching {name} of {repository}{large} from {ENDPOINT}", error=True)
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except HFValidationError as error:
        raise InputError(f"{repository!r} is no name of a repository: {error}") from error
    except Exception as error:  # of the hub's package, or of the one by which it speaks HTTP
        raise InputError(
            f"{name} of {repository} is neither in the cache of the Hugging Face hub nor can it be fetched from "
            f"{ENDPOINT} ({type(error).__name__}). Without a network, fetch the file elsewhere and give its path, "
            "or copy the cache (HF_HOME) of a machine that has it"
        ) from error


def _from_hub(repository: str, fetch: bool) -> Weights:
    file = _download(repository, "config.json")
    tensors = read_tensors(_download(repository, "model.safetensors")) if fetch else {}
    return _described(file, tensors, repository)


def _from_folder(folder: Path) -> Weights:
    try:
        files = [path for path in sorted(folder.iterdir()) if path.suffix in FILES and path.is_file()]
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error}") from error
    if not files or not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds neither a run nor a file of weights beside a config.json")
    chosen = min(files, key=lambda path: (FILES.index(path.suffix), path.name))
    return _described(folder / "config.json", read_tensors(chosen), str(folder))


def _described(file: Path, tensors: Mapping[str, Any], where: str) -> Weights:
    """Returns weights with a `config.json` as timm writes it."""
    where = f"{where}: config.json"
    try:
        config = _parsed(read_file(file), dict[str, Any], where)
    except OSError as error:
        raise InputError(f"{where} cannot be read ({error}); fetch it again") from error
    name = config.get("architecture")
    if not isinstance(name, str) or name not in MODELS:
        hint = f"; {nearest(name, MODELS)}" if isinstance(name, str) else ""
        raise InputError(f"{where} names the architecture {name!r}, which is not among our models{hint}")
    inner, made_with = (
        typed(config.get(key), dict[str, Any] | None, f"{where}: {key}") or {}
        for key in ("pretrained_cfg", "model_args")
    )
    if others := set(made_with) - HARMLESS:
        raise InputError(f"{where}: model_args has {', '.join(sorted(others))}, which we do not read")
    known = {key: value for part in (config, inner) for key, value in part.items() if value is not None}
    pool = made_with.get("global_pool") or config.get("global_pool")
    fields = {"global_pool": pool} if pool in ("max", "avgmax", "catavgmax") else {}
    labels = next((known[key] for key in ("label_names", "labels", "id2label") if key in known), None)
    if labels is None and "label_descriptions" in known:
        logger.warning("%s: label_descriptions without label_names do not say which class is which: left out", where)
    return Weights(tensors, name, fields, _preprocessing(known, name, where), _names(labels, where))


HARMLESS = frozenset({"num_classes", "in_chans", "img_size", "global_pool", "drop_rate", "drop_path_rate"})
"""Arguments of timm's models that need no care: the tensors show them, they are read, or only training needs them."""


def _parsed(data: bytes, kind: Any, where: str) -> Any:
    """Returns JSON as a type, as `typed` gives it; nan is not taken for null, but refused where a number is needed."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no JSON ({error}); fetch or export it again") from error
    return typed(found, kind, where)


def _preprocessing(known: dict[str, Any], name: str, where: str) -> Preprocessing | None:
    """Returns what a configuration of timm says, else what the model's default tag has; None where it says nothing."""
    size = known.get("input_size")
    given = {
        "mean": known.get("mean"),
        "std": known.get("std"),
        "image_size": _side(size, where),
        "eval_image_size": _side(known.get("test_input_size", size), where),
        "eval_crop": known.get("test_crop_pct", known.get("crop_pct")),
        "interpolation": known.get("interpolation"),
    }
    if known.get("crop_mode", "center") != "center":
        raise InputError(f"{where}: crop_mode is {shown(known['crop_mode'])}, and we have 'center' alone")
    given = {key: value for key, value in given.items() if value is not None}
    tags = tags_of(name)
    default = asdict(tags[0].preprocessing) if tags else {"eval_crop": 0.875, "interpolation": "bilinear"}
    if not given:
        return None
    found: Preprocessing = typed(default | given, Preprocessing, f"{where}: preprocessing")
    check_preprocessing(found, where)
    return found


def _side(size: Any, where: str) -> Any:
    """Converts timm's [channels, height, width] to a `Size`."""
    if size is None:
        return None
    _, height, width = typed(size, tuple[int, int, int], f"{where}: input_size")
    return height if height == width else (height, width)


def check_preprocessing(found: Preprocessing, where: str) -> None:
    """Raises InputError where a field out of a file is impossible; the message begins with `where`."""
    numbers = {
        "std": (found.std, "above 0", lambda x: 0 < x < math.inf),
        "image_size": (sides(found.image_size), f"from 1 to {LARGEST} pixels", lambda x: 0 < x <= LARGEST),
        "eval_image_size": (sides(found.eval_image_size), f"from 1 to {LARGEST} pixels", lambda x: 0 < x <= LARGEST),
        "eval_crop": ((found.eval_crop,), "above 0 and at most 1", lambda x: 0 < x <= 1),
    }
    for key, (given, rule, right) in numbers.items():
        if not all(map(right, given)):
            raise InputError(f"{where}: preprocessing.{key} is {given}; it must be {rule}")
    if not found.mean or not found.std:
        raise InputError(f"{where}: preprocessing.mean and std must have a number for each channel")
    if found.interpolation not in ("bilinear", "bicubic"):
        raise InputError(
            f"{where}: preprocessing.interpolation is {shown(found.interpolation)}; it must be bilinear or bicubic"
        )


def _names(labels: Any, where: str) -> tuple[str, ...] | None:
    """Reads the names of the outputs from a list, or from an object of number -> name, whose gaps are filled."""
    if labels is None or labels == [] or labels == {}:
        return None
    if isinstance(labels, dict) and all(re.fullmatch(r"\d{1,6}", key) for key in labels):
        numbered = {int(key): name for key, name in labels.items()}
        labels = [numbered.get(i, f"class {i}") for i in range(max(numbered) + 1)]
    if not isinstance(labels, list) or not all(isinstance(name, str | int) for name in labels):
        raise InputError(
            f"{where}: the names of the classes are {shown(labels)}; they must be a list of words, or an object of "
            "number: word"
        )
    return tuple(map(str, labels))


def _from_file(path: Path) -> Weights:
    if path.suffix != ".safetensors":
        return Weights(read_tensors(path))
    tensors, header = read_safetensors(path)
    if "resnet_jax" not in header:
        return Weights(tensors)
    where = f"{path}: resnet_jax in the header"
    metadata: Header = _parsed(header["resnet_jax"].encode(), Header, where)
    name, fields = metadata["name"], _tuples(metadata["fields"])
    preprocessing, calibration = metadata["preprocessing"], metadata["calibration"]
    if preprocessing is not None:
        check_preprocessing(preprocessing, where)
    if calibration.temperature <= 0:
        raise InputError(f"{where}: calibration.temperature is {calibration.temperature}; it must be above 0")
    if name is not None:
        check_fields(name, fields, where)
    return Weights(
        tensors, name, fields, preprocessing, metadata["class_names"] or None, metadata["multilabel"], calibration
    )


class Header(TypedDict):
    """What `save_tensors` writes into the header of a safetensors file, as `resnet_jax`."""

    name: str | None
    fields: dict[str, Any]
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...] | None
    multilabel: bool
    calibration: Calibration


def check_fields(name: str, fields: dict[str, Any], where: str) -> None:
    """Raises InputError where a model cannot have these fields, or there is no such model."""
    hints = typing.get_type_hints(ModelConfig)
    for key in hints.keys() & fields.keys():
        typed(fields[key], hints[key], f"{where}: fields.{key}")
    jax.devices()  # raises where there is none, which is no fault of the fields
    try:
        variable_shapes(create_model(name, **fields))
    except Exception as error:  # whatever flax and JAX raise where a field is not of its type or range
        raise InputError(f"{where}: {shown_name(name)} cannot have these fields: {first_line(error, 200)}") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _from_run(folder: Path, checkpoint: str | None) -> Weights:
    """Reads the moving average of a run's checkpoint, or its parameters where there is no average."""
    from resnet_jax.training.checkpoints import read_variables

    if own := recorded_parts(folder).get("model"):
        raise InputError(
            f"the run in {folder} has parts of its user's own: model ({own['name']}), so it is no source of weights "
            "for a named model. A command that opens the run takes the recipe file that defines it with --config FILE; "
            f"in Python resnet_jax.restore({str(folder)!r}, model=...)[0].variables has the weights"
        )
    step, record, variables = read_variables(folder, checkpoint)
    config = from_dict(record["recipe"])
    head = variables["params"].get("head", {}).get("bias")
    fields: dict[str, Any] = {"num_classes": len(record["class_names"]) if head is None else head.shape[0]}
    fields |= model_fields(replace(config.model, scan=False))
    fields |= {} if config.data.channels == 3 else {"in_channels": config.data.channels}
    name = known(config.model.name, "model.name")
    model: Any = create_model(name, **fields)
    if hasattr(model, "image_size"):
        fields["image_size"] = min(sides(config.data.image_size))
        model = model.clone(image_size=fields["image_size"])
    tensors = to_torch(model, variables)
    preprocessing = preprocessing_in(config)
    names = tuple(record["class_names"])
    calibration = read_calibration(folder, step, fields["num_classes"])
    return Weights(tensors, name, fields, preprocessing, names, record["multilabel"], calibration)


def preprocessing_in(config: Config) -> Preprocessing:
    """Returns how images are prepared by the evaluation of a recipe."""
    data, augment = config.data, config.augment
    size = known_size(data.image_size)
    return Preprocessing(
        known(data.mean, "data.mean"),
        known(data.std, "data.std"),
        size,
        data.eval_image_size or size,
        known(augment.eval_crop, "augment.eval_crop"),
        known(augment.interpolation, "augment.interpolation"),
        augment.eval_flip,
    )


class CalibrationFile(TypedDict):
    """What `calibration.json` holds."""

    step: int
    temperature: float
    thresholds: tuple[float, ...] | None


def read_calibration(folder: Path, step: int, classes: int) -> Calibration:
    """Reads the calibration that the report of a run fitted for a step, from `calibration.json`.

    Where there is none, or the file is damaged, which standard error says, the result is `UNCALIBRATED`.
    """
    file = folder / "calibration.json"
    try:
        found: CalibrationFile = read_json(file, CalibrationFile)
        if found["step"] != step:
            return UNCALIBRATED
        if found["temperature"] <= 0 or len(found["thresholds"] or (0,) * classes) != classes:
            raise InputError(f"{file} is damaged: temperature must be above 0, and thresholds be null or {classes}")
        return Calibration(found["temperature"], found["thresholds"])
    except FileNotFoundError:
        return UNCALIBRATED
    except InputError as error:
        say(f"WARNING: {error}; it is not used. Make it anew with: resnet-jax report {folder}", error=True)
        return UNCALIBRATED


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors of a safetensors file by name, as they are stored, and the metadata of its header.

    Raises:
      InputError: the file is damaged, empty or something else, or a tensor has none of the types in `TYPES`.
    """
    with from_extra("hub", f"reading {path}"):
        from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        # NumPy has no bfloat16 of its own: such tensors come as arrays of JAX
        with safe_open(path, "numpy") as file, safe_open(path, "flax") as as_jax:
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 (this is no dict)
                dtype = file.get_slice(name).get_dtype()
                if dtype not in TYPES:
                    raise InputError(f"{path}: the tensor {name} is {dtype}: save it as F32, F16 or BF16")
                tensors[name] = np.asarray((as_jax if dtype == "BF16" else file).get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
    if not any(tensor.size for tensor in tensors.values()):
        raise InputError(f"{path} holds no tensors")
    return tensors, metadata


def read_tensors(path: Path) -> Mapping[str, Any]:
    """Reads the tensors of a file by name. PyTorch's own files are read with torch, and only if they hold data alone.

    Of a training checkpoint the first state dict that `WRAPPERS` names is taken, so moving averages first.

    Raises:
      InputError: torch is missing, the file is damaged, holds code or no state dict, or a tensor cannot be an array.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path} is a file of PyTorch: install torch to read it, or turn it into safetensors where torch is"
        ) from error
    try:
        with path.open("rb") as file:
            mapped = file.read(2) == b"PK"  # zip archives can be mapped; files of before 2020 are none
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about kinds of tensors, which `as_array` looks at
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever torch raises where a file is foreign or damaged
        reason = str(error)
        if isinstance(error, pickle.UnpicklingError) and "Unsupported operand" not in reason:
            kind = re.search(r"GLOBAL ([\w.]+)", reason)
            raise InputError(
                f"{path} holds more than tensors{f' ({kind[1]})' if kind else ''} and was refused, since such a file "
                "can run code; save its state_dict() alone"
            ) from error
        if "TorchScript" in reason:
            raise InputError(f"{path} is a program of TorchScript: save the state_dict() of the network") from error
        raise InputError(
            f"{path} cannot be read: it is damaged, or no file that torch.save wrote ({type(error).__name__}); "
            "fetch it again"
        ) from error
    place = str(path)
    for _ in range(DEPTH):
        inner = [key for key in WRAPPERS if isinstance(loaded, dict) and isinstance(loaded.get(key), dict)]
        if inner:
            if len(inner) > 1:
                logger.warning("%s: %s is taken, not %s", place, inner[0], ", ".join(inner[1:]))
            loaded, place = loaded[inner[0]], f"{place}[{inner[0]!r}]"
    if not isinstance(loaded, dict):
        raise InputError(f"{place} is of type {type(loaded).__name__}, and no state dict: expected names with tensors")
    others = [
        f"{shown(key)} ({type(value).__name__})"
        for key, value in loaded.items()
        if not isinstance(key, str) or not isinstance(value, torch.Tensor)
    ]
    if others or not loaded:
        listed = ", ".join(others[:20]) or "nothing"
        raise InputError(
            f"{place} is no state dict: expected names with tensors, and there is {listed}. Save the state_dict() of "
            f"the network, alone or as one of {', '.join(WRAPPERS)}"
        )
    return {name: as_array(f"{name} in {place}", tensor) for name, tensor in loaded.items()}
