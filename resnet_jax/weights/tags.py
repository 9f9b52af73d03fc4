"""Lists published weights: their tags, and how images are prepared for them. The facts in `tags.jsonl` are timm's."""

import difflib
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

from resnet_jax.config import InputError, Size


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for weights.

    Attributes:
      mean, std: of the channels of pixels in [0, 1].
      image_size: side, or height and width, in training, in pixels.
      eval_image_size: the same in evaluation.
      eval_crop: share of the short side that an evaluation image keeps.
      interpolation: `bilinear` or `bicubic`.
      eval_flip: each image is looked at mirrored too, and the logits are averaged.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: Size
    eval_image_size: Size
    eval_crop: float
    interpolation: str
    eval_flip: bool = False


@dataclass(frozen=True)
class Calibration:
    """How logits become probabilities, fitted on images that were not trained on.

    Attributes:
      temperature: logits are divided by it (Guo et al. 2017, arXiv:1706.04599).
      thresholds: for multilabel data, from which probability on each class is predicted; None for one half.
    """

    temperature: float = 1.0
    thresholds: tuple[float, ...] | None = None


UNCALIBRATED = Calibration()


@dataclass(frozen=True)
class Tag:
    """Published weights. `name` is the model, `tag` the whole name, `num_classes` 0 where there is no head."""

    name: str
    tag: str
    num_classes: int
    preprocessing: Preprocessing
    license: str | None
    default: bool

    @property
    def repository(self) -> str:
        """Returns the repository of the Hugging Face hub that holds them."""
        return f"timm/{self.tag}"


@cache
def all_tags() -> dict[str, Tag]:
    """Reads all tags, by their whole names, such as `resnet50.tv2_in1k`."""
    tags = {}
    for line in resources.files(__package__).joinpath("tags.jsonl").read_text().splitlines():
        row = json.loads(line)
        preprocessing = Preprocessing(
            tuple(row["mean"]),
            tuple(row["std"]),
            row["size"],
            row["eval_size"],
            row["eval_crop"],
            row["interpolation"],
        )
        name = row["tag"].partition(".")[0]
        default = row.get("default", False)
        tags[row["tag"]] = Tag(name, row["tag"], row["classes"], preprocessing, row["license"], default)
    return tags


def tags_of(name: str) -> list[Tag]:
    """Returns the tags of a model, its default first; none where nobody published weights."""
    return sorted((tag for tag in all_tags().values() if tag.name == name), key=lambda tag: not tag.default)


def find_tag(source: str) -> Tag:
    """Finds the tag of that name, or the default tag of a model of that name.

    Raises:
      InputError: there is none; the message lists the nearest ones.
    """
    if source in all_tags():
        return all_tags()[source]
    name = source.partition(".")[0]
    if own := tags_of(name):
        if source == name:
            return own[0]
        raise InputError(f"{name} has no weights {source!r}; there are {', '.join(tag.tag for tag in own)}")
    near = difflib.get_close_matches(source, list(all_tags()), n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else "`resnet-jax models` lists them"
    raise InputError(f"no weights are called {source!r}, and there is no such file; {hint}")
