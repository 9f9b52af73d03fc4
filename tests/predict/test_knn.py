"""Nearest neighbours among features, beside scikit-learn on those that the module gives."""

import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import resnet_jax as rj
from resnet_jax.cli import main
from resnet_jax.data.sources import load_dataset
from resnet_jax.predict.knn import knn

from ..small import save_small_network


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("knn") / "small.safetensors"
    save_small_network(path)
    return str(path)


def test_digits_are_classified_by_their_neighbours(network, capsys):
    assert main(["knn", network, "--data.dataset", "digits", "--k", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, variables = rj.load_pretrained(network, num_classes=0)
    data = load_dataset(rj.Config().data, 0, hold_out=False)
    apply = jax.jit(model.apply)
    known, new = (
        (np.asarray(apply(variables, (part.images / np.float32(255) - 0.5) / 0.5)), part.labels)
        for part in (data.train, data.test)
    )
    expected = KNeighborsClassifier(5, weights="distance", metric="cosine").fit(*known).score(*new)
    assert found["accuracy"] == pytest.approx(expected, abs=2 / 360) and found["accuracy"] > 0.7  # at random 0.1
    assert found == {"accuracy": found["correct"] / 360, "correct": found["correct"], "count": 360, "split": "test",
                     "k": 5, "train_count": 1437, "channels": 64, "skipped_images": []}  # fmt: skip
    assert main(["knn", network, "--data.dataset", "digits", "--split", "validation"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("validation accuracy ") and "of 282 images)" in out
    assert "by the 20 nearest of 1,155 training images, 64 features each" in out


def test_what_is_missing_is_named(network, monkeypatch, capsys):
    assert main(["knn", network]) == 2
    assert "is no run, which would name its data: give --data.dataset" in capsys.readouterr().err
    assert main(["knn", network, "--data.dataset", "digits", "--k", "2000"]) == 2
    assert "--k 2000: there are 1437 training images" in capsys.readouterr().err
    assert main(["knn", network, "--data.dataset", "digits", "--k", "0"]) == 2
    assert "--k and --batch must be at least 1" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn.neighbors", None)
    with pytest.raises(rj.InputError, match=r'knn needs the package sklearn: pip install "residual-jax\[report\]"'):
        knn(network, "digits")


def test_pictures_that_cannot_be_decoded_are_left_out(network, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("test", 3)):
        for name, level in (("dark", 0), ("light", 170)):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = level + rng.integers(0, 80, (9, 12, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "train" / "dark" / "0.png").write_text("no picture")
    flags = ["--data.dataset", f"folder:{tmp_path}", "--batch", "4"]
    assert main(["knn", network, *flags, "--k", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("test accuracy 100.00% (6 of 6 images)\nby the 3 nearest of 9 training images")
    assert "cannot be decoded" in out and "0.png" in out
    assert main(["knn", network, *flags, "--k", "10"]) == 2
    assert "1 images cannot be decoded, such as " in capsys.readouterr().err
