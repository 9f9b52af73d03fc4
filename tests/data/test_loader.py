import dataclasses
import os
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resnet_jax.config import AugmentConfig, DataConfig, InputError, TrainConfig
from resnet_jax.data import loader, on_device
from resnet_jax.data.dataset import ArraySource, Dataset, FileSource
from resnet_jax.data.loader import (
    BadImages,
    TrainExample,
    check_readable,
    eval_batches,
    sampling_table,
    train_batches,
    whole_split,
)
from resnet_jax.data.on_device import draw_batch
from resnet_jax.training.sharding import make_mesh

from ..small import digits

SIZE = 37
PLAIN = AugmentConfig(crop="none", flip="none", interpolation="bilinear")
SOURCE = ArraySource(
    np.broadcast_to(np.arange(SIZE, dtype=np.uint8)[:, None, None, None], (SIZE, 4, 4, 3)), np.arange(SIZE) % 5
)


def recipe(batch_size=8, workers=0, augment=None):
    return digits(
        data=DataConfig(image_size=4, on_device=False, workers=workers),
        augment=augment or AugmentConfig(crop="none"),
        train=TrainConfig(batch_size=batch_size, seed=3),
    )


class ReadBy:
    """The images of `SOURCE`; a label is the number of the process that reads it."""

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return SOURCE[index][0], os.getpid()

    def describe(self, index):
        return f"image {index}"


def images_of(batches):
    return np.concatenate([np.asarray(b["image"])[:, 0, 0, 0] for b in batches])


@pytest.mark.parametrize("hosts", [1, 4])
def test_hosts_partition_every_epoch(hosts):
    rows = []
    for rank in range(hosts):
        example = TrainExample(SOURCE, PLAIN, 4, 3, 8 // hosts, rank, hosts)
        rows.append([int(example(place)["image"][0, 0, 0]) for place in range(3 * SIZE * 8 // hosts // 8 * 8)])
    share = 8 // hosts
    steps = len(rows[0]) // share
    batches = [[i for row in rows for i in row[s * share : (s + 1) * share]] for s in range(steps)]
    single = TrainExample(SOURCE, PLAIN, 4, 3, 8)
    assert batches == [[int(single(s * 8 + i)["image"][0, 0, 0]) for i in range(8)] for s in range(steps)]
    stream = [i for batch in batches for i in batch]
    assert sorted(stream[:SIZE]) == sorted(stream[SIZE : 2 * SIZE]) == list(range(SIZE))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_from_any_step_and_any_workers(workers):
    augment = AugmentConfig(crop="pad", pad=1, flip="random")
    mesh, bad = make_mesh(1), BadImages("error")
    whole = list(train_batches(SOURCE, recipe(augment=augment), mesh, bad, range(9)))
    later = list(train_batches(SOURCE, recipe(augment=augment, workers=workers), mesh, bad, range(5, 9)))
    assert len(whole) == 9 and len(later) == 4
    for a, b in zip(whole[5:], later, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


def test_alternating_flips_are_the_same_from_host_and_device():
    images = np.random.default_rng(0).integers(0, 256, (SIZE, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(SIZE, dtype=np.int32)
    config = recipe(augment=AugmentConfig(crop="none", flip="alternating"))
    batches = train_batches(ArraySource(images, labels), config, make_mesh(1), BadImages("error"), range(10))
    for step, batch in enumerate(batches):
        drawn = on_device.draw_batch({"image": images, "label": labels}, jnp.asarray(step), 8, 3)
        np.testing.assert_array_equal(batch["image"], on_device.flip(drawn["mirrored"], drawn["image"]))
        np.testing.assert_array_equal(batch["label"], drawn["label"])


@pytest.mark.parametrize("devices", [1, 8])
def test_evaluation_sees_every_example_once(devices):
    seen = []
    for batch in eval_batches(SOURCE, recipe(16), make_mesh(devices), BadImages("error")):
        assert batch["image"].shape[0] == 16
        seen.extend(np.asarray(batch["image"])[np.asarray(batch["mask"]), 0, 0, 0])
    assert sorted(seen) == list(range(SIZE))


def test_evaluation_of_several_hosts_adds_up():
    seen = []
    for rank in range(4):
        for batch in eval_batches(SOURCE, recipe(16), make_mesh(1), BadImages("error"), rank, 4):
            seen.extend(np.asarray(batch["image"])[np.asarray(batch["mask"]), 0, 0, 0])
    assert sorted(seen) == list(range(SIZE))


@pytest.fixture
def files(tmp_path):
    """Ten pictures, of which number 4 and number 7 are none."""
    paths = []
    for i in range(10):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (4, 4), (i, i, i)).save(path)
        paths.append(str(path))
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:40])
    (tmp_path / "7.png").write_text("no picture")
    return FileSource(tuple(paths), tuple(range(10)))


KEPT = """
import dataclasses
from resnet_jax.config import AugmentConfig, Config, DataConfig, InputError, TrainConfig
from resnet_jax.data.loader import BadImages, train_batches
from resnet_jax.data.dataset import ArraySource, FileSource
from resnet_jax.training.sharding import make_mesh
import numpy as np

if __name__ == "__main__":
    data, train = DataConfig(image_size=64, on_device=False, workers=1), TrainConfig(batch_size=32)
    plain = AugmentConfig(crop="none", flip="none", interpolation="bilinear")
    config = dataclasses.replace(Config(), data=data, augment=plain, train=train)
    source = ArraySource(np.zeros((32, 64, 64, 3), np.uint8), np.zeros(32, np.int64))
    batches = train_batches(source, config, make_mesh(1), BadImages("error"), range(9))
    kept = [next(batches), next(batches)]
    batches.close()
    print(kept[1]["image"].sum())
    try:
        next(train_batches(FileSource(FILES, (0,) * 10), config, make_mesh(1), BadImages("error"), range(9)))
    except InputError as error:
        kept_error = error
"""


def test_a_batch_or_an_error_that_is_kept_to_the_end_leaves_no_shared_memory(files, tmp_path):
    """Python's resource tracker would say so."""
    script = tmp_path / "kept.py"
    script.write_text(KEPT.replace("FILES", repr(files.paths)))
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "0\n")
    assert "resource_tracker" not in ended.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_leave_no_open_files_and_no_folders(workers, files, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(loader, "FEW", 0)
    config, mesh, opened = recipe(4, workers), make_mesh(1), []
    for _ in range(3 if workers else 40):
        list(eval_batches(files, config, mesh, BadImages("skip")))
        stream = train_batches(files, config, mesh, BadImages("skip"), range(9))
        next(stream)
        stream.close()  # as a run that ends early
        opened.append(len(os.listdir("/proc/self/fd")))
    assert min(opened[-2:]) <= max(opened[:2]) + 2  # a batch can be given back a moment later
    assert os.listdir(tmp_path / "temporary") == []


class HoldsALock(ArraySource):
    def __init__(self):
        super().__init__(SOURCE.images, SOURCE.labels)
        object.__setattr__(self, "lock", threading.Lock())


def test_a_dataset_that_worker_processes_cannot_be_given_is_refused_with_the_remedy():
    assert len(next(train_batches(HoldsALock(), recipe(8), make_mesh(1), BadImages("error"), range(1)))["label"]) == 8
    with pytest.raises(InputError, match=r"data.workers 1: .*_thread.lock.* __getstate__, or set data.workers 0"):
        next(train_batches(HoldsALock(), recipe(8, workers=1), make_mesh(1), BadImages("error"), range(1)))


def test_few_images_are_evaluated_without_starting_processes(monkeypatch):
    few, many = [], []
    for found, most in ((few, SIZE), (many, SIZE - 1)):
        monkeypatch.setattr(loader, "FEW", most)
        found += eval_batches(ReadBy(), recipe(16, workers=1), make_mesh(1), BadImages("error"))
    assert {int(i) for b in few for i in b["label"]} == {os.getpid()}
    assert os.getpid() not in {int(i) for b in many for i in b["label"]}
    for name in ("image", "mask"):
        np.testing.assert_array_equal([b[name] for b in few], [b[name] for b in many])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_ends_the_run_by_its_name(files, workers):
    with pytest.raises(InputError, match=r"[47]\.png cannot be decoded \(\w+Error: .*--data.on_bad_image skip"):
        list(train_batches(files, recipe(5, workers), make_mesh(1), BadImages("error"), range(4)))


def test_bad_images_are_skipped_and_listed(files):
    bad = BadImages("skip")
    train = list(train_batches(files, recipe(5), make_mesh(1), bad, range(4)))
    assert not set(images_of(train)) & {4, 7}
    assert {name[-5:] for name in bad.names} == {"4.png", "7.png"}
    bad = BadImages("skip")
    tested = list(eval_batches(files, recipe(4), make_mesh(1), bad))
    assert sum(int(np.asarray(b["mask"]).sum()) for b in tested) == 8
    assert len(bad.names) == 2
    bad = BadImages("skip")
    assert whole_split(files, recipe(5), bad)["label"].tolist() == [0, 1, 2, 3, 5, 6, 8, 9]
    assert len(bad.names) == 2


def test_nothing_but_bad_images_is_an_error(files):
    only = dataclasses.replace(files, paths=files.paths[4:5], labels=(0,))
    with pytest.raises(InputError, match="none of the training images"):
        list(train_batches(only, recipe(1), make_mesh(1), BadImages("skip"), range(1)))


def test_a_split_of_which_nothing_can_be_read_is_named(files):
    check_readable(files, 3, "test")
    only = dataclasses.replace(files, paths=(files.paths[4], files.paths[7]), labels=(0, 1))
    with pytest.raises(
        InputError, match=r"none of the 2 test images can be decoded, such as \S+4.png, \S+7.png \(\w+Error"
    ):
        check_readable(only, 3, "test")


@pytest.mark.parametrize(("label", "classes"), [(5, 5), (-1, 5), (2**40, 5), (1.5, 5), ((0, 2), 2), ((0, 1, 0), 2)])
def test_a_label_that_is_no_class_is_named(label, classes, files):
    labels = [(0,) * classes if isinstance(label, tuple) else 0] * 10
    labels[6] = label
    source = dataclasses.replace(files, labels=tuple(labels))
    expected = f"0 to {classes - 1}" if not isinstance(label, tuple) else f"{classes} numbers that are 0 or 1"
    bad, mesh = BadImages("skip"), make_mesh(1)
    for read in (
        lambda: list(train_batches(source, recipe(5), mesh, bad, range(2), classes=classes)),
        lambda: list(eval_batches(source, recipe(5), mesh, bad, classes=classes)),
        lambda: whole_split(source, recipe(5), bad, classes=classes),
    ):
        with pytest.raises(InputError, match=rf"6\.png has the label .*, expected .*{expected}"):
            read()


def test_labels_of_all_classes_are_taken(files):
    for labels, classes in ((tuple(range(10)), 10), (tuple((i % 2, 1) for i in range(10)), 2)):
        source, bad = dataclasses.replace(files, labels=labels), BadImages("skip")
        assert whole_split(source, recipe(5), bad, classes=classes)["label"].shape[0] == 8
        assert len(list(eval_batches(source, recipe(5), make_mesh(1), bad, classes=classes))) == 2


def test_a_wrong_label_comes_out_of_a_worker_with_its_name():
    source = dataclasses.replace(SOURCE, labels=np.arange(SIZE))
    with pytest.raises(InputError, match=r"example \d+ of the arrays has the label \d+, expected a number from 0 to 4"):
        list(train_batches(source, recipe(8, workers=1), make_mesh(1), BadImages("error"), range(5), classes=5))


def test_real_pictures_of_any_size_become_batches(pictures):
    paths = tuple(str(p) for p in sorted((pictures / "imagenet_samples").glob("*.JPEG"))[:24])
    source = FileSource(paths, tuple(range(24)))
    config = digits(
        augment=AugmentConfig(crop="random_resized", flip="random", eval_crop=0.875),
        train=TrainConfig(batch_size=8, seed=3),
        data=DataConfig(image_size=96, eval_image_size=128, on_device=False),
    )
    batches = list(train_batches(source, config, make_mesh(1), BadImages("error"), range(3)))
    assert all(b["image"].shape == (8, 96, 96, 3) and b["image"].dtype == np.uint8 for b in batches)
    assert len({int(i) for b in batches for i in b["label"]}) == 24
    assert next(eval_batches(source, config, make_mesh(1), BadImages("error")))["image"].shape == (8, 128, 128, 3)


@pytest.mark.parametrize("hosts", [1, 2])
def test_balanced_classes_are_drawn_equally_often_and_copies_follow_each_other(hosts):
    """Labels 0..3 with 30, 10, 5 and 1 images: an epoch of the table is 4 * 30 places, on host and device the same."""
    labels = np.repeat(np.arange(4), (30, 10, 5, 1))
    images = np.broadcast_to(np.arange(46, dtype=np.uint8)[:, None, None, None], (46, 4, 4, 3))
    source = ArraySource(images, labels)
    config = recipe(8, augment=AugmentConfig(crop="none", repeats=2))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sampling="balanced"))
    table = sampling_table(Dataset(source, None, source, ("a", "b", "c", "d")), "balanced")
    ranks = [
        list(train_batches(source, config, make_mesh(1), BadImages("error"), range(30), rank, hosts, table))
        for rank in range(hosts)
    ]
    drawn = np.concatenate([images_of([part]) for step in zip(*ranks, strict=True) for part in step])
    assert np.bincount(labels[drawn]).tolist() == [60] * 4  # 30 steps of 8 are the epoch, each place twice
    np.testing.assert_array_equal(drawn[::2], drawn[1::2])
    assert set(drawn[labels[drawn] == 0].tolist()) == set(range(30))
    data = whole_split(source, config, BadImages("error"), table)
    on_device = [draw_batch(data, np.int32(step), 8, 3, repeats=2)["image"][:, 0, 0, 0] for step in range(30)]
    np.testing.assert_array_equal(np.concatenate(on_device), drawn)


def test_a_class_that_cannot_be_drawn_is_named():
    dataset = Dataset(SOURCE, None, SOURCE, tuple("abcdef"))
    with pytest.raises(InputError, match="f has no training image"):
        sampling_table(dataset, "balanced")
    with pytest.raises(InputError, match="needs one label an image"):
        sampling_table(dataclasses.replace(dataset, multilabel=True), "balanced")
