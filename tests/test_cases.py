"""Inputs of users on which this product once failed, each with what is right. One example stands for a kind.

Those of weights (15, 17, 18) are in `weights/test_sources.py`, pixels beside timm's (19) in `data/test_transforms.py`,
no home (23) in `test_cli.py`, a metric of nan (13) and a folder that grows (27) in `training/test_selection.py`.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from resnet_jax.cli import main
from resnet_jax.config import DataConfig, InputError
from resnet_jax.data.dataset import labels_of
from resnet_jax.data.sources import load_dataset
from resnet_jax.predict.predictor import find_files
from resnet_jax.runs.trackers import read_lines

QUICK = [
    "--model.name", "cifar_resnet8", "--parallel.devices", "1", "--train.batch_size", "4", "--train.steps", "3",
    "--schedule.warmup_epochs", "0", "--log.no_tensorboard", "--data.image_size", "16", "--augment.crop", "none",
]  # fmt: skip


def picture(path, seed, size=16, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    with open(path, "wb") as file:
        Image.fromarray(pixels).save(file, options.pop("form", "PNG"), **options)


def folders(root, layout):
    """`layout`: {"train/cat": 3, ...} makes so many pictures there."""
    for k, (folder, count) in enumerate(layout.items()):
        for i in range(count):
            picture(root / folder / f"{i:02d}.png", 100 * k + i)
    return root


def load(root, **options):
    return load_dataset(DataConfig(dataset=f"folder:{root}", image_size=16), 0, **options)


@pytest.mark.parametrize(
    "names", [("Training", "Test"), ("training", "testing"), ("Train", "Val"), ("training_set", "test_set")]
)
def test_01_folders_named_as_splits_are_splits(names, tmp_path):
    dataset = load(folders(tmp_path, {f"{split}/{kind}": 20 for split in names for kind in ("apple", "pear")}))
    assert dataset.class_names == ("apple", "pear")
    place = "validation" if names[1] == "Val" else "test"
    assert len(dataset.split(place)) == 40 and all(f"/{names[1]}/" in path for path in dataset.split(place).paths)


@pytest.mark.parametrize("name", ["valid", "dev", "validation", "val"])
def test_02_validation_is_read_and_test_is_test(name, tmp_path):
    layout = {f"{split}/{kind}": n for split, n in (("train", 6), (name, 4), ("test", 3)) for kind in ("cat", "dog")}
    dataset = load(folders(tmp_path, layout))
    assert {split: len(source) for split, source in dataset.splits().items()} == {
        "train": 12,
        "validation": 8,
        "test": 6,
    }


def test_04_what_systems_and_editors_leave_is_left_out_and_counted(tmp_path):
    root = folders(tmp_path, {"cat": 10, "dog": 10})
    for litter in (
        ".ipynb_checkpoints/0-checkpoint.png", "cat/.ipynb_checkpoints/1-checkpoint.png", "cat/._0.png",
        "__MACOSX/cat/._0.png", "dog/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "dog/Thumbs.db", ".DS_Store", ".git/x.png",
        "cat/deep/.hidden/x.png",
    ):  # fmt: skip
        picture(root / litter, 1)
    (root / "lost+found").mkdir()
    dataset = load(root)
    assert dataset.class_names == ("cat", "dog") and len(dataset.train) + len(dataset.validation) == 20
    (note,) = [note for note in dataset.notes if note.startswith("left out: ")]
    assert note.startswith("left out: 10 files or folders: .DS_Store (hidden), .git (hidden)")
    assert len(list(find_files([str(root)]))) == 20


def test_05_links_are_followed_dead_ones_are_named_and_circles_end(tmp_path):
    store = folders(tmp_path / "store", {"cat": 10, "dog": 10})
    root = folders(tmp_path / "data", {"cat": 3, "dog": 3})
    for kind in ("cat", "dog"):
        (root / kind / "more").symlink_to(store / kind)
    (root / "owl").symlink_to(store / "cat")
    (root / "cat" / "gone.png").symlink_to(store / "nothing.png")
    (root / "cat" / "itself").symlink_to(root / "cat" / "itself")
    (root / "dog" / "up").symlink_to(root)
    dataset = load(root)
    assert dataset.class_names == ("cat", "dog", "owl")
    found = {name: sum(key.startswith(f"{name}/") for s in dataset.splits().values() for key in s.keys)
             for name in ("cat", "owl")}  # fmt: skip
    assert found == {"cat": 13, "owl": 10}
    assert all(path.exists() for path in map(Path, dataset.train.paths))
    notes = "\n".join(dataset.notes)
    assert "cat/gone.png (a link whose target is gone)" in notes
    assert "dog/up (a link that leads back to a folder above it)" in notes


def test_06_every_suffix_that_pillow_decodes_is_taken_and_the_rest_is_said(tmp_path):
    root = folders(tmp_path, {"cat": 1, "dog": 20})
    forms = {"a.JPG": "JPEG", "c.jfif": "JPEG", "d.jpe": "JPEG", "f.webp": "WEBP", "h.GIF": "GIF", "i.tiff": "TIFF"}
    forms |= {"j.avif": "AVIF"} if features.check("avif") else {}
    forms |= {"k.jp2": "JPEG2000"} if features.check("jpg_2000") else {}
    for name, form in forms.items():
        picture(root / "cat" / name, 1, form=form)
    picture(root / "cat" / "l.heic", 1)
    picture(root / "cat" / "none", 1)
    dataset = load(root)
    taken = {Path(key).name for split in dataset.splits().values() for key in split.keys if key.startswith("cat/")}
    assert taken == {"00.png", *forms}
    assert "2 files or folders: cat/l.heic (not a picture's suffix: .heic), cat/none (" in dataset.notes[1]


def test_08_metadata_never_costs_pixels(tmp_path):
    root = folders(tmp_path, {"cat": 4, "dog": 4})
    picture(root / "cat" / "odd.png", 1, exif=b"Exif\0\0\x00\x08\x00\x02\x01\x12\x00\x03\0\0\0\1")
    flags = ["--data.dataset", f"folder:{root}", "--data.validation_fraction", "0.5", "--log.no_report"]
    assert main(["train", *QUICK, *flags, "--workdir", str(tmp_path / "run")]) == 0


ONE_AFTER_ANOTHER = """
import json
import sys

from resnet_jax import cli

for line in json.loads(sys.argv[1]):
    try:
        cli.run(line)
    except SystemExit as end:
        print(end="\\0", flush=True)
        print("ends with", end.code, file=sys.stderr)
"""


def test_09_names_that_are_not_utf8(tmp_path):
    """A name in Latin-1, with blanks and quotes, trains, predicts in every format, and appears in the report."""
    root = tmp_path / "the data"
    for i in range(12):
        picture(root / "tea" / f"t{i}.png", i)
        picture(Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9/caf\xe9 %d's.png" % i)), 50 + i)
    run, one = tmp_path / "run with blanks", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "XLA_FLAGS": one}
    train = ["train", *QUICK, "--data.dataset", f"folder:{root}", "--workdir", str(run)]
    lines = [train, *(["predict", str(run), str(root), "--format", form] for form in ("table", "csv", "json"))]
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(lines)]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert done.stderr.count(b"ends with 0\n") == 4 and b"Traceback" not in done.stderr, done.stderr
    trained, *predicted = done.stdout.split(b"\0")[:4]
    assert f"resnet-jax evaluate '{run}'".encode() in trained and b"WARNING" not in trained
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "caf\N{REPLACEMENT CHARACTER}" in page
    assert all(out.count(b"caf\xe9 3's.png") >= 1 for out in predicted[:2])
    rows = [json.loads(line) for line in predicted[2].splitlines()]
    assert len(rows) == 24 and all(os.path.exists(row["path"]) for row in rows)
    (run / "summary.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("classes", [5, 12])
def test_10_outputs_below_the_classes_are_refused_and_above_them_work(classes, tmp_path, capsys):
    flags = ["--model.num_classes", str(classes), "--train.class_weights", "balanced", "--data.image_size", "8"]
    status = main(["train", *QUICK, *flags, "--train.batch_size", "32", "--workdir", str(tmp_path / "run")])
    if classes == 5:
        assert status == 2 and "model.num_classes 5 is below the 10 classes" in capsys.readouterr().err
        return
    assert status == 0 and (tmp_path / "run" / "report.html").exists()
    assert main(["evaluate", str(tmp_path / "run"), "--per-class"]) == 0
    assert "class 11" in capsys.readouterr().out
    picture(tmp_path / "x.png", 1, size=8)
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "x.png"), "--top", "12"]) == 0
    assert "class 11" in capsys.readouterr().out


def test_11_splits_of_tensorflow_datasets(tmp_path):
    """A test split without labels, as imagenet2012 has it, a set of one split, and labels without names."""
    import tensorflow_datasets as tfds

    def rows(count, unlabelled=False):
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full((16, 16, 3), 200 * (i % 2) + 20, np.uint8)).save(file, "JPEG")
            yield i, {"image": file.getvalue(), "label": -1 if unlabelled else i % 2}

    class LikeImagenet(tfds.core.GeneratorBasedBuilder):
        """Labels of -1 in the test split."""

        VERSION = tfds.core.Version("1.0.0")
        LABEL = tfds.features.ClassLabel(names=["a", "b"])
        SPLITS = (("train", 20, False), ("validation", 6, False), ("test", 8, True))

        def _info(self):
            parts = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": self.LABEL})
            return tfds.core.DatasetInfo(builder=self, features=parts)

        def _split_generators(self, _):
            return {name: rows(count, unlabelled) for name, count, unlabelled in self.SPLITS}

        def _generate_examples(self): ...

    class OnlyTrain(LikeImagenet):
        """One split."""

        SPLITS = (("train", 20, False),)

    class PlainInt(LikeImagenet):
        """Labels without names."""

        LABEL = np.int64
        SPLITS = (("train", 20, False), ("test", 6, False))

    class Broken(LikeImagenet):
        """An unlabelled picture among those to train on."""

        SPLITS = (("train", 20, False), ("validation", 5, True))

    def splits(spec, **options):
        config = DataConfig(dataset=f"tfds:{spec}", data_dir=str(tmp_path), image_size=16)
        dataset = load_dataset(config, 0, **options)
        return dataset, {name: len(source) for name, source in dataset.splits().items()}

    dataset, sizes = splits("like_imagenet")
    assert sizes == {"train": 20, "validation": 6} and set(labels_of(dataset.validation)) == {0, 1}
    assert "the split test of tfds:like_imagenet, which has no labels" in dataset.notes[1]
    assert splits("like_imagenet:train[:50%]")[1] == {"train": 10, "validation": 6}
    assert splits("like_imagenet:1.0.0")[1] == {"train": 20, "validation": 6}
    for spec, count in (("only_train", 20), ("only_train:train[:50%]", 10), ("only_train:train[:15]", 15)):
        sizes = splits(spec)[1]
        assert set(sizes) == {"train", "validation"} and sum(sizes.values()) == count
    assert splits("plain_int", hold_out=False)[0].class_names == ("0", "1")
    assert splits("broken")[0].validation is not None and "validation of tfds:broken" in splits("broken")[0].notes[1]
    with pytest.raises(InputError, match="no split 'nosuch'; there are train"):
        splits("only_train:nosuch")


def test_12_an_evaluation_split_of_bad_pictures_is_found_before_training(tmp_path, capsys):
    root = folders(tmp_path, {"train/a": 8, "train/b": 8})
    for kind in "ab":
        for i in range(2):
            (root / "test" / kind).mkdir(parents=True, exist_ok=True)
            (root / "test" / kind / f"{i}.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    flags = ["--data.dataset", f"folder:{root}", "--data.on_bad_image", "skip", "--train.metric", "none"]
    assert main(["train", *QUICK, *flags, "--workdir", str(tmp_path / "run")]) == 2
    assert "test" in capsys.readouterr().err and not read_lines(tmp_path / "run" / "metrics.jsonl")


def test_14_one_value_a_channel_is_a_warning(tmp_path, capsys):
    flags = ["--data.dataset", "synthetic", "--data.synthetic_size", "8", "--data.synthetic_classes", "2"]
    flags += ["--data.image_size", "4", "--train.batch_size", "1", "--train.steps", "2", "--log.no_report"]
    assert main(["train", *QUICK, *flags, "--workdir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr()
    assert "WARNING" in out.out + out.err and "one value" in out.out + out.err


@pytest.mark.parametrize("path", ["az://my-bucket/run1", "s3://bucket/run"])
def test_22_what_is_remote_and_no_bucket_of_google_is_refused_with_words(path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (
        ["train", *QUICK, "--workdir", path], ["predict", path, "x.png"], ["evaluate", path],
        ["train", *QUICK, "--data.dataset", f"folder:{path}", "--workdir", "q"], ["report", path], ["runs", path],
    ):  # fmt: skip
        assert main(command) == 2
        assert path.split("/")[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGUSR1, 1), (signal.SIGHUP, 0)])
def test_24_the_warnings_of_a_scheduler_and_a_lost_terminal_save(number, workers, tmp_path):
    """Which go to all processes of a run, its workers too."""
    command = [sys.executable, "-m", "resnet_jax.cli", "train", *QUICK, "--workdir", str(tmp_path / "run")]
    command += ["--train.steps", "100000", "--train.eval_every_epochs", "1e6", "--data.image_size", "8"]
    command += ["--log.no_report"]
    command += ["--data.no_on_device", "--data.workers", str(workers)] if workers else []
    with (tmp_path / "err").open("w+") as err:
        pipes = {"stdout": subprocess.PIPE, "stderr": err, "text": True, "start_new_session": True}
        process = subprocess.Popen(command, env=os.environ | {"GLIBC_TUNABLES": ""}, **pipes)
        lines = []
        with process.stdout as out:
            for line in out:
                if line.startswith("step") and not any(before.startswith("step") for before in lines):
                    os.killpg(process.pid, number)
                lines.append(line)
        assert process.wait(60) == 0, (tmp_path / "err").read_text()
    assert f"stopped by {number.name}" in "".join(lines), (lines, (tmp_path / "err").read_text()[:2000])


def test_30_a_narrow_picture_costs_what_its_output_costs(tmp_path):
    import tracemalloc

    file = io.BytesIO()
    Image.fromarray(np.zeros((20_000, 1, 3), np.uint8)).save(file, "PNG")
    from resnet_jax.data.transforms import fit

    tracemalloc.start()
    began = time.monotonic()
    assert fit(file.getvalue(), 224, 0.95, "bicubic").shape == (224, 224, 3)
    assert time.monotonic() - began < 30 and tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_predictions_name_every_picture_that_was_given(tmp_path):
    """What is left out when a folder is listed is not what was asked for by name."""
    picture(tmp_path / ".hidden.png", 1)
    assert [path.name for path in find_files([str(tmp_path / ".hidden.png")])] == [".hidden.png"]
    with pytest.raises(InputError, match="no such file"):
        list(find_files([str(tmp_path)]))
