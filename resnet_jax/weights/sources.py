"""Finding weights: a published tag, the Hugging Face hub, a file, a folder, a run of ours."""

import json
import logging
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from resnet_jax.config import InputError, sides
from resnet_jax.files import read_json
from resnet_jax.integrity import Damaged, checkpoints_of, damage, newest_sound, steps_in
from resnet_jax.models.registry import MODELS, create_model, model_fields
from resnet_jax.output import say
from resnet_jax.recipes import from_dict
from resnet_jax.weights.convert import to_torch
from resnet_jax.weights.tags import UNCALIBRATED, Calibration, Preprocessing, find_tag

FILES = (".safetensors", ".pth", ".pt", ".bin")
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64}
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


@dataclass(frozen=True)
class Weights:
    """Tensors under PyTorch's names, and what is known of the model they belong to.

    Attributes:
      tensors: name -> array; read from the file when it is asked for.
      name: of the model; None where the source does not say.
      fields: of its module, that differ from the named model's.
      preprocessing: how images are prepared; None where the source does not say.
      class_names: None where the source does not say.
      several: an image may have several of these classes.
      calibration: of the probabilities.
    """

    tensors: Mapping[str, Any]
    name: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    several: bool = False
    calibration: Calibration = UNCALIBRATED


def find_weights(source: str) -> Weights:
    """What a source names: a tag or model (`resnet50.tv2_in1k`, `resnet50`), `hf-hub:OWNER/NAME`, a `.safetensors`,
    `.pth` or `.pt` file, a folder with weights and `config.json`, or the folder of a run.

    Raises:
      InputError: there is no such thing, or it cannot be read; the message says what would help.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_file(path)
    if path.suffix in FILES:
        raise InputError(f"{source}: there is no such file")
    if source.startswith("hf-hub:"):
        return _from_hub(source.removeprefix("hf-hub:"))
    tag = find_tag(source)
    tensors = read_tensors(_download(tag.repository, "model.safetensors"))
    return Weights(tensors, tag.name, {"num_classes": tag.num_classes}, tag.preprocessing)


def _download(repository: str, name: str) -> Path:
    import huggingface_hub

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or ".." in repository:
        raise InputError(f"{repository!r} is no name of a repository; it looks like OWNER/NAME")
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, local_files_only=True))
    except huggingface_hub.errors.LocalEntryNotFoundError:
        logging.getLogger("resnet_jax").info("fetching %s of %s", name, repository)
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{name} of {repository} is neither in the cache of the Hugging Face hub nor can it be fetched "
            f"({type(error).__name__}). Without a network, fetch the file elsewhere and give its path, "
            "or copy the cache (HF_HOME) of a machine that has it"
        ) from error


def _from_hub(repository: str) -> Weights:
    file = _download(repository, "config.json")
    return _described(file, read_tensors(_download(repository, "model.safetensors")), repository)


def _from_folder(folder: Path) -> Weights:
    if (folder / "checkpoints").is_dir():
        return _from_run(folder)
    files = [path for path in sorted(folder.iterdir()) if path.suffix in FILES]
    if not files or not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds neither a run nor a file of weights beside a config.json")
    chosen = min(files, key=lambda path: (FILES.index(path.suffix), path.name))
    return _described(folder / "config.json", read_tensors(chosen), str(folder))


def _described(file: Path, tensors: Mapping[str, Any], where: str) -> Weights:
    """Weights with a `config.json` as timm writes it."""
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{where}: config.json is no JSON ({error}); fetch it again") from error
    name = config.get("architecture") if isinstance(config, dict) else None
    if name not in MODELS:
        raise InputError(f"{where}: config.json names the architecture {name!r}, which is not among our models")
    known = config.get("pretrained_cfg") or config
    labels = known.get("label_names") or config.get("label_names")
    preprocessing = None
    if "mean" in known and "input_size" in known:
        size, tested = known["input_size"], known.get("test_input_size") or known["input_size"]
        crop = known.get("test_crop_pct") or known.get("crop_pct", 0.875)
        mean, std = tuple(known["mean"]), tuple(known["std"])
        preprocessing = Preprocessing(mean, std, size[1], tested[1], crop, known.get("interpolation", "bilinear"))
    classes = config.get("num_classes", known.get("num_classes", 1000))
    return Weights(tensors, name, {"num_classes": classes}, preprocessing, tuple(labels) if labels else None)


def _from_file(path: Path) -> Weights:
    if path.suffix != ".safetensors":
        return Weights(read_tensors(path))
    tensors = SafeTensors(path)
    if "resnet_jax" not in tensors.metadata:
        return Weights(tensors)
    said = json.loads(tensors.metadata["resnet_jax"])
    preprocessing = said["preprocessing"]
    if preprocessing is not None:
        preprocessing = Preprocessing(**_tuples(preprocessing))
    names = said["class_names"]
    return Weights(
        tensors,
        said["name"],
        said["fields"],
        preprocessing,
        tuple(names) if names else None,
        said["several"],
        Calibration(**_tuples(said["calibration"])),
    )


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _from_run(folder: Path) -> Weights:
    """The moving average of a run's latest checkpoint, with `train.patience` of its best; or its parameters where there
    is no average.
    """
    from resnet_jax.vectors import read_record, read_state, reader

    place = checkpoints_of(folder)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def read(step: int) -> tuple[int, dict[str, Any], dict[str, Any]]:
        with reader(place) as manager:
            record, index = read_record(manager, step)
            known = manager.item_metadata(step)["state"].tree["spread"]
            spread = {name: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here) for name, m in known.items()}
            return step, record, read_state(manager, step, index, spread, lambda arrays: arrays)

    def substituted(what: str, bad: int, problem: str, step: int) -> None:
        say(
            f"WARNING: the {what} of step {bad} in {folder} is damaged ({problem}); taking that of step {step} in its "
            "place",
            error=True,
        )

    def read_chosen(step: int) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """The checkpoint of a step; with `train.patience` the best one that its record names."""
        before, last = steps_in(place), read(step)
        best = (last[1]["best"] or {}).get("step")
        if last[1]["recipe"]["train"]["patience"] is None or best in (None, step):
            return last
        if problem := damage(place / str(best)):
            if steps_in(place) != before:
                raise Damaged("the run goes on and has deleted it")
            substituted("best checkpoint", best, problem, step)
            return last
        return read(best)

    last, problems = newest_sound(place, read_chosen)
    if last is None:
        damaged = "".join(f"; that of step {bad} is damaged: {problem}" for bad, problem in problems.items())
        raise InputError(f"{folder} holds no checkpoint{damaged or '; the run ended before its first one'}")
    step, record, arrays = last
    for bad, problem in problems.items():
        substituted("checkpoint", bad, problem, step)
    config = from_dict(record["recipe"])
    state = unflatten_dict(arrays, sep=".")
    found = state.get("ema", state)
    variables = {name: found[name] for name in ("params", "batch_stats") if name in found}
    fields: dict[str, Any] = {"num_classes": variables["params"]["head"]["bias"].shape[0]}
    fields |= model_fields(replace(config.model, scan=False))
    fields |= {} if config.data.channels == 3 else {"in_channels": config.data.channels}
    if hasattr(create_model(config.model.name), "image_size"):
        fields["image_size"] = min(sides(config.data.image_size))
    tensors = to_torch(create_model(config.model.name, **fields), variables)
    data, augment = config.data, config.augment
    size = data.eval_image_size or data.image_size
    preprocessing = Preprocessing(data.mean, data.std, data.image_size, size, augment.eval_crop, augment.interpolation)
    names = tuple(record["class_names"])
    calibration = read_calibration(folder, step, fields["num_classes"])
    return Weights(tensors, config.model.name, fields, preprocessing, names, record["several"], calibration)


class CalibrationFile(TypedDict):
    """What `calibration.json` holds."""

    step: int
    temperature: float
    thresholds: tuple[float, ...] | None


def read_calibration(folder: Path, step: int, classes: int) -> Calibration:
    """What the report of a run found for a step, in `calibration.json`, if it found anything. A file that is damaged is
    named on standard error.
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


class SafeTensors(Mapping[str, np.ndarray]):
    """The tensors of a safetensors file as views of the mapped file: nothing is read before it is used.

    Raises:
      InputError: the file is damaged or something else.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as checked:
                self.metadata: dict[str, str] = checked.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.entries: dict[str, Any] = json.loads(file.read(length))
        self.entries.pop("__metadata__", None)
        self.bytes = np.asarray(np.memmap(path, np.uint8, "r", offset=8 + length))

    def __getitem__(self, key: str) -> np.ndarray:
        entry = self.entries[key]
        begin, end = entry["data_offsets"]
        return self.bytes[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_tensors(path: Path) -> Mapping[str, Any]:
    """The tensors of a file; a `.pth` is read with torch and only if it holds nothing but tensors.

    Raises:
      InputError: torch is missing, the file is damaged, or it holds code.
    """
    if path.suffix == ".safetensors":
        return SafeTensors(path)
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path} is a file of PyTorch: install torch to read it, or turn it into safetensors where torch is"
        ) from error
    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"  # today's files are zip archives, which can be mapped; those before 2020 are not
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors and was refused, since such a file can run code; "
            "save its state_dict() alone"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{path} cannot be read ({str(error).splitlines()[0]}); fetch it again") from error
    for wrapper in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise InputError(f"{path} holds no state dict: expected names with tensors")
    return {name: (tensor.float() if tensor.is_floating_point() else tensor).numpy() for name, tensor in loaded.items()}
