import dataclasses
import io
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from resnet_jax.config import AugmentConfig, Config, DataConfig, InputError
from resnet_jax.data import folders as files
from resnet_jax.data import sources
from resnet_jax.data.dataset import ArraySource, Dataset, labels_of, with_outputs
from resnet_jax.data.fingerprint import changes, fingerprint
from resnet_jax.data.sources import load_dataset
from resnet_jax.training.loop import train


def make_folder(root, layout):
    """`layout`: {"train/cat": 3, ...} makes that many small pictures there."""
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
    assert {name: len(split) for name, split in dataset.splits().items()} == {
        "train": 1155,
        "validation": 282,
        "test": 360,
    }
    whole = load_dataset(DataConfig(), seed=0, hold_out=False)
    assert whole.validation is None and (len(whole.train), len(whole.test)) == (1437, 360)
    labels = np.asarray([dataset.test[i][1] for i in range(360)])
    assert np.bincount(labels).min() >= 34
    image, label = dataset.train[0]
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8
    again = load_dataset(DataConfig(), seed=9, hold_out=False).train[0]
    np.testing.assert_array_equal(whole.train[0][0], again[0])
    assert whole.train[0][1] == again[1] and label in range(10)


def test_digits_are_those_of_scikit_learn():
    digits = load_digits()
    order = np.arange(len(digits.target))
    splits = train_test_split(order, test_size=0.2, random_state=0, stratify=digits.target)
    ours = load_dataset(DataConfig(), seed=0, hold_out=False)
    for split, places in zip((ours.train, ours.test), splits, strict=True):
        np.testing.assert_array_equal(split.labels, digits.target[places])
        grey = np.round(digits.images[places, ..., None] * (255 / 16))
        np.testing.assert_array_equal(split.images, np.broadcast_to(grey, split.images.shape))


@pytest.mark.parametrize(
    ("train_name", "other", "split"),
    [
        ("train", "test", "test"),
        ("Training", "Testing", "test"),
        ("train_set", "eval", "test"),
        ("TRAIN", "val", "validation"),
        ("train", "valid", "validation"),
        ("train", "dev", "validation"),
        ("training-set", "Validation Set", "validation"),
    ],
)
def test_a_folder_with_splits_by_any_of_their_names(tmp_path, train_name, other, split):
    layout = {f"{train_name}/cat": 3, f"{train_name}/dog": 2, f"{train_name}/ant": 1, f"{other}/dog": 2}
    dataset = load_dataset(make_folder(tmp_path, layout), seed=0, hold_out=False)
    assert dataset.class_names == ("ant", "cat", "dog")
    assert [dataset.train[i][1] for i in range(6)] == [0, 1, 1, 1, 2, 2]
    assert set(dataset.splits()) == {"train", split}
    assert [dataset.split(split)[i][1] for i in range(2)] == [2, 2]


def test_three_splits_are_what_they_say(tmp_path):
    layout = {f"{split}/{name}": n for split, n in (("train", 5), ("val", 3), ("test", 2)) for name in ("cat", "dog")}
    dataset = load_dataset(make_folder(tmp_path, layout), seed=0)
    for name, split, count in (("train", "train", 10), ("validation", "val", 6), ("test", "test", 4)):
        places = names_of(dataset.split(name))
        assert len(places) == count and {Path(place).relative_to(tmp_path).parts[0] for place in places} == {split}


def test_validation_is_held_out_of_train_beside_a_test_split_where_something_is_selected(tmp_path):
    config = make_folder(tmp_path, {"train/cat": 20, "train/dog": 20, "test/cat": 3, "test/dog": 3})
    held_out, whole = (load_dataset(config, seed=0, hold_out=selects) for selects in (True, False))
    assert len(whole.train) == 40 and whole.validation is None and len(whole.test) == len(held_out.test) == 6
    parts = set(names_of(held_out.train)), set(names_of(held_out.validation))
    assert parts[0] | parts[1] == set(names_of(whole.train)) and not parts[0] & parts[1] and 3 <= len(parts[1]) <= 15


def test_a_folder_without_splits_holds_validation_out_by_name_and_seed(tmp_path):
    config = make_folder(tmp_path, {"cat": 100, "dog": 200})
    first, again, other = (load_dataset(config, seed) for seed in (1, 1, 2))
    assert first.test is None
    shares = np.bincount([first.validation[i][1] for i in range(len(first.validation))]) / [100, 200]
    assert (np.abs(shares - 0.2) < 0.1).all()
    assert not set(names_of(first.train)) & set(names_of(first.validation))
    assert len(first.train) + len(first.validation) == 300
    assert names_of(first.validation) == names_of(again.validation) != names_of(other.validation)
    none = load_dataset(dataclasses.replace(config, validation_fraction=0.0), 0)
    assert set(none.splits()) == {"train"} and len(none.train) == 300


def test_a_picture_stays_on_its_side_when_others_come_and_go(tmp_path):
    """Wherever the folder lies: what is held out depends on each picture's own name."""
    config = make_folder(tmp_path / "a", {"cat": 30, "dog": 30})
    before = load_dataset(config, 0)
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b" / "cat" / "7.png").unlink()
    for name in ("0a.png", "zz.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "b" / "dog" / name)
    after = load_dataset(dataclasses.replace(config, dataset=f"folder:{tmp_path / 'b'}"), 0)
    for name in ("train", "validation"):
        old, new = set(before.split(name).keys), set(after.split(name).keys)
        assert old - new <= {"cat/7.png"} and new - old <= {"dog/0a.png", "dog/zz.png"}


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"train/a": 1, "training/a": 1}, "train and training are the same split"),
        ({"train/a": 3, "train/b": 3, "val/a": 1, "valid/b": 1}, "val and valid are the same split"),
        ({"train": 3, "test": 3}, "the folders test, train are named as splits"),
        ({"test": 3, "val": 3}, "the folders test, val are named as splits"),
        ({"train/a": 3, "train/b": 3, "val": 4}, "val has no classes"),
    ],
)
def test_folders_of_which_it_cannot_be_told_what_they_are_are_refused(tmp_path, layout, message):
    with pytest.raises(InputError, match=message):
        load_dataset(make_folder(tmp_path, layout), seed=0)


def test_test_pictures_without_classes_are_left_alone_and_said(tmp_path):
    layout = {"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 2, "test": 5}
    dataset = load_dataset(make_folder(tmp_path, layout), seed=0)
    assert dataset.test is None and len(dataset.validation) == 4
    assert "test (test pictures without classes)" in dataset.notes[1]


def test_a_class_that_is_called_like_a_split_is_said(tmp_path):
    dataset = load_dataset(make_folder(tmp_path, {"train": 30, "car": 30, "bus": 30}), seed=0)
    assert dataset.class_names == ("bus", "car", "train")
    assert any("train is taken for a class" in note for note in dataset.notes)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "has no classes"),
        ({"train/cat": 2, "train/dog": 0}, "train/dog: the class has no images"),
        ({"train/cat": 2, "train/dog": 2, "test/cat": 1, "test/bee": 1}, "its test split has classes .* lacks: bee"),
        ({"cat": 1, "dog": 2}, "held out for validation, which goes by their names"),
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
    assert len(dataset.train) == 50 and len(dataset.validation) == 5 and dataset.train[3][0].shape == (9, 9, 3)


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
    dataset = load_dataset(stripes, seed=0, hold_out=False)
    assert dataset.class_names == ("lie", "stand")
    assert (len(dataset.train), len(dataset.test)) == (40, 11)
    assert list(Path(stripes.data_dir).rglob("*.array_record*"))
    assert "tensorflow" not in sys.modules
    raw, label = dataset.train[0]
    assert raw[:2] == b"\xff\xd8" and label in (0, 1)
    half = dataclasses.replace(stripes, dataset="tfds:stripes:train[:50%]")
    assert len(load_dataset(half, seed=0, hold_out=False).train) == 20
    for part, count in (("train[:90%]", 36), ("train[:20]", 20), ("train[10:20]+train[30:]", 20)):
        held_out = load_dataset(dataclasses.replace(stripes, dataset=f"tfds:stripes:{part}"), seed=0)
        assert len(held_out.train) + len(held_out.validation) == count and len(held_out.validation) > 0
        whole = load_dataset(stripes, seed=0)
        keys = [{held_out.split(n).key(i) for i in range(len(held_out.split(n)))} for n in ("train", "validation")]
        held = {whole.validation.key(i) for i in range(len(whole.validation))}
        assert keys[1] <= held and not keys[0] & held
    with pytest.raises(InputError, match=r"no split 'nosuch'; there are (train, test|test, train)"):
        load_dataset(dataclasses.replace(stripes, dataset="tfds:stripes:nosuch"), seed=0)


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


def test_what_is_not_prepared_is_fetched_for_training_alone(tmp_path):
    config = DataConfig(dataset="tfds:mnist", data_dir=str(tmp_path / "home"))
    with pytest.raises(InputError, match="tfds:mnist is not prepared in"):
        load_dataset(config, seed=0, prepare=False)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_label_that_is_no_class_is_refused(wrong, monkeypatch):
    labels = np.asarray([0, 1, 2, wrong, 1], np.int32)
    images = np.zeros((5, 4, 4, 3), np.uint8)
    dataset = Dataset(ArraySource(images, labels, "ours"), None, None, ("a", "b", "c"))
    monkeypatch.setattr(sources, "_digits", lambda: dataset)
    for fraction in (0.0, 0.5):
        with pytest.raises(InputError, match=rf"example 3 of ours \(train\) has the label {wrong}, .* 3 classes"):
            load_dataset(DataConfig(validation_fraction=fraction), seed=0)


def test_a_long_table_of_many_classes_is_read_in_seconds(tmp_path, monkeypatch):
    rows = [f"{i}.png,class{i % 20000}" for i in range(60000)]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *rows]))
    with monkeypatch.context() as there:
        there.setattr(files.os.path, "isfile", lambda path: True)
        began = time.monotonic()
        dataset = load_dataset(DataConfig(dataset=f"csv:{tmp_path / 'table.csv'}", validation_fraction=0.01), 3)
    assert time.monotonic() - began < 30 and len(dataset.class_names) == 20000


def test_an_unknown_tfds_is_named(tmp_path):
    with pytest.raises(InputError, match="no dataset 'nothing_of_this_name'"):
        load_dataset(DataConfig(dataset="tfds:nothing_of_this_name", data_dir=str(tmp_path)), seed=0)


def written(folder, lines, pictures=("a0", "a1", "a2", "b0", "b1", "b2")):
    (folder / "pictures").mkdir()
    for name in pictures:
        Image.new("RGB", (4, 4)).save(folder / "pictures" / f"{name}.png")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return load_dataset(DataConfig(dataset=f"csv:{folder / 'table.csv'}", validation_fraction=0.4), 0)


def test_a_table_names_pictures_where_they_lie(tmp_path):
    rows = [f"pictures/{name}.png,{name[0]}" for name in ("b0", "a0", "a1", "b1", "a2", "b2")]
    dataset = written(tmp_path, ["path,label", *rows])
    assert dataset.class_names == ("a", "b") and len(dataset.train) + len(dataset.validation) == 6
    assert dataset.test is None
    path, label = dataset.train[0]
    assert path == str(tmp_path / "pictures" / Path(path).name) and dataset.class_names[label] == Path(path).name[0]


@pytest.mark.parametrize("header", ["path,label,split", "Path,LABEL, Split", "path,label,split,fold"])
def test_a_table_may_say_the_split(header, tmp_path):
    rows = [
        f"pictures/{name}.png,{name[0]},{split}"
        for name, split in (("a0", "train"), ("a1", "Test"), ("a2", "val"), ("b1", ""), ("b2", "DEV"))
    ]
    dataset = written(tmp_path, [header, *rows])
    assert [note for note in dataset.notes if "not read" in note] == [
        f"columns of {tmp_path / 'table.csv'} that are not read: {name}" for name in header.split(",")[3:]
    ]
    found = {split: [Path(path).name for path in source.paths] for split, source in dataset.splits().items()}
    assert found == {"train": ["a0.png", "b1.png"], "validation": ["a2.png", "b2.png"], "test": ["a1.png"]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with a mark"])
def test_a_table_is_read_in_any_unicode(tmp_path, encoding):
    rows = ["path,label,split", "a.png,caf\u00e9,train", "b.png,\u732b,train", "a2.png,caf\u00e9,val"]
    for name in ("a", "b", "a2"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    text = "\r\n".join(rows)
    data = ("\ufeff" + text).encode("utf-16-le") if "mark" in encoding else text.encode(encoding)
    (tmp_path / "table.csv").write_bytes(data)
    dataset = load_dataset(DataConfig(dataset=f"csv:{tmp_path / 'table.csv'}"), 0)
    assert dataset.class_names == ("caf\u00e9", "\u732b")


def test_a_table_of_another_encoding_is_named(tmp_path):
    (tmp_path / "table.csv").write_bytes("path,label\na.png,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"line 2: the byte 0xe9 is not UTF-8; save the table as UTF-8"):
        load_dataset(DataConfig(dataset=f"csv:{tmp_path / 'table.csv'}"), 0)


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
        (["path,label,split", "pictures/a0.png,a,holdout"], "split 'holdout' is unknown; give train, validation, test"),
        (["path,label,split", "pictures/a0.png,a,", "pictures/b0.png,b,", "pictures/b1.png,c,test"], "lacks: c"),
        (
            ["path,label,split", "pictures/a0.png,a,val", "pictures/b0.png,b,test"],
            "no line belongs to the training split",
        ),
        (["path,label", "pictures/a0.png\0,a"], "there is no file"),
        (["path,label", "pictures/a0.png,a", "pictures/b0.png,b,c"], "line 3: it has more values than the first line"),
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
    assert dataset.multilabel and dataset.class_names == ("big", "red", "round")
    np.testing.assert_array_equal(labels_of(dataset.train), [[0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 1, 0]])
    assert dataset.validation[0][1] == (1, 0, 0)


def test_several_labels_are_filled_up_for_a_model_with_more_outputs(tmp_path):
    rows = ["pictures/a0.png,red;round,train", "pictures/a1.png,,train", "pictures/b0.png,red,val"]
    dataset = written(tmp_path, ["path,label,split", *rows])
    wider = with_outputs(dataset, 4)
    np.testing.assert_array_equal(labels_of(wider.train), [[1, 1, 0, 0], [0, 0, 0, 0]])
    assert not changes(fingerprint(dataset), fingerprint(wider))
    arrays = dataclasses.replace(dataset, train=ArraySource(np.zeros((2, 4, 4, 3), np.uint8), np.eye(2, dtype=int)))
    with pytest.raises(InputError, match="give them as many as the model has outputs"):
        with_outputs(arrays, 4)


def test_several_labels_are_held_out_by_name_where_no_split_is_given(tmp_path):
    rows = [f"pictures/{name}.png,{'x;y' if name[0] == 'a' else 'x'}" for name in ("a0", "a1", "a2", "b0", "b1", "b2")]
    dataset = written(tmp_path, ["path,label", *rows])
    parts = [{split[i][0] for i in range(len(split))} for split in (dataset.train, dataset.validation)]
    assert len(parts[0]) + len(parts[1]) == 6 and parts[1] and not parts[0] & parts[1]
