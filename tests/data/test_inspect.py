"""Data on trial: what is planted into digits and into small pictures is found, and nothing else."""

import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from resnet_jax.cli import main
from resnet_jax.config import DataConfig, InputError, TrainConfig
from resnet_jax.data.dataset import ArraySource, Dataset
from resnet_jax.data.inspect import (
    Pair,
    confident_learning,
    far_out,
    grey_of,
    groups_of,
    hashes_of,
    mirrored_hash,
    near_pairs,
    neighbours,
    perceptual_hash,
    two_in_one,
    unit_rows,
    unlike_others,
)
from resnet_jax.data.sources import load_dataset
from resnet_jax.predict import inspect_data as inspecting
from resnet_jax.predict import inspect_page
from resnet_jax.predict.inspect_data import folds_of, inspect_data, out_of_fold, patch_features, read_pictures
from resnet_jax.runs.report_page import read_inspection

from ..browser import Tags, needed_width, needs_chromium
from ..conftest import ROOT
from ..small import digits, save_small_network


def scenes(count, side=32, seed=0):
    """Pictures of soft blots of colour, none like another, uint8 [count, side, side, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 10, 10, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BICUBIC)) for p in coarse])


def recompressed(pixels, quality=40):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def cropped(pixels, by=2):
    side = len(pixels)
    inside = Image.fromarray(pixels[by:-by, by:-by])
    return np.asarray(inside.resize((side, side), Image.Resampling.BILINEAR))


WAYS = {
    "as it is": lambda p: p,
    "mirrored": lambda p: p[:, ::-1],
    "recompressed": recompressed,
    "cropped": cropped,
    "brighter": lambda p: (p * 0.8 + 40).astype(np.uint8),
    "all": lambda p: recompressed(cropped(p[:, ::-1])),
}


def test_a_hash_is_that_of_the_picture_and_mirrors_with_it():
    pixels = scenes(40)
    whole = perceptual_hash(grey_of(pixels))
    apart = (whole[:, None] ^ whole[None]).sum(-1)[~np.eye(40, dtype=bool)]
    assert whole.shape == (40, 63) and apart.min() > 10 and 28 < apart.mean() < 35
    assert (mirrored_hash(whole) == perceptual_hash(grey_of(pixels[:, :, ::-1]))).mean() > 0.999
    for name in ("recompressed", "brighter"):
        other = perceptual_hash(grey_of(np.stack([WAYS[name](p) for p in pixels])))
        assert (whole ^ other).sum(1).max() <= 6, name
    inner = hashes_of(grey_of(pixels))[1]
    small = perceptual_hash(grey_of(np.stack([cropped(p) for p in pixels])))
    assert (inner ^ small).sum(1).mean() < 2 < (whole ^ small).sum(1).mean()


def test_twins_are_found_however_they_are_made_and_no_others():
    pixels = scenes(120)
    copies = np.stack([way(pixels[10 + k]) for k, way in enumerate(WAYS.values())])
    found = near_pairs(np.concatenate([pixels, copies]))
    assert {(p.first, p.second) for p in found} == {(10 + k, 120 + k) for k in range(len(WAYS))}
    by_copy = {list(WAYS)[pair.second - 120]: pair for pair in found}
    assert [name for name, pair in by_copy.items() if pair.mirrored] == [n for n in by_copy if n in ("mirrored", "all")]
    assert by_copy["as it is"].likeness == 1.0 and by_copy["as it is"].bits == 0
    assert all(0.8 <= pair.likeness <= 1.0 and pair.bits <= 10 for pair in found)


def test_pictures_of_one_colour_are_twins_only_where_they_are_equal():
    pixels = np.concatenate([np.full((2, 32, 32, 3), 30, np.uint8), np.full((1, 32, 32, 3), 200, np.uint8), scenes(20)])
    assert [(p.first, p.second, p.likeness) for p in near_pairs(pixels)] == [(0, 1, 1.0)]


def test_features_add_candidates_that_the_hash_does_not_see():
    pixels = scenes(60)
    far = pixels[7].copy()
    far[:8] = 255 - far[:8]  # a quarter of it is another picture
    pixels = np.concatenate([pixels, far[None]])
    features = np.random.default_rng(0).standard_normal((61, 16)).astype(np.float32)
    features[60] = features[7]
    assert not near_pairs(pixels, least=0.5)
    (pair,) = near_pairs(pixels, features, least=0.5)
    assert (pair.first, pair.second) == (7, 60) and pair.cosine == pytest.approx(1.0, abs=1e-3)


def test_pictures_that_are_all_alike_are_twins_only_where_they_are_very_alike():
    """Two handwritten ones resemble each other more than two photographs of one thing."""
    data = load_dataset(DataConfig(dataset="digits", validation_fraction=0.0), 0)
    pixels = np.concatenate([data.train.images[:400], data.test.images[:100], data.train.images[[5, 6], :, ::-1]])
    found = {(pair.first, pair.second) for pair in near_pairs(pixels)}
    assert found >= {(5, 500), (6, 501)} and len(found) <= 6


def test_twins_form_groups_that_stay_in_one_fold():
    pairs = [Pair(1, 4, 1.0, False, 0, 1.0), Pair(4, 6, 1.0, False, 0, 1.0), Pair(2, 3, 1.0, False, 0, 1.0)]
    groups = groups_of(8, pairs)
    assert groups.tolist() == [0, 1, 2, 2, 1, 5, 1, 7]
    labels = np.repeat([0, 1], 50)
    groups = np.arange(100)
    groups[[10, 30, 60]] = 10
    fold = folds_of(labels, groups, 5)
    assert len(set(fold[[10, 30, 60]].tolist())) == 1
    counts = np.stack([np.bincount(fold[labels == k], minlength=5) for k in (0, 1)])
    assert counts.min() >= 8 and counts.max() <= 12
    assert (fold == folds_of(labels, groups, 5)).all() and (fold != folds_of(labels, groups, 5, seed=1)).any()


def test_confident_learning_counts_as_worked_out_on_paper():
    """Thresholds are 0.6 and 0.55; the third picture reaches both, and the likelier counts; the last reaches none."""
    p = np.asarray([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.62, 0.38], [0.53, 0.47]])
    labels = np.asarray([0, 0, 0, 1, 1, 1])
    found = confident_learning(p, labels)
    assert found.thresholds == pytest.approx([0.6, 0.55])
    assert found.confident.tolist() == [[2, 1], [1, 1]]
    assert found.joint == pytest.approx(np.asarray([[2 / 6, 1 / 6], [1 / 4, 1 / 4]]))
    assert found.suspects.tolist() == [2, 4] and found.suggested.tolist() == [1, 0]


def test_a_class_without_pictures_or_without_counts_is_no_error():
    p = np.asarray([[0.5, 0.5, 0.0], [0.6, 0.4, 0.0], [0.7, 0.3, 0.0]])
    found = confident_learning(p, np.asarray([0, 0, 1]))
    assert np.isinf(found.thresholds[2]) and found.joint.sum() == pytest.approx(1) and (found.joint[2] == 0).all()


def test_the_confident_joint_is_the_confusion_of_those_that_count():
    from sklearn.metrics import confusion_matrix

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 300)
    p = rng.dirichlet(np.ones(5), 300) * 0.5 + 0.5 * np.eye(5)[np.where(rng.random(300) < 0.8, labels, 0)]
    found = confident_learning(p, labels)
    reaches = p >= np.asarray([p[labels == k, k].mean() for k in range(5)])
    counted = reaches.any(1)
    likely = np.where(reaches, p, 0).argmax(1)
    assert (found.confident == confusion_matrix(labels[counted], likely[counted], labels=range(5))).all()
    assert set(found.suspects.tolist()) == set(np.flatnonzero(counted & (likely != labels)).tolist())
    own = p[found.suspects, labels[found.suspects]]
    assert (np.diff(own) >= 0).all()


def test_nearest_neighbours_and_what_is_far_from_them():
    from sklearn.neighbors import NearestNeighbors

    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, 12)).astype(np.float32)
    features[:, 0] *= 8
    unit = unit_rows(features)
    index, cosine = neighbours(unit, 4)
    distance, expected = NearestNeighbors(n_neighbors=5, metric="cosine").fit(unit).kneighbors(unit)
    assert (index == expected[:, 1:]).all() and cosine == pytest.approx(1 - distance[:, 1:], abs=1e-5)
    values = np.concatenate([rng.normal(1, 0.1, 100), [3.0, 2.5]])
    assert far_out(values).tolist() == [100, 101]


def test_a_picture_of_something_else_is_unlike_the_others():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, 20)) * 5
    features = np.repeat(centres, 40, 0) + rng.standard_normal((160, 20))
    features = np.concatenate([features, 7 * rng.standard_normal((1, 20))])
    distance = unlike_others(unit_rows(features), 5)
    assert distance.argmax() == 160 and far_out(distance)[0] == 160 and np.median(distance) == pytest.approx(1)


def test_two_clouds_are_told_from_one():
    rng = np.random.default_rng(0)
    one = rng.standard_normal((400, 20)) * np.linspace(2, 1, 20)
    two = one + np.where(np.arange(400) % 3 == 0, 12, 0)[:, None] * np.eye(20)[3]
    share, _, _ = two_in_one(one)
    assert 0.5 < share < 0.72  # 2 / pi for a normal distribution
    share, smaller, side = two_in_one(two)
    assert share > 0.85 and smaller == pytest.approx(134 / 400, abs=0.01)
    assert (side == (np.arange(400) % 3 == 0)).mean() > 0.99
    assert two_in_one(np.zeros((10, 3)))[:2] == (0.0, 0.0)


@pytest.fixture(scope="module")
def digit_pictures():
    """600 digits, with patch features."""
    data = load_dataset(DataConfig(dataset="digits", validation_fraction=0.0), 0)
    images, labels = data.train.images[:600], data.train.labels[:600]
    return images, labels, patch_features(images, 100)


def test_features_do_not_depend_on_labels_and_are_the_same_each_time(digit_pictures):
    images, _, features = digit_pictures
    assert features.shape == (600, 800) and features.dtype == np.float32 and np.isfinite(features).all()
    assert (patch_features(images, 100) == features).all()


def test_flipped_digits_are_found_by_what_did_not_see_their_labels(digit_pictures):
    _, labels, features = digit_pictures
    rng = np.random.default_rng(0)
    flipped = rng.permutation(600)[:30]
    given = labels.copy()
    given[flipped] = (given[flipped] + rng.integers(1, 10, 30)) % 10
    p = out_of_fold(features, given, 10, 5, np.arange(600))
    assert p.shape == (600, 10) and p.sum(1) == pytest.approx(np.ones(600)) and (p.argmax(1) == labels).mean() > 0.93
    found = confident_learning(p, given)
    first = found.suspects[:30]
    assert np.isin(first, flipped).mean() > 0.85
    right = np.isin(first, flipped)
    assert (found.suggested[:30][right] == labels[first[right]]).mean() > 0.95


def test_the_probe_is_the_same_with_and_without_a_kernel_where_labels_are_easy(digit_pictures, monkeypatch):
    _, labels, features = digit_pictures
    by_kernel = out_of_fold(features, labels, 10, 5, np.arange(600))
    monkeypatch.setattr(inspecting, "MOST_BY_KERNEL", 0)
    linear = out_of_fold(features, labels, 10, 5, np.arange(600))
    assert (by_kernel != linear).any() and (by_kernel.argmax(1) == linear.argmax(1)).mean() > 0.95


def test_a_class_of_two_digits_is_taken_for_two(digit_pictures):
    _, labels, features = digit_pictures
    space = unit_rows(inspecting.principal(features, 32))
    joined = np.where(labels == 1, 0, labels)
    rows = inspecting.classes_of_two(space, joined, 10)
    assert rows[0].label == 0 and rows[0].found and rows[0].share > 0.85
    halves = np.split(labels[rows[0].members], [rows[0].sizes[0]])
    assert all(np.bincount(half, minlength=2).max() / len(half) > 0.9 for half in halves)
    assert rows[0].share > rows[1].share


def test_small_pictures_keep_their_size_and_broken_ones_are_named():
    images = scenes(5, side=12)
    data = {"train": ArraySource(images, np.zeros(5, np.int32)), "test": Broken(images)}
    found = read_pictures(data, 2, 3, 100)
    assert found.pixels.shape == (8, 12, 12, 3) and found.undecodable == ("example 1", "example 3")
    assert found.index.tolist() == [0, 1, 2, 3, 4, 0, 2, 4] and found.split.tolist() == [0] * 5 + [1] * 3
    few = read_pictures(data, 2, 3, 4, seed=1)
    assert len(few) + len(few.undecodable) == 4
    with pytest.raises(InputError, match="0 of 1 pictures can be decoded"):
        read_pictures({"train": ArraySource(np.zeros((1, 0, 4, 3), np.uint8), np.zeros(1, np.int32))}, 2, 3, 9)


class Broken:
    """Every second picture is none."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return (b"none" if index % 2 else self.images[index]), 1

    def describe(self, index):
        return f"example {index}"

    key = describe


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """A folder of two classes of pictures with twins, a wrong label and a broken file."""
    root = tmp_path_factory.mktemp("trial")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 12)):
        for k, name in enumerate(("rough", "smooth")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i, pixels in enumerate(scenes(count, 24, seed=[k, count])):
                noise = rng.integers(-90, 90, pixels.shape) * (k == 0)
                Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{i:02d}.png")
    picture = Image.open(root / "train" / "smooth" / "03.png")
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / "test" / "smooth" / "twin.jpg", quality=60)
    picture = Image.open(root / "train" / "smooth" / "05.png")
    picture.save(root / "train" / "rough" / "copy.png")
    (root / "train" / "rough" / "11.png").rename(root / "train" / "smooth" / "wrong.png")
    (root / "test" / "rough" / "00.png").write_text("no picture")
    return root


def test_the_command_writes_a_page_and_a_table_to_act_on(trial, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["inspect", "--data.dataset", f"folder:{trial}", "--out", str(out), "--folds", "4"]) == 0
    printed = capsys.readouterr().out
    assert re.match(r"the probe agrees with \d+\.\d% of the labels: ", printed)
    assert "twins across splits" in printed and f"{out / 'inspect.html'} and {out / 'inspect.csv'}" in printed
    assert "left out, since they cannot be decoded: " in printed and "00.png" in printed
    rows = list(csv.DictReader((out / "inspect.csv").read_text().splitlines()))
    assert tuple(rows[0]) == inspect_page.COLUMNS
    (across,) = [row for row in rows if row["finding"] == "twins across splits"]
    assert across["picture"] == str(trial / "train" / "smooth" / "03.png") and across["split"] == "train"
    assert across["other_picture"] == str(trial / "test" / "smooth" / "twin.jpg") and across["suggested"] == "remove"
    (inside,) = [row for row in rows if row["finding"] == "twins in a split"]
    assert {inside["label"], inside["other_label"]} == {"rough", "smooth"}
    assert inside["suggested"] == "check both labels, remove one"
    doubtful = [row for row in rows if row["finding"] == "doubtful label"]
    assert {row["picture"].rpartition("/")[2] for row in doubtful} >= {"wrong.png"}
    (wrong,) = [row for row in doubtful if row["picture"].endswith("wrong.png")]
    assert (wrong["label"], wrong["suggested"], wrong["split"]) == ("smooth", "rough", "train")
    assert 0.5 < float(wrong["score"]) <= 1
    record = read_inspection(out)
    counts = {line["name"]: line["count"] for line in record["findings"]}
    assert counts["twins across splits"] == counts["twins in a split"] == counts["twins with different labels"] == 1
    assert record["pictures"] == 105 and record["undecodable"] == 1 and record["agreement"] > 0.8


def test_the_page_needs_nothing_else_and_escapes_names(trial, tmp_path):
    found = inspect_data(f"folder:{trial}", kernels=50)
    found = dataclasses.replace(found, class_names=('<b onclick="x">&', "smooth"))
    text = inspect_page.write_inspection(found, tmp_path).read_text()
    tags = Tags()
    tags.feed(text)
    assert "onclick=" not in text.replace("&lt;b onclick=&#34;x&#34;&gt;&amp;", "") and "http" not in text
    assert not re.search(r'(src|href)="(?!data:|inspect\.csv)', text) and "prefers-color-scheme: dark" in text
    assert tags.rows["counts"] == 7 and tags.count["img"] >= 5
    assert "1 of the pictures that are measured on are in another split too." in text


@needs_chromium
def test_the_page_fits_a_telephone(trial, tmp_path):
    page = inspect_page.write_inspection(inspect_data(f"folder:{trial}", kernels=50), tmp_path)
    assert needed_width(page, tmp_path, 390) <= 390


def test_a_network_gives_the_features_and_a_run_its_data(tmp_path, capsys):
    network = tmp_path / "small.safetensors"
    save_small_network(network)
    flags = ["--data.dataset", "digits", "--pictures", "300", "--out", str(tmp_path / "out"), "--json"]
    assert main(["inspect", str(network), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["features"] == f"{network}, before its head" and found["pictures"] == 300
    assert found["agreement"] > 0.6  # at random 0.1: the network is not trained
    assert "300 of 1,797 pictures were drawn at random and looked at" in (tmp_path / "out" / "inspect.html").read_text()


def test_a_run_that_has_learnt_the_labels_does_not_judge_them(tmp_path, capsys):
    from resnet_jax.training.loop import train

    base = digits()
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, name="cifar_resnet8"),
        train=TrainConfig(steps=2, batch_size=16, ema_decay=None),
        log=dataclasses.replace(base.log, tensorboard=False, report=False),
    )
    run = tmp_path / "run"
    train(config, run)
    assert main(["inspect", str(run), "--pictures", "200"]) == 0
    assert f"{run / 'inspect.html'} and {run / 'inspect.csv'}" in capsys.readouterr().out
    text = (run / "inspect.html").read_text()
    assert "the network was trained on these pictures and their labels" in text and "validation" in text
    assert main(["report", str(run)]) == 0
    report = (run / "report.html").read_text()
    tags = Tags()
    tags.feed(report)
    assert "Data on trial" in report and 'href="inspect.html"' in report and tags.rows["inspection"] == 6


def test_data_without_one_class_each_is_looked_at_for_the_rest(tmp_path, monkeypatch):
    pixels = scenes(30)
    source = ArraySource(np.concatenate([pixels, pixels[:1]]), np.eye(31, 3, dtype=np.int32), "arrays")
    data = Dataset(source, None, None, ("a", "b", "c"), multilabel=True, notes=("data: arrays",))
    monkeypatch.setattr(inspecting, "load_dataset", lambda *args, **kwargs: data)
    found = inspect_data("arrays", kernels=20)
    assert found.likely is None and found.doubtful is None and found.two == ()
    assert [(pair.first, pair.second) for pair in found.pairs] == [(0, 30)]
    page = inspect_page.write_inspection(found, tmp_path).read_text()
    assert "labels are not judged: there is not one class for each picture" in page and "Doubtful labels" not in page
    assert '<p class="verdict">1 doubt on 31 pictures.</p>' in page


def test_what_is_wrong_is_said_in_words(tmp_path, capsys):
    def error(*words):
        assert main(["inspect", *words]) == 2
        return capsys.readouterr().err

    assert "give the data, such as --data.dataset folder:PATH, or a run, which names its own" in error()
    assert "--folds and --pictures must be at least 2" in error("--data.dataset", "digits", "--folds", "1")
    (tmp_path / "file").write_text("")
    assert "is a file: name a folder" in error("--data.dataset", "digits", "--out", str(tmp_path / "file"))
    assert "there is no such folder" in error("--data.dataset", f"folder:{tmp_path / 'none'}")
    assert "there is no such" in error(str(tmp_path / "none.safetensors"), "--data.dataset", "digits")
    (tmp_path / "my pictures").mkdir()
    wanted = f"if it holds pictures, give them as --data.dataset 'folder:{tmp_path / 'my pictures'}'"
    assert wanted in error(str(tmp_path / "my pictures"))


def test_the_page_for_readers_names_every_column():
    text = (ROOT / "docs" / "inspect.md").read_text()
    assert [name for name in inspect_page.COLUMNS if f"`{name}`" not in text] == []


def test_what_is_no_record_of_an_inspection_is_left_out(tmp_path):
    assert read_inspection(tmp_path) is None
    (tmp_path / "inspect.json").write_text("[1]")
    assert read_inspection(tmp_path) is None
