"""Splits of the user's own as sources: what they may be, and which labels are classes."""

import dataclasses
import io
import os
import threading
import time
from types import SimpleNamespace

import grain
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import resnet_jax as rj
from resnet_jax.config import Config, DataConfig, InputError
from resnet_jax.data.decode import decode
from resnet_jax.data.fingerprint import changes, fingerprint
from resnet_jax.data.loader import BadImages, checked_label, eval_batches, whole_split
from resnet_jax.data.own_data import Examples, own_dataset
from resnet_jax.data.watch import Stalled
from resnet_jax.training.build import data_of
from resnet_jax.training.parts import Parts
from resnet_jax.training.sharding import make_mesh

from ..small import digits

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS = np.asarray([0, 1, 2, 0, 1, 2])


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Rows:
    """A sequence that is no list, of pairs."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return PIXELS[index], LABELS[index]


def with_images(make):
    return [{"image": make(pixels), "label": label} for pixels, label in zip(PIXELS, LABELS.tolist(), strict=True)]


@pytest.fixture(params=["pair", "arrays", "pillow", "bytes", "paths", "jax", "grain", "pairs", "columns"])
def split(request, tmp_path):
    if request.param == "pair":
        return PIXELS, LABELS
    if request.param == "grain":
        return grain.MapDataset.source(with_images(np.asarray)).seed(0)
    if request.param == "pairs":
        return Rows()
    if request.param == "columns":
        datasets = pytest.importorskip("datasets", reason="needs the extra hf")
        rows = {"image": [Image.fromarray(p) for p in PIXELS], "label": LABELS.tolist()}
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
        return datasets.Dataset.from_dict(rows, features=kinds)

    def saved(pixels):
        path = tmp_path / f"{hash(pixels.tobytes())}.png"
        path.write_bytes(png(pixels))
        return str(path)

    makers = {"arrays": np.asarray, "pillow": Image.fromarray, "bytes": png, "paths": saved, "jax": jnp.asarray}
    return with_images(makers[request.param])


def test_every_kind_of_split_gives_the_same_pictures_and_classes(split):
    dataset = own_dataset(rj.Dataset(train=split))
    assert [dataset.train[i][1] for i in range(6)] == LABELS.tolist()
    for i in range(6):
        np.testing.assert_array_equal(np.asarray(decode(dataset.train[i][0])), PIXELS[i])
    assert len(dataset.class_names) == 3


def test_what_is_held_out_of_data_of_ones_own_does_not_depend_on_how_much_there_is():
    images, labels = np.repeat(PIXELS, 20, 0), np.repeat(LABELS, 20)
    small, large = (data_of(Config(), Parts(dataset=rj.Dataset((images[:n], labels[:n])))) for n in (100, 120))
    held_out = [{data.validation.key(i) for i in range(len(data.validation))} for data in (small, large)]
    assert held_out[0] <= held_out[1]
    assert "held out of train" in small.notes[0]


def test_other_arrays_in_the_place_of_the_first_ones_are_noticed():
    """Labels that are no classes are not compared: a split that is drawn anew at each start shows in its pictures."""
    rng = np.random.default_rng(0)
    images, angles, order = rng.integers(0, 256, (20, 4, 4, 3), np.uint8), rng.random(20), rng.permutation(20)
    drawn = (slice(20), slice(20), order)
    first, again, other = (fingerprint(own_dataset(rj.Dataset((images[rows], angles[rows])))) for rows in drawn)
    assert not changes(first, again)
    assert "have another size or content" in str(changes(first, other)["train"])


def test_tables_that_number_their_classes_differently_are_refused_until_they_are_aligned():
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")

    def table(*names):
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
        rows = {"image": [Image.fromarray(p) for p in PIXELS[: len(names)]], "label": list(range(len(names)))}
        return datasets.Dataset.from_dict(rows, features=kinds)

    train, test = table("ant", "bee", "cow"), table("bee", "cow")  # of a folder that lacks the ants
    with pytest.raises(InputError, match=r"dataset.test has the classes bee, cow .* with align_labels_with_mapping"):
        own_dataset(rj.Dataset(train=train, test=test))
    folders = [SimpleNamespace(classes=list(names), __len__=lambda: 2) for names in (("a", "b", "c"), ("b", "c"))]
    with pytest.raises(InputError, match=r"dataset.validation has the classes b, c in this order"):
        own_dataset(rj.Dataset(train=folders[0], validation=folders[1]))
    aligned = test.align_labels_with_mapping({n: i for i, n in enumerate(train.features["label"].names)}, "label")
    found = own_dataset(rj.Dataset(train=train, test=aligned)).test
    assert [found[i][1] for i in (0, 1)] == [1, 2]


def test_labels_that_are_no_classes_stay_as_they_are():
    labels = [{"box": np.arange(4) / 4, "count": i} for i in range(6)]
    dataset = own_dataset(rj.Dataset(train=(PIXELS, labels)))
    assert dataset.class_names == ()
    assert dataset.label_classes() is None
    label = checked_label(dataset.train[5][1], None, dataset.train, 5)
    assert label["box"].dtype == np.float32
    assert label["count"] == 5
    assert own_dataset(rj.Dataset(train=(PIXELS, LABELS), class_names=())).class_names == ()
    config = digits()
    whole = whole_split(dataset.train, config, None)
    assert whole["label"]["box"].shape == (6, 4)


def test_several_labels_an_image():
    many = np.asarray([[0, 1, 1]] * 6)
    dataset = own_dataset(rj.Dataset(train=(PIXELS, many), class_names=("a", "b", "c")))
    assert dataset.multilabel
    assert dataset.label_classes() == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            rj.Dataset((PIXELS, LABELS), (PIXELS, LABELS), class_names=("a", "b")),
            "has the label 2, and there are 2 classes",
        ),
        (rj.Dataset((PIXELS, LABELS / 1), class_names=("a", "b", "c")), "label 0.0; with 3 class_names expected"),
        (rj.Dataset(([], [])), "the train split has no examples"),
        (
            rj.Dataset((np.tile(PIXELS, (20, 1, 1, 1)), np.tile(LABELS, 20) + 1)),
            "no training picture has the label 0: classes are numbered",
        ),
        (rj.Dataset([*with_images(np.asarray)[:3], {"image": PIXELS[0], "label": "cat"}]), "has the label 'cat'"),
        (rj.Dataset([3, 4]), "is of type int: expected"),
    ],
)
def test_data_that_is_not_as_expected_is_named(data, message):
    with pytest.raises(rj.InputError, match=message.replace("(", r"\(")):
        data_of(Config(), Parts(dataset=data))


def test_one_channel_that_is_taken_three_times_is_said():
    grey = rj.Dataset((PIXELS[..., :1], LABELS), (PIXELS[..., :1], LABELS))
    assert any("data.channels 1 takes it as it is" in note for note in data_of(Config(), Parts(dataset=grey)).notes)
    one = Config(data=DataConfig(channels=1))
    for config, dataset in ((one, grey), (Config(), rj.Dataset((PIXELS, LABELS), (PIXELS, LABELS)))):
        assert not any("channel" in note for note in data_of(config, Parts(dataset=dataset)).notes)


def evaluated(source, batch_size, **data):
    """The images of a split, as an evaluation reads them."""
    config = digits()
    train, data = (dataclasses.replace(config.train, batch_size=batch_size), dataclasses.replace(config.data, **data))
    batches = eval_batches(
        source, dataclasses.replace(config, train=train, data=data), make_mesh(1), BadImages("error")
    )
    return np.concatenate([batch["image"] for batch in batches])


class OneFile:
    """Examples in one open file, of which each read moves the position; `clashes` counts reads that overlapped."""

    def __init__(self, pixels):
        self.file, self.busy, self.clashes = io.BytesIO(pixels.tobytes()), False, 0

    def __len__(self):
        return 64

    def __getitem__(self, index):
        self.clashes += self.busy
        self.busy = True
        self.file.seek(index * 192)
        time.sleep(0.001)
        image = np.frombuffer(self.file.read(192), np.uint8).reshape(8, 8, 3)
        self.busy = False
        return {"image": image, "label": index % 3}


def test_threads_read_data_of_ones_own_one_example_at_a_time(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    data = OneFile(pixels)
    source = own_dataset(rj.Dataset(train=data)).train
    np.testing.assert_array_equal(evaluated(source, 16), pixels)
    assert data.clashes == 0


class Gone(Rows):
    def __getitem__(self, index):
        if index == 4:
            raise OSError("the share is gone")
        return super().__getitem__(index)


def test_an_example_that_cannot_be_read_is_named():
    message = "example 4 of dataset.validation cannot be read: OSError: the share is gone"
    with pytest.raises(rj.InputError, match=message) as error:
        own_dataset(rj.Dataset(train=Rows(), validation=Gone()))
    assert isinstance(error.value.__cause__, OSError)
    with pytest.raises(rj.InputError, match=r"example 4 of dataset\.train cannot be read"):
        evaluated(Examples(Gone(), "train"), 6)


def test_an_example_of_ones_own_that_hangs_is_named():
    ended = threading.Event()

    class Hangs(Rows):
        def __getitem__(self, index):
            if index == 4:
                ended.wait(2.0)
            return super().__getitem__(index)

    with pytest.raises(Stalled, match=r"example 4 of dataset\.train has been under way"):
        evaluated(Examples(Hangs(), "train"), 6, timeout=0.5)
    ended.set()
