"""A network as a program of its own, for serving without this package: pictures in, probabilities out.

A `.stablehlo` file is a zip archive with `program`, for `jax.export.deserialize`, and `metadata.json`; a `.onnx` file
is made with jax2onnx and holds the same metadata among its properties.
"""

import json
import logging
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config import InputError, sides
from resnet_jax.data.on_device import normalize
from resnet_jax.models.resnet import ResNet
from resnet_jax.ops import use_custom_kernels
from resnet_jax.output import first_line, say
from resnet_jax.predict.fold_batch_norm import fold_batch_norm
from resnet_jax.predict.predictor import Predictor, logits_of, to_probabilities
from resnet_jax.typed import from_extra
from resnet_jax.weights.export import written_beside

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
CHECKED, TOLERANCE = 100, 1e-4
"""Generated pictures on which a written program must agree with the network, and how far probabilities may differ, as a
share of the largest."""


def export_program(
    source: str, path: Path, form: str, name: str | None = None, checkpoint: str | None = None, **parts: Any
) -> dict[str, Any]:
    """Writes a network with its preprocessing (but for resizing) and `to_probabilities` as a program for any batch.

    The program takes pixels [batch, height, width, channel], uint8 for RGB and else float32, and gives probabilities,
    float32 [batch, classes], [batch, 1] of a network with one logit. It is written only after it agreed with the
    network on 100 generated pictures. A line says so before it begins.

    Args:
      source: as for `load_pretrained`.
      form: `stablehlo` or `onnx`.
      name: of the model, where the source does not say.
      checkpoint: of a run, as for `find_weights`.
      **parts: of the user's own, with which a run was trained.

    Returns:
      What its metadata say: `source`, `class_names`, `input`, `dtype`, `multilabel`, `thresholds`, `eval_crop`,
      `interpolation`.

    Raises:
      InputError: the source cannot be read, jax2onnx is missing, the program disagrees, or cannot be written.
    """
    predictor = Predictor.from_source(source, name, checkpoint=checkpoint, **parts)
    look, channels = predictor.preprocessing, predictor.channels
    shape = (*sides(look.eval_image_size), channels)
    dtype = np.uint8 if channels == 3 else np.float32
    metadata = {
        "source": Path(source).name,
        "class_names": predictor.class_names,
        "input": ["batch", *shape],
        "dtype": np.dtype(dtype).name,
        "multilabel": predictor.multilabel,
        "thresholds": predictor.calibration.thresholds,
        "eval_crop": look.eval_crop,
        "interpolation": look.interpolation,
    }
    write = {"stablehlo": write_stablehlo, "onnx": write_onnx}[form]
    with written_beside(path) as beside:
        line = f"writing {path} and comparing it with the network on {CHECKED} generated pictures; it may take a minute"
        say(line)
        call = write(pixels_to_probabilities(predictor), shape, dtype, metadata, beside)
        check_program(call, predictor, shape, dtype)
    return metadata


def pixels_to_probabilities(predictor: Predictor) -> Callable[[jax.Array], jax.Array]:
    """Returns the whole way from pixels to probabilities as one function, with the norms folded."""
    model, variables, look = predictor.model, predictor.variables, predictor.preprocessing
    if isinstance(model, ResNet) and model.norm in ("batch", "frozen_batch"):
        model, variables = fold_batch_norm(model, variables)
    multilabel, temperature = predictor.multilabel, predictor.calibration.temperature

    def served(pixels: jax.Array) -> jax.Array:
        images = normalize(pixels, look.mean, look.std, predictor.dtype)
        logits = logits_of(partial(model.apply, variables, train=False), images, look.eval_flip)
        return to_probabilities(logits, multilabel, temperature)

    return served


Call = Callable[[np.ndarray], np.ndarray]


def write_stablehlo(served: Any, shape: tuple[int, ...], dtype: Any, metadata: dict[str, Any], path: Path) -> Call:
    """Writes the archive; returns what it computes, read back from it.

    Raises:
      InputError: flatbuffers is not installed, or the network cannot be traced for any number of images.
    """
    with from_extra("export", ".stablehlo"):
        import flatbuffers  # noqa: F401  jax.export imports it when it writes
    pixels = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"batch, {', '.join(map(str, shape))}"), dtype)
    try:
        program = jax.export.export(jax.jit(served), platforms=PLATFORMS)(pixels)
    except Exception as error:  # of many types, raised by the module where it meets a size without a number
        raise InputError(
            f"the network cannot be traced for any number of images ({type(error).__name__}: {first_line(error)}); a "
            "module that is exported takes that number as x.shape[0] or -1, not as len(x)"
        ) from error
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("program", bytes(program.serialize()))
        archive.writestr("metadata.json", json.dumps(metadata, indent=1))
    with zipfile.ZipFile(path) as archive:
        again = jax.export.deserialize(bytearray(archive.read("program")))
    return lambda pixels: np.asarray(again.call(pixels))


def write_onnx(served: Any, shape: tuple[int, ...], dtype: Any, metadata: dict[str, Any], path: Path) -> Call:
    """Writes an ONNX model; returns what ONNX Runtime computes with it.

    Raises:
      InputError: jax2onnx is not installed, or does not know an operation of the network.
    """
    logging.getLogger("jax2onnx").setLevel(logging.ERROR)  # it warns of each of its parts for other libraries
    with from_extra("onnx", ".onnx, unlike .stablehlo,"):
        import onnx
        import onnxruntime
        from jax2onnx import to_onnx
    try:
        with use_custom_kernels(False):
            graph = to_onnx(served, [jax.ShapeDtypeStruct(("batch", *shape), dtype)], model_name="resnet_jax")
    except Exception as error:  # whatever it raises where it does not know an operation
        raise InputError(
            f"jax2onnx cannot translate this network ({first_line(error, 200)}); take .stablehlo"
        ) from error
    for key, value in metadata.items():
        graph.metadata_props.add(key=key, value=json.dumps(value))
    onnx.save(graph, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (pixels,) = session.get_inputs()
    return lambda images: session.run(None, {pixels.name: images})[0]


def check_program(call: Call, predictor: Predictor, shape: tuple[int, ...], dtype: Any) -> None:
    """Raises InputError where a program and the network differ on random pictures, in batches of several sizes."""
    rng = np.random.default_rng(0)
    noise = rng.random((CHECKED, *shape), dtype=np.float32)
    pictures = (noise * 255).astype(dtype) if dtype == np.uint8 else noise
    for part in np.split(pictures, [1, 34]):
        look = predictor.preprocessing
        images = normalize(jnp.asarray(part), look.mean, look.std, predictor.dtype)
        forward = partial(predictor.model.apply, predictor.variables, train=False)
        logits = logits_of(forward, images, look.eval_flip)
        wanted = to_probabilities(logits, predictor.multilabel, predictor.calibration.temperature)
        off, largest = float(np.abs(call(part) - np.asarray(wanted)).max()), float(wanted.max())
        if not off <= TOLERANCE * largest:
            raise InputError(
                f"the program differs from the network by {off:.2g} in probabilities up to {largest:.2g}; nothing was "
                "written"
            )
