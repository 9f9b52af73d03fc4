"""Datasets of Hugging Face, in folders that the tests write: Parquet files and folders of pictures."""

import dataclasses
import io
import pickle
import re
import shutil
import sys

import chex
import datasets
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from resnet_jax.config import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    InputError,
    LogConfig,
    ModelConfig,
    ParallelConfig,
)
from resnet_jax.data.decode import decode
from resnet_jax.data.fingerprint import changes, described, fingerprint
from resnet_jax.data.loader import BadImages, train_batches
from resnet_jax.data.sources import load_dataset
from resnet_jax.training.build import build_model, sharded_shapes, state_maker
from resnet_jax.training.checkpoints import read_checkpoint
from resnet_jax.training.loop import train
from resnet_jax.training.sharding import make_mesh

from ..small import digits
from ..training.test_loop import lines_of, train_until


def pixels(i):
    """A picture of 8x8, dark for even and light for odd numbers; no two are equal."""
    return np.random.default_rng(i).integers(0, 100, (8, 8, 3), np.uint8) + np.uint8(i % 2 * 150)


def png(i):
    buffer = io.BytesIO()
    Image.fromarray(pixels(i)).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(path, columns):
    """Writes a Parquet file that knows nothing of Hugging Face."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_parquet(folder, sizes, first=0):
    """Writes a folder as `Dataset.to_parquet` and the Hub have them, with features, and a number for each row."""
    kinds = datasets.ClassLabel(names=["light", "dark"])
    features = datasets.Features({"picture": datasets.Image(), "kind": kinds, "id": datasets.Value("int64")})
    for split, size in sizes.items():
        rows = range(first, first + size)
        pictures = [{"bytes": png(i), "path": f"{i}.png"} for i in rows]
        columns = {"picture": pictures, "kind": [1 - i % 2 for i in rows], "id": list(rows)}
        folder.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def write_pictures(folder, sizes):
    for split, size in sizes.items():
        for i in range(size):
            place = folder / split / ("dark", "light")[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(i)).save(place / f"{i}.png")


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def data_of(dataset, home, **fields):
    return DataConfig(dataset=dataset, data_dir=str(home), **fields)


def load(dataset, home, hold_out=False, **fields):
    fields["validation_fraction"] = 0.2 if hold_out else 0.0
    return load_dataset(data_of(dataset, home, **fields), seed=0, hold_out=hold_out)


def test_a_folder_of_parquet_keeps_its_classes_and_its_encoded_images(tmp_path, home):
    write_parquet(tmp_path / "data", {"train": 7, "validation": 3, "test": 4})
    found = load(f"hf:{tmp_path / 'data'}", home)
    assert found.class_names == ("light", "dark")
    assert {name: len(split) for name, split in found.splits().items()} == {"train": 7, "validation": 3, "test": 4}
    assert [found.test[i] for i in range(4)] == [(png(i), 1 - i % 2) for i in range(4)]
    assert np.array_equal(np.asarray(decode(found.train[3][0])), pixels(3))
    assert any("images are the column picture, labels the column kind" in note for note in found.notes)
    assert found.train.describe(2) == f"hf:{tmp_path / 'data'}: row 2 of train"


def test_a_folder_of_pictures_is_read_where_it_lies_and_named_by_its_files(tmp_path, home):
    write_pictures(tmp_path / "data", {"train": 6, "test": 4})
    found = load(f"hf:{tmp_path / 'data'}", home)
    assert found.class_names == ("dark", "light") and len(found.train) == 6 and len(found.test) == 4
    keys = [found.train.key(i) for i in range(6)]
    assert sorted(keys) == sorted(f"train/{('dark', 'light')[i % 2]}/{i}.png" for i in range(6))
    for i, key in enumerate(keys):
        raw, label = found.train[i]
        assert raw == str(tmp_path / "data" / key) and found.class_names[label] == key.split("/")[1]
    assert not list(home.rglob("*.png"))


@pytest.mark.parametrize("given", ["data", "data/rows.parquet", "data/*.parquet"])
def test_parquet_by_a_file_a_folder_or_a_pattern(given, tmp_path, home):
    labels = ["dog", "cat", "cat", "dog"]
    write_table(tmp_path / "data" / "rows.parquet", {"image": [png(i) for i in range(4)], "label": labels})
    found = load(f"parquet:{tmp_path / given}", home)
    assert found.class_names == ("cat", "dog") and found.validation is None and found.test is None
    assert [found.train[i] for i in range(4)] == [(png(i), int(label == "dog")) for i, label in enumerate(labels)]


def test_parquet_files_belong_to_the_split_that_their_path_names(tmp_path, home):
    root = tmp_path / ".home" / "test"
    for i, file in enumerate(
        ("train-00000-of-00001", "train-00001", "val/part-0", "old [1]/TEST_0", "detrain-0", ".x/y")
    ):
        write_table(root / f"{file}.parquet", {"image": [png(i), png(i + 1)], "label": ["a", "b"]})
    for given in (root, root / "**/*.parquet"):
        found = load(f"parquet:{given}", home)
        assert [len(split) for split in found.splits().values()] == [6, 2, 2]
        assert [found.test[i][0] for i in range(2)] == [png(3), png(4)]
    with pytest.raises(InputError, match="files are named as test and validation, and none is left to train on"):
        load(f"parquet:{root}/[!.dt]*/*.parquet", home)


def test_a_split_and_parts_of_splits(tmp_path, home):
    write_parquet(tmp_path / "data", {"train": 10, "test": 4})
    name = f"hf:{tmp_path / 'data'}"
    half = load(f"{name}:train[5:]", home)
    assert [half.train[i][0] for i in range(5)] == [png(i) for i in range(5, 10)] and len(half.test) == 4
    assert half.train.key(0) == "row 5 of train"
    both = load(f"{name}:test+train[:20%]", home)
    assert [both.train[i][0] for i in range(6)] == [png(i) for i in (0, 1, 2, 3, 0, 1)]
    assert [both.train.key(i) for i in (3, 4)] == ["row 3 of test", "row 0 of train"] and both.test is None
    for wrong in ("nosuch", "train[:x]"):
        with pytest.raises(InputError, match=rf"no split '{re.escape(wrong)}'; there are train, test, and parts"):
            load(f"{name}:{wrong}", home)
    shutil.move(tmp_path / "data" / "train-00000-of-00001.parquet", tmp_path / "aside")
    with pytest.raises(InputError, match=r"no training split, but test: give hf:.*data:SPLIT"):
        load(name, home)
    assert len(load(f"{name}:test", home).train) == 4


def test_classes_are_the_sorted_values_of_the_whole_training_split(tmp_path, home):
    train = {"image": [png(i) for i in range(4)], "label": [7, 10, 9, 7]}
    write_table(tmp_path / "data" / "train.parquet", train)
    write_table(tmp_path / "data" / "test.parquet", {"image": [png(5)], "label": [9]})
    found = load(f"hf:{tmp_path / 'data'}:train[:2]", home)
    assert found.class_names == ("7", "9", "10")
    assert [found.train[i][1] for i in range(2)] == [0, 2] and found.test[0][1] == 1
    write_table(tmp_path / "data" / "test.parquet", {"image": [png(5)], "label": [8]})
    with pytest.raises(InputError, match="its test split has classes that train lacks: 8"):
        load(f"hf:{tmp_path / 'data'}", home)


def test_a_split_without_labels_is_left_out_and_a_row_without_one_is_named(tmp_path, home):
    write_table(tmp_path / "data" / "train.parquet", {"image": [png(0), png(1)], "label": [0, 1]})
    write_table(tmp_path / "data" / "test.parquet", {"image": [png(2)], "label": [-1]})
    found = load(f"hf:{tmp_path / 'data'}", home)
    assert found.test is None and any("left out: the split test of hf:" in note for note in found.notes)
    write_table(tmp_path / "data" / "train.parquet", {"image": [png(0), png(1), png(2)], "label": [0, 1, None]})
    with pytest.raises(InputError, match="row 2 of train has no label in the column label"):
        load(f"hf:{tmp_path / 'data'}", home)
    write_table(tmp_path / "data" / "train.parquet", {"image": [png(0), png(1), png(2)], "label": [0, 1, -1]})
    with pytest.raises(InputError, match="column label has the label -1; classes are numbered from 0"):
        load(f"hf:{tmp_path / 'data'}", home)


IMAGE = pa.array([png(0), png(1), png(2)])
KINDS = ["a", "b", "a"]
COLUMNS = {
    "no image": (
        {"x": KINDS, "y": [1.0, 2.0, 3.0]},
        {},
        r"no column of images, .* its columns are x \(string\), y \(f",
    ),
    "no label": ({"x": IMAGE, "y": [1.0, 2.0, 3.0]}, {}, r"no column of labels, .* x \(binary\), y \(double|float64\)"),
    "two images": (
        {"x": IMAGE, "mask": IMAGE, "y": KINDS},
        {},
        "may be the images, x, mask: name one with --data.image_",
    ),
    "two labels": (
        {"x": IMAGE, "y": KINDS, "z": [1, 2, 1]},
        {},
        "may be the labels, y, z: name one with --data.label_c",
    ),
    "unknown": (
        {"image": IMAGE, "label": KINDS},
        {"label_column": "lable"},
        r"no column 'lable' \(--data.label_column\);",
    ),
    "floats": (
        {"image": IMAGE, "label": KINDS, "score": [0.5, 1.0, 0.1]},
        {"label_column": "score"},
        r"column score \(--data.label_column\) is float64, expected whole numbers, texts or a ClassLabel; its columns",
    ),
    "nested": (
        {"image": IMAGE, "label": KINDS, "tags": [["a"], ["b"], []]},
        {"label_column": "tags"},
        r"column tags \(--data.label_column\) is List\(Value\('string'\)\), expected",
    ),
    "no image there": (
        {"image": IMAGE, "label": KINDS},
        {"image_column": "label"},
        r"column label \(--data.image_column\) is string, expected images or their bytes",
    ),
    "names": ({"image": IMAGE, "file": ["x", "y", "z"]}, {}, "a value of its own in the column file"),
    "one class": ({"image": IMAGE, "label": [3, 3, 3]}, {}, "its column label has 1 class; it takes two or more"),
}


@pytest.mark.parametrize(("columns", "fields", "words"), COLUMNS.values(), ids=COLUMNS)
def test_columns_that_cannot_be_taken(columns, fields, words, tmp_path, home):
    write_table(tmp_path / "rows.parquet", columns)
    with pytest.raises(InputError, match=words):
        load(f"parquet:{tmp_path / 'rows.parquet'}", home, **fields)


def test_columns_by_name_by_declaration_and_named(tmp_path, home):
    image = [{"bytes": png(i), "path": f"{i}.png"} for i in range(3)]
    columns = {"image": image, "mask": IMAGE, "label": KINDS, "other": [5, 4, 3], "id": ["x", "y", "z"]}
    write_table(tmp_path / "rows.parquet", columns)
    name = f"parquet:{tmp_path / 'rows.parquet'}"
    assert load(name, home).train[2] == (png(2), 0)
    found = load(name, home, image_column="mask", label_column="other")
    assert found.class_names == ("3", "4", "5") and [found.train[i] for i in range(3)] == [
        (png(i), 2 - i) for i in range(3)
    ]
    write_parquet(tmp_path / "declared", {"train": 4})  # with a column of whole numbers beside the ClassLabel
    assert load(f"hf:{tmp_path / 'declared'}", home).class_names == ("light", "dark")
    with pytest.raises(InputError, match=r"data\.image_column is for hf: and parquet:, and data.dataset is 'digits'"):
        DataConfig(image_column="image")


def test_what_is_not_there(tmp_path, home, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match="no folder someone/nothing here, and the Hub of Hugging Face cannot be reached"
    ):
        load("hf:someone/nothing:train", home)
    with pytest.raises(InputError, match=r"hf:.*nothing: give a folder, or OWNER/NAME on the Hub"):
        load(f"hf:{tmp_path / 'nothing'}", home)
    with pytest.raises(InputError, match="there is no such Parquet file"):
        load(f"parquet:{tmp_path / '*.parquet'}", home)
    with pytest.raises(InputError, match="has to be on this machine"):
        data_of("parquet:https://example.org/x.parquet", home)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty cannot be read: EmptyDatasetError: .* doesn't contain any data files"):
        load(f"hf:{tmp_path / 'empty'}", home)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 of which the rest is gone")
    with pytest.raises(InputError, match=r"torn.parquet cannot be read: .*"):
        load(f"parquet:{tmp_path / 'torn.parquet'}", home)
    with pytest.raises(InputError, match=r"give a folder, or .* Parquet files as parquet:PATH"):
        load(f"hf:{tmp_path / 'torn.parquet'}", home)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'needs the package datasets: pip install "residual-jax\[hf\]"'):
        load(f"hf:{tmp_path}", home)


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("mnist", ("mnist", None)),
        ("some.one/some-thing:train[:2]", ("some.one/some-thing", None)),
        ("someone/something/small:train", ("someone/something", "small")),
    ],
)
def test_names_on_the_hub(given, asked, tmp_path, home, monkeypatch):
    write_parquet(tmp_path / "data", {"train": 4})
    builder = datasets.load_dataset_builder(str(tmp_path / "data"), cache_dir=str(home))
    calls = []

    def answer(source, name, cache_dir):
        calls.append((source, name))
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", answer)
    with pytest.raises(InputError, match=r"is not downloaded: training does that"):
        load_dataset(data_of(f"hf:{given}", home), seed=0, prepare=False)
    assert len(load(f"hf:{given}", home).train) == (2 if "[" in given else 4)
    assert load_dataset(data_of(f"hf:{given}", home, validation_fraction=0.0), seed=0, prepare=False)
    assert calls == [asked] * 3


def test_the_hub_says_which_configurations_there_are(home, monkeypatch):
    def several(*_, **__):
        raise ValueError("Config name is missing.\nPlease pick one: ['big', 'small']\nExample of usage:\n`load()`")

    monkeypatch.setattr(datasets, "load_dataset_builder", several)
    words = r"hf:a/b cannot be read \(there is no folder a/b here, .*\): .* \['big', 'small'\]; name one as hf:OWNER"
    with pytest.raises(InputError, match=words):
        load("hf:a/b", home)


def test_code_in_a_dataset_is_not_run(tmp_path, home):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')")
    with pytest.raises(InputError, match="scripts are no longer supported"):
        load(f"hf:{tmp_path / 'data'}", home)
    assert not (tmp_path / "proof").exists()


def test_what_is_held_out_and_what_changed_go_by_row_wherever_it_lies(tmp_path, home):
    write_parquet(tmp_path / "a", {"train": 60})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before, moved = (load(f"hf:{tmp_path / place}", home, hold_out=True) for place in "ab")
    held = [before.validation.key(i) for i in range(len(before.validation))]
    assert held and held == [moved.validation.key(i) for i in range(len(held))]
    old = fingerprint(before)
    assert not changes(old, fingerprint(moved))
    write_parquet(tmp_path / "b", {"train": 62})
    grown = changes(old, fingerprint(load(f"hf:{tmp_path / 'b'}", home, hold_out=True)))
    assert sum(change.added for change in grown.values()) == 2 and not any(change.lost for change in grown.values())
    write_parquet(tmp_path / "b", {"train": 60}, first=1)  # other pictures and labels, as many
    text = described(changes(old, fingerprint(load(f"hf:{tmp_path / 'b'}", home, hold_out=True))))
    assert "relabelled" in text and "of those looked at have another size or content" in text


def test_a_source_is_sent_to_other_processes_without_its_rows(tmp_path, home):
    write_parquet(tmp_path / "data", {"train": 300})
    source = load(f"hf:{tmp_path / 'data'}", home).train
    sent = pickle.dumps(source)
    assert len(sent) < 10_000 + source.labels.nbytes
    assert [pickle.loads(sent)[i] for i in (0, 299)] == [source[i] for i in (0, 299)]


def recipe(dataset, home, **fields):
    base = Config()
    return digits(
        model=ModelConfig("cifar_resnet8"),
        data=data_of(dataset, home, on_device=False, **fields),
        augment=AugmentConfig(crop="pad", pad=1, flip="random"),
        train=dataclasses.replace(base.train, batch_size=8, steps=4),
        schedule=dataclasses.replace(base.schedule, warmup_epochs=0.0),
        parallel=ParallelConfig(devices=1),
        checkpoint=CheckpointConfig(every_steps=2),
        log=LogConfig(every_steps=1, tensorboard=False, report=False),
    )


def test_worker_processes_read_it_as_threads_do(tmp_path, home):
    write_parquet(tmp_path / "data", {"train": 20})
    config = recipe(f"hf:{tmp_path / 'data'}", home)
    source = load_dataset(config.data, 0, hold_out=False).train
    given = []
    for workers in (0, 1):
        there = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=workers))
        given.append(list(train_batches(source, there, make_mesh(1), BadImages("error"), range(3), classes=2)))
    chex.assert_trees_all_equal(*given)
    assert [batch["image"].shape for batch in given[0]] == [(8, 8, 8, 3)] * 3


@pytest.mark.parametrize("write", [write_parquet, write_pictures])
def test_a_run_that_is_broken_off_goes_on_bit_by_bit_though_the_data_moved(write, tmp_path, home, monkeypatch):
    write(tmp_path / "data", {"train": 24, "validation": 8, "test": 5})
    config = recipe(f"hf:{tmp_path / 'data'}", home)
    summary = train(config, tmp_path / "whole")
    assert summary["test"]["count"] == 5 and summary["validation"]["count"] == 8
    train_until(2, config, tmp_path / "parts", monkeypatch)
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    train(recipe(f"hf:{tmp_path / 'elsewhere'}", home), tmp_path / "parts")
    template = sharded_shapes(state_maker(config, build_model(config, 2), lambda step: 0.0), make_mesh(1))
    states = [read_checkpoint(tmp_path / run, lambda _: template)[0] for run in ("whole", "parts")]
    assert states[0].step == 4
    chex.assert_trees_all_equal(*map(jax.device_get, states))
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "parts")


def test_a_run_does_not_go_on_with_other_pictures(tmp_path, home, monkeypatch):
    write_parquet(tmp_path / "data", {"train": 24, "test": 5})
    config = recipe(f"hf:{tmp_path / 'data'}", home)
    train_until(2, config, tmp_path / "run", monkeypatch)
    write_parquet(tmp_path / "data", {"train": 24, "test": 5}, first=2)  # the labels are the same
    with pytest.raises(InputError, match="of those looked at have another size or content"):
        train(config, tmp_path / "run")


def test_a_picture_that_is_none_is_named(tmp_path, home):
    images = [png(i) for i in range(12)]
    images[7] = b"no picture"
    write_table(tmp_path / "data.parquet", {"image": images, "label": ["a", "b"] * 6})
    config = recipe(f"parquet:{tmp_path / 'data.parquet'}", home, validation_fraction=0.0)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, metric="none"))
    with pytest.raises(InputError, match=r"data.parquet: row 7 of train cannot be decoded \(Unidentified"):
        train(config, tmp_path / "run")
