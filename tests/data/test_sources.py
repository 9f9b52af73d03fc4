import dataclasses
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from resnet_jax.config import AugmentConfig, Config, DataConfig, InputError
from resnet_jax.data.sources import labels_of, load_dataset
from resnet_jax.training.loop import train


def make_folder(root, layout):
    """`layout`: {"train/cat": 3, ...} makes so many small pictures there."""
    rng = np.random.default_rng(0)
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(root / folder / f"{i}.png")
    return DataConfig(dataset=f"folder:{root}")


def names_of(source):
    return [source.describe(i) for i in range(len(source))]


def test_digits_are_split_once_and_for_all():
    dataset = load_dataset(DataConfig(), seed=0)
    assert (len(dataset.train), len(dataset.test)) == (1437, 360)
    labels = np.asarray([dataset.test[i][1] for i in range(360)])
    assert np.bincount(labels).min() >= 34
    image, label = dataset.train[0]
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8
    again = load_dataset(DataConfig(), seed=9).train[0]
    np.testing.assert_array_equal(image, again[0])
    assert label == again[1]


def test_digits_are_those_of_scikit_learn():
    digits = load_digits()
    order = np.arange(len(digits.target))
    splits = train_test_split(order, test_size=0.2, random_state=0, stratify=digits.target)
    ours = load_dataset(DataConfig(), seed=0)
    for split, places in zip((ours.train, ours.test), splits, strict=True):
        np.testing.assert_array_equal(split.labels, digits.target[places])
        grey = np.round(digits.images[places, ..., None] * (255 / 16))
        np.testing.assert_array_equal(split.images, np.broadcast_to(grey, split.images.shape))


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_folder_with_splits(tmp_path, test_name):
    config = make_folder(tmp_path, {"train/cat": 3, "train/dog": 2, "train/ant": 1, f"{test_name}/dog": 2})
    dataset = load_dataset(config, seed=0)
    assert dataset.class_names == ("ant", "cat", "dog")
    assert [dataset.train[i][1] for i in range(6)] == [0, 1, 1, 1, 2, 2]
    assert [dataset.test[i][1] for i in range(2)] == [2, 2]


def test_folder_without_splits_is_split_by_class_and_seed(tmp_path):
    config = make_folder(tmp_path, {"cat": 10, "dog": 20, "rare": 2})
    first, again, other = (load_dataset(config, seed) for seed in (1, 1, 2))
    assert np.bincount([first.test[i][1] for i in range(len(first.test))]).tolist() == [2, 4, 1]
    assert not set(names_of(first.train)) & set(names_of(first.test))
    assert len(first.train) + len(first.test) == 32
    assert names_of(first.test) == names_of(again.test) != names_of(other.test)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "has no classes"),
        ({"train/cat": 2, "train/dog": 0}, "train/dog: the class has no images"),
        ({"train/cat": 2, "test/cat": 1, "test/bee": 1}, "lacks: bee"),
        ({"cat": 3, "dog": 1}, "'dog' has a single image"),
    ],
)
def test_a_wrong_folder_is_named(tmp_path, layout, message):
    with pytest.raises(InputError, match=message):
        load_dataset(make_folder(tmp_path, layout), seed=0)


@pytest.mark.parametrize("dataset", ["", "cifar10", "folder:", "web:images"])
def test_an_unknown_kind_is_refused_with_the_choices(dataset):
    with pytest.raises(InputError, match="digits, folder:PATH, csv:FILE, tfds:NAME"):
        load_dataset(DataConfig(dataset=dataset), seed=0)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="there is no such folder"):
        load_dataset(DataConfig(dataset=f"folder:{tmp_path}/none"), seed=0)


def test_synthetic_has_the_size_asked_for():
    config = dataclasses.replace(DataConfig(), dataset="synthetic", synthetic_size=50, image_size=9)
    dataset = load_dataset(config, seed=0)
    assert len(dataset.train) == 50 and dataset.train[3][0].shape == (9, 9, 3)


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """A real dataset of generated JPEGs for tensorflow-datasets, prepared without TensorFlow."""
    import tensorflow_datasets as tfds

    class Stripes(tfds.core.GeneratorBasedBuilder):
        """Stripes that lie or stand."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["lie", "stand"])}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(40), "test": self._generate_examples(11)}

        def _generate_examples(self, count):
            for i in range(count):
                image = np.zeros((16, 16, 3), np.uint8)
                image[(i // 2) % 3 :: 3] = 255
                buffer = io.BytesIO()
                Image.fromarray(image if i % 2 == 0 else image.transpose(1, 0, 2)).save(buffer, "JPEG")
                yield i, {"image": buffer.getvalue(), "label": i % 2}

    return DataConfig(dataset="tfds:stripes", data_dir=str(tmp_path_factory.mktemp("tfds")), image_size=16)


def test_tfds_prepares_array_records_and_reads_them(stripes):
    dataset = load_dataset(stripes, seed=0)
    assert dataset.class_names == ("lie", "stand")
    assert (len(dataset.train), len(dataset.test)) == (40, 11)
    assert list(Path(stripes.data_dir).rglob("*.array_record*"))
    assert "tensorflow" not in sys.modules
    raw, label = dataset.train[0]
    assert raw[:2] == b"\xff\xd8" and label in (0, 1)
    half = dataclasses.replace(stripes, dataset="tfds:stripes:train[:50%]")
    assert len(load_dataset(half, seed=0).train) == 20


def test_training_on_tfds(stripes, tmp_path):
    base = Config()
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(stripes, on_device=False),
        augment=AugmentConfig(crop="pad", pad=1, flip="random"),
        train=dataclasses.replace(base.train, batch_size=16, steps=20, eval_every_epochs=100.0),
        schedule=dataclasses.replace(base.schedule, warmup_epochs=0.0),
        parallel=dataclasses.replace(base.parallel, devices=1),
        log=dataclasses.replace(base.log, report=False),
    )
    summary = train(config, tmp_path / "run")
    assert summary["test"]["count"] == 11
    assert summary["test"]["accuracy"] > 0.8


def test_an_unknown_tfds_is_named(tmp_path):
    with pytest.raises(InputError, match="no dataset 'nothing_of_this_name'"):
        load_dataset(DataConfig(dataset="tfds:nothing_of_this_name", data_dir=str(tmp_path)), seed=0)


def written(folder, lines, pictures=("a0", "a1", "a2", "b0", "b1", "b2")):
    (folder / "pictures").mkdir()
    for name in pictures:
        Image.new("RGB", (4, 4)).save(folder / "pictures" / f"{name}.png")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return load_dataset(DataConfig(dataset=f"csv:{folder / 'table.csv'}", validation_fraction=0.34), 0)


def test_a_table_names_pictures_where_they_lie(tmp_path):
    rows = [f"pictures/{name}.png,{name[0]}" for name in ("b0", "a0", "a1", "b1", "a2", "b2")]
    dataset = written(tmp_path, ["path,label", *rows])
    assert dataset.class_names == ("a", "b") and (len(dataset.train), len(dataset.test)) == (4, 2)
    path, label = dataset.train[0]
    assert path == str(tmp_path / "pictures" / Path(path).name) and dataset.class_names[label] == Path(path).name[0]


def test_a_table_may_say_the_split(tmp_path):
    rows = [
        f"pictures/{name}.png,{name[0]},{'val' if name[1] == '2' else 'train'}" for name in ("a0", "a2", "b1", "b2")
    ]
    dataset = written(tmp_path, ["path,label,split", *rows])
    assert [Path(dataset.test[i][0]).name for i in range(len(dataset.test))] == ["a2.png", "b2.png"]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["file,label"], "no column path"),
        (["path,label", "pictures/a0.png,a", "pictures/a1.png,a"], "has one class, a; it takes two"),
        (["path,label"], "has no class; it takes two"),
        (["path,label", "pictures/zz.png,a"], r"line 2: there is no file .*zz\.png"),
        (["path,label", "pictures/a0.png,a", "pictures/a0.png,b"], "line 3: .* is there twice"),
        (["path,label", "pictures/a0.png,a", "pictures/b0.png,"], r"line 3: .*b0\.png has no label"),
        (["path,label", "pictures/a0.png,a;"], "has one class, a; it takes two"),
        (["path,label,split", "pictures/a0.png,a,dev"], "split 'dev' is unknown"),
        (["path,label,split", "pictures/a0.png,a,", "pictures/b0.png,b,", "pictures/b1.png,c,test"], "split: c"),
        (["path,label", "pictures/a0.png,a", "pictures/b0.png,b", "pictures/b1.png,b"], "class 'a' has a single image"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path, lines, says):
    with pytest.raises(InputError, match=says):
        written(tmp_path, lines)


def test_a_folder_of_one_class_is_refused(tmp_path):
    (tmp_path / "only").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "only" / "0.png")
    with pytest.raises(InputError, match="has one class, only; it takes two"):
        load_dataset(DataConfig(dataset=f"folder:{tmp_path}"), 0)


def test_a_table_may_give_several_labels(tmp_path):
    rows = ["pictures/a0.png,red;round", "pictures/a1.png,", "pictures/a2.png,round", "pictures/b0.png,red; big"]
    dataset = written(tmp_path, ["path,label,split", *(f"{row},train" for row in rows), "pictures/b1.png,big,val"])
    assert dataset.several and dataset.class_names == ("big", "red", "round")
    np.testing.assert_array_equal(labels_of(dataset.train), [[0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 1, 0]])
    assert dataset.test[0][1] == (1, 0, 0)


def test_several_labels_are_split_by_chance_where_no_split_is_given(tmp_path):
    rows = [f"pictures/{name}.png,{'x;y' if name[0] == 'a' else 'x'}" for name in ("a0", "a1", "a2", "b0", "b1", "b2")]
    dataset = written(tmp_path, ["path,label", *rows])
    parts = [{split[i][0] for i in range(len(split))} for split in (dataset.train, dataset.test)]
    assert (len(parts[0]), len(parts[1])) == (4, 2) and not parts[0] & parts[1]
