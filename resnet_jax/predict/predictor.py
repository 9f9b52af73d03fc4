"""Networks for use: a compiled forward pass, and pictures in, probabilities and class names out."""

import glob
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resnet_jax.config import InputError
from resnet_jax.data.on_device import normalize
from resnet_jax.files import in_bucket, path_of
from resnet_jax.models.registry import channels_of, create_model, dtype_of
from resnet_jax.models.resnet import ResNet
from resnet_jax.predict.fold_batch_norm import fold_batch_norm
from resnet_jax.training.parts import Parts, make_parts
from resnet_jax.training.sharding import compiler_options
from resnet_jax.weights.load import fit_weights, model_of, names_of_outputs, preprocessing_of
from resnet_jax.weights.sources import find_weights, preprocessing_in, read_calibration
from resnet_jax.weights.tags import UNCALIBRATED, Calibration, Preprocessing

LARGE_PART, SMALL_PART = 8, 64
"""Images that a CPU takes at once: of 96 x 96 pixels or more, and smaller ones."""

NOT_FINITE = "has probabilities that are not finite"

CONSTANT = 8 * 2**20
"""Bytes of all parameters up to which they are constants of a CPU's program; a call pays for each array it is given."""


def make_forward(model: nn.Module, variables: Any) -> Callable[[jax.Array], jax.Array]:
    """Returns `forward(images) -> logits`, as fast as this machine does it.

    Batch normalisation is folded into the convolutions, which changes logits by rounding only. On a CPU a large batch
    goes through in parts, since activations that leave the cache cost more than the arithmetic.

    Args:
      model: a module of `create_model`.
      variables: `{"params", "batch_stats"}` of the model.

    Returns:
      A function of images, float [batch, height, width, channel], normalised; for each shape it compiles once.

    Example:
      >>> model = rj.create_model("cifar_resnet8", stage_sizes=(1, 1))
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> forward = rj.make_forward(model, variables)
      >>> forward(jnp.zeros((2, 8, 8, 3))).shape
      (2, 10)
    """
    if isinstance(model, ResNet) and model.norm in ("batch", "frozen_batch"):
        model, variables = fold_batch_norm(model, variables)
    on_cpu = jax.default_backend() == "cpu"

    def logits(variables: Any, images: jax.Array) -> Any:
        count = len(images)
        part = LARGE_PART if min(images.shape[1:3]) >= 96 else SMALL_PART
        if not on_cpu or count <= part:
            return model.apply(variables, images, train=False)
        padded = jnp.pad(images, ((0, -count % part), (0, 0), (0, 0), (0, 0)))
        parts = lax.map(partial(model.apply, variables, train=False), padded.reshape(-1, part, *images.shape[1:]))
        return parts.reshape(-1, *parts.shape[2:])[:count]

    compiled = partial(jax.jit, compiler_options=compiler_options())
    if on_cpu and sum(leaf.nbytes for leaf in jax.tree.leaves(variables)) <= CONSTANT:
        return compiled(partial(logits, jax.tree.map(np.asarray, variables)))
    return partial(compiled(logits), variables)


def logits_of(forward: Callable[[jax.Array], jax.Array], images: jax.Array, flip: bool) -> jax.Array:
    """Returns the logits of normalised images; with `flip` the mean of those of each image and of its mirror image."""
    return (forward(images) + forward(images[:, :, ::-1])) / 2 if flip else forward(images)


def to_probabilities(logits: jax.Array, multilabel: bool, temperature: float = 1.0) -> jax.Array:
    """Returns float32 [batch, classes]: softmax of logits / temperature, or with `multilabel` the sigmoid of each.

    One logit means a sigmoid, as in `torch.sigmoid(model(x))` after training with `BCEWithLogitsLoss`: [batch, 1], the
    probability of the label 1.
    """
    return (jax.nn.sigmoid if multilabel or logits.shape[-1] == 1 else jax.nn.softmax)(logits / temperature)


@dataclass(frozen=True)
class Predictor:
    """A network with what belongs to it: `predictor(images)` gives probabilities.

    Attributes:
      model: as `load_pretrained` gives it.
      variables: as `load_pretrained` gives them.
      preprocessing: how pictures are resized, cut and normalised, as in the evaluation of the run.
      class_names: of the columns, as `names_of_outputs` says. A network with one logit has one column, the probability
        of the label 1.
      forward: normalised images -> logits.
      multilabel: each class has a probability of its own, since a picture may show several.
      calibration: temperature and thresholds that the run's report fitted.
      flip: pictures are seen as they are and mirrored, and the logits are averaged, as they always are where the
        preprocessing says so.
      channels: of the pictures.

    Example::

      predictor = rj.Predictor.from_run("runs/a")
      for path, row in zip(paths, predictor(paths)):
          print(path, predictor.class_names[row.argmax()], row.max())
    """

    model: Any
    variables: Any
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    forward: Callable[[jax.Array], jax.Array]
    multilabel: bool = False
    calibration: Calibration = UNCALIBRATED
    flip: bool = False
    channels: int = 3

    @classmethod
    def from_source(
        cls,
        source: str | Path,
        name: str | None = None,
        flip: bool = False,
        checkpoint: str | None = None,
        **parts: Any,
    ) -> Self:
        """Makes one from anything that `load_pretrained` takes; `name` is the model's, where the source does not say.

        Args:
          checkpoint: of a run, as for `find_weights`.
          **parts: `model` of the user's own, with which the run was trained; other parts are not needed.

        Raises:
          InputError: the source cannot be read, or nothing says how pictures are prepared for it.
        """
        own = make_parts(parts)
        if own.model is not None:
            return cls.from_own_model(path_of(str(source), "SOURCE"), own, flip, checkpoint)
        weights = find_weights(str(source), name, checkpoint)
        name, fields = model_of(weights, str(source))
        model = create_model(name, **fields)
        outputs = getattr(model, "num_classes", fields["num_classes"])
        if not outputs:
            raise InputError(f"{source} has no classifier: there is nothing to predict")
        preprocessing = preprocessing_of(weights, str(source))
        if preprocessing is None:
            raise InputError(f"{source} does not say how pictures are prepared; take the run, or what it exports")
        variables = fit_weights(model, weights.tensors, str(source))
        thresholds = weights.calibration.thresholds
        if thresholds and len(thresholds) != outputs:
            raise InputError(f"{source} has {len(thresholds)} thresholds for {outputs} outputs")
        names = names_of_outputs(outputs, weights.class_names, str(source))
        forward = make_forward(model, variables)
        calibration = weights.calibration
        many, channels = weights.multilabel, channels_of(model)
        return cls(model, variables, preprocessing, names, forward, many, calibration, flip, channels)

    @classmethod
    def from_own_model(cls, folder: Path, parts: Parts, flip: bool = False, checkpoint: str | None = None) -> Self:
        """Makes one from a run whose model is its user's own; errors as for `from_source`."""
        from resnet_jax.training.build import read_run

        config, state, record = read_run(folder, checkpoint, parts, optimizer=False)
        names = tuple(record["class_names"])
        if not names:
            raise InputError(
                f"the outputs of {folder} are no classes, so there is nothing to predict in words: take "
                "resnet_jax.restore and model.apply"
            )
        variables, model = state.averages or state.variables, parts.model
        assert model is not None
        calibration = read_calibration(folder, int(state.step), len(names))
        compiled = jax.jit(partial(model.apply, train=False), compiler_options=compiler_options())
        forward = partial(compiled, variables)
        preprocessing, many = preprocessing_in(config), record["multilabel"]
        return cls(model, variables, preprocessing, names, forward, many, calibration, flip, config.data.channels)

    @classmethod
    def from_run(cls, folder: str | Path, **parts: Any) -> Self:
        """Makes one from the folder of a run: its averages if it kept any, of the best checkpoint or the latest.

        Args:
          **parts: as for `from_source`.
        """
        return cls.from_source(folder, **parts)

    @property
    def dtype(self) -> Any:
        """Returns the type of images that the model takes."""
        return dtype_of(self.model)

    def prepare(self, raw: Any) -> np.ndarray:
        """Returns a picture (path, a file's bytes, array or Pillow image) as the network sees it: RGB uint8, or
        float32.

        Raises:
          BadImage: it cannot be decoded, or is a path of something else than a regular file, which could hang.
        """
        from resnet_jax.data.decode import BadImage
        from resnet_jax.data.transforms import fit

        if isinstance(raw, str | Path) and os.path.exists(raw) and not os.path.isfile(raw):
            raise BadImage("it is no regular file")
        look = self.preprocessing
        return fit(raw, look.eval_image_size, look.eval_crop, look.interpolation, self.channels)

    def normalized(self, prepared: Sequence[np.ndarray]) -> jax.Array:
        """Returns prepared pictures as the network takes them, [batch, height, width, channel]."""
        look = self.preprocessing
        return normalize(jnp.asarray(np.stack(prepared)), look.mean, look.std, self.dtype)

    def probabilities(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """Returns float32 [batch, classes] of prepared pictures."""
        flip = self.flip or self.preprocessing.eval_flip
        logits = logits_of(self.forward, self.normalized(prepared), flip)
        return np.asarray(to_probabilities(logits, self.multilabel, self.calibration.temperature))

    def predicted_classes(self, row: np.ndarray) -> np.ndarray:
        """Returns the numbers of the classes that a picture has, from its probabilities [classes], the most probable
        first.

        That is one, and of a network with one logit the only one, however improbable; where a picture may have several,
        those that reach their thresholds.
        """
        ranked = row.argsort()[::-1]
        if not self.multilabel:
            return ranked[:1]
        thresholds = np.broadcast_to(np.asarray(self.calibration.thresholds or 0.5), row.shape)
        return ranked[row[ranked] >= thresholds[ranked]]

    def __call__(self, images: Iterable[Any], batch: int = 32) -> np.ndarray:
        """Returns probabilities, float32 [number of images, classes].

        Args:
          images: paths, bytes of files, arrays [height, width, channel], or Pillow images.
          batch: images that go through the network at once.

        Raises:
          BadImage: one cannot be decoded.
          InputError: one picture is given in place of several, or the network gives nan for one.
        """
        is_array = getattr(images, "shape", ())[2:] in ((1,), (3,), (self.channels,))  # its rows would be pictures
        if is_array or isinstance(images, str | bytes | Path) or hasattr(images, "getexif"):
            raise InputError("one picture is given, where several are expected: give a list, predictor([picture])")
        prepared = [self.prepare(raw) for raw in images]
        parts = [self.probabilities(prepared[i : i + batch]) for i in range(0, len(prepared), batch)]
        found = np.concatenate(parts) if parts else np.zeros((0, len(self.class_names)), np.float32)
        if len(bad := np.flatnonzero(~np.isfinite(found).all(1))):
            raise InputError(f"image {bad[0]} {NOT_FINITE}, one of {len(bad)} such images: the weights are damaged")
        return found


def predict_files(
    predictor: Predictor, paths: Iterable[Path], batch: int = 32
) -> Iterator[tuple[Path, np.ndarray | None, str]]:
    """Yields (path, probabilities, "") of each file in its order, or (path, None, reason) of one that cannot be decoded
    or for which the probabilities are not finite.

    Files are read and decoded by threads, two batches ahead at most: memory does not grow with their number.
    """
    from resnet_jax.data.decode import BadImage

    def prepare(path: Path) -> tuple[Path, np.ndarray | None, str]:
        try:
            return path, predictor.prepare(str(path)), ""
        except BadImage as error:
            return path, None, str(error)

    def settled(group: list[Any]) -> Iterator[tuple[Path, np.ndarray | None, str]]:
        done = [future.result() for future in group]
        good = [image for _, image, _ in done if image is not None]
        padded = good + [np.zeros_like(good[0])] * (batch - len(good)) if good else []  # one shape, compiled once
        rows = iter(predictor.probabilities(padded)[: len(good)] if good else [])
        for path, image, reason in done:
            row = None if image is None else next(rows)
            if row is not None and not np.isfinite(row).all():
                row, reason = None, NOT_FINITE
            yield path, row, reason

    with ThreadPoolExecutor() as pool:
        ahead: deque[list[Any]] = deque()
        group: list[Any] = []
        for path in paths:
            group.append(pool.submit(prepare, path))
            if len(group) == batch:
                ahead.append(group)
                group = []
            if len(ahead) == 2:
                yield from settled(ahead.popleft())
        for rest in (*ahead, group):
            yield from settled(rest)


def find_files(words: Sequence[str]) -> Iterator[Path]:
    """Returns the files that paths, folders and patterns such as `a/*.jpg` name; of folders all pictures, by name.

    Raises:
      InputError: one of them names nothing.
    """
    from resnet_jax.data.folders import LeftOut, pictures_under

    for word in words:
        path = path_of(word, "PATH")
        if path.is_dir():
            found = [path_of(picture, "PATH") for picture in pictures_under(path, LeftOut())]
        elif path.exists():
            found = [path]
        elif in_bucket(path):
            found = []
        else:
            found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
        if not found:
            raise InputError(f"{word}: there is no such file, and no picture of such a name")
        yield from found
