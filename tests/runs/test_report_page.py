"""The page's template, with values as `make_report` gives them."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from resnet_jax.config import Config, DataConfig
from resnet_jax.data.dataset import FileSource
from resnet_jax.runs import report_page
from resnet_jax.runs.report_page import caption_of, confusion_of, key_figures, page_template, title_of, verdict, worst
from resnet_jax.training.evaluation import Predictions

from ..browser import Tags, needed_width, needs_chromium

PAGE = Path(report_page.__file__).with_name("report_page.html")
NAME = '<b onclick="x">&'
ROW = {"name": NAME, "precision": 0.5, "recall": None, "f1": 0.25, "support": 1234, "auc": None, "interval": None}
PLAIN = {
    "title": NAME, "folder": NAME, "step": 7, "averaged": False, "images": {"train": 9, "test": 3},
    "number_of_classes": 2, "split": "test", "chosen_by": None, "verdict": NAME,
    "figures": [{"name": NAME, "value": "50.0 %", "note": NAME, "interval": (0.2, 0.8)}],
    "curves": {"Loss": "<svg></svg>", "Accuracy": ""}, "classes": [ROW, ROW], "calibrated": "", "reliability_chart": "",
    "reliability": [{"confidence": 0.5, "accuracy": 0.4, "count": 2, "interval": None}], "mistakes": [],
    "run": {NAME: NAME}, "undecodable": [], "own": NAME, "recipe": NAME,
}  # fmt: skip


def page(measures, names, **values):
    text = page_template(PAGE).render(PLAIN | {"class_names": names} | confusion_of(measures, names) | values)
    found = Tags()
    found.feed(text)
    assert "onclick=" not in text.replace("&lt;b onclick=&#34;x&#34;&gt;&amp;", "") and "http" not in text
    return text, found


def test_few_classes_have_a_matrix_and_many_a_list_of_confusions():
    few, many = np.asarray([[3, 1], [0, 4]]), np.diag(np.full(41, 5))
    many[[1, 7], [40, 2]] = 3, 2
    text, found = page({"confusion": few.tolist()}, (NAME, "b"))
    assert found.rows["confusion"] == 3 and found.count["svg"] == 1 and text.count("class=right") == 2
    assert "true \\ predicted" in text and "1,234" in text and "There are none." in text
    text, found = page({"confusion": many.tolist()}, tuple(f"class {i}" for i in range(41)))
    rows = text[text.index("predicted class") :].split("<tr>")[1:3]
    assert found.rows["confusion"] == 3
    assert ["class 1<" in rows[0], "class 40<" in rows[0], "class 7<" in rows[1], "class 2<" in rows[1]] == [True] * 4


def test_images_with_several_labels_have_no_confusion():
    _, found = page({}, ("a", "b"))
    assert "confusion" not in found.rows and found.rows["reliability"] == 2


@pytest.mark.parametrize("heat", [None, "data:image/jpeg;base64,xx"])
def test_mistakes_are_shown_with_and_without_what_raised_their_score(heat):
    mistake = {"image": "data:image/jpeg;base64,yy", "heat": heat, "predicted": NAME, "confidence": 0.9, "truth": NAME}
    mistake["no_evidence"] = heat is not None
    text, found = page({}, ("a", "b"), mistakes=[mistake | {"source": NAME}] * 2)
    assert found.count["img"] == (4 if heat else 2) and ("Grad-CAM" in text) == (heat is not None)
    assert ("no region speaks for" in text) == (heat is not None)


def test_a_mistake_is_told_in_the_words_of_the_reader():
    mistake = {"image": "data:,", "heat": None, "no_evidence": False, "predicted": "1", "truth": "8", "source": "x"}
    text, _ = page({}, ("a", "b"), mistakes=[mistake | {"confidence": 0.849}])
    words = " ".join(re.sub(r"<[^>]*>", "", text).replace("&nbsp;", " ").split())
    assert "predicted 1 (85 %), labelled 8" in words


def test_the_worst_mistakes_are_those_of_which_the_network_is_most_certain():
    logits = np.asarray([[4, 0, 0], [0, 2, 0], [0, 0, 3], [0, 1, 0]], np.float32)
    found = worst(Predictions(np.arange(4), logits, np.asarray([0, 0, 0, 2])), 1.0)
    assert [(index, label) for index, label, _ in found] == [(2, 2), (1, 1), (3, 1)] and found[0][2] > 0.9


def test_a_mistake_is_called_by_its_path_below_the_data():
    paths = ("/home/a/photos/cat/1.jpg", "/home/a/photos/dog/1.jpg")
    assert caption_of(FileSource(paths, (0, 1), ("cat/1.jpg", "dog/1.jpg")), 1) == "dog/1.jpg"
    assert caption_of(FileSource(paths, (0, 1)), 0) == "cat/1.jpg"


@pytest.mark.parametrize(
    ("dataset", "name"),
    [("digits", "digits"), ("folder:/a/b/my photos/", "my photos"), ("csv:/a/table.csv", "table.csv")],
)
def test_a_run_is_called_by_its_data_without_the_folders_above_it(dataset, name):
    config = dataclasses.replace(Config(), data=DataConfig(dataset=dataset))
    assert title_of(config) == f"{name} with {config.model.name}"


def test_the_verdict_says_how_many_images_and_how_sure():
    said = verdict({"accuracy": 1.0, "count": 8}, "validation", 0.1).replace("\N{NO-BREAK SPACE}", " ")
    assert said == "100.0 % of 8 validation images are named right (95 % interval 67.6 to 100.0 %)."
    assert "labels right" in verdict({"accuracy": 0.5, "count": 8, "map": 0.5}, "test", 0.1)
    assert verdict({"count": 8}, "test", 0.25) == "The loss on 8 test images is 0.25."


def test_key_figures_have_an_interval_where_they_are_shares_of_images():
    plain = {"accuracy": 0.5, "count": 10, "macro_recall": 0.5, "macro_f1": 0.5, "auc": None, "ece": 0.1, "mine": 2.0}
    kept = {"calibrated": {"ece": 0.05}, "temperature": 1.5, "calibrated_on": "validation"}
    rows = {row["name"]: row for row in key_figures(plain, kept, 0.7, ["mine"])}
    assert {name for name, row in rows.items() if row["interval"]} == {"accuracy"} and "AUC" not in rows
    assert rows["accuracy"]["interval"] == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert rows["accuracy"]["note"] == "5 of 10 images" and "→" in rows["calibration error"]["value"]
    assert "does not help" not in rows["calibration error"]["note"]
    rows = {row["name"]: row for row in key_figures(plain, kept | {"calibrated": {"ece": 0.12}}, 0.7, [])}
    assert "and does not help this error here" in rows["calibration error"]["note"]
    rows = {row["name"]: row for row in key_figures(plain, kept | {"calibrated_on": None}, 0.7, [])}
    assert "temperature" not in rows and "→" not in rows["calibration error"]["value"]
    assert rows["macro F1"]["note"] == "mean over the classes"
    classes = [{"support": 10}, {"support": 0}]
    rows = {row["name"]: row for row in key_figures(plain | {"classes": classes}, kept, 0.7, [])}
    assert rows["macro F1"]["note"] == "mean over the classes, of which 1 without images count as 0"
    assert [row["name"] for row in key_figures({"count": 3, "mine": 1.0}, {}, 0.7, ["mine"])] == ["loss", "mine"]


def test_a_class_without_images_has_no_figures():
    empty = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0, "auc": None, "interval": None}
    rows = [empty | {"name": "cherry"}, empty | {"name": "plum", "support": 1}]
    text, found = page({"confusion": [[0, 0], [1, 0]]}, ("cherry", "plum"), classes=rows, number_of_classes=2)
    cherry, plum = (text.partition(f"<th>{name}</th>")[2].partition("</tr>")[0] for name in ("cherry", "plum"))
    assert found.rows["classes"] == 3 and "%" not in cherry and plum.count("0.0\N{NO-BREAK SPACE}%") == 3


@needs_chromium
@pytest.mark.parametrize("classes", [3, 10, 40])
def test_no_column_is_cut_on_a_phone(classes, tmp_path):
    """Of names as people give them to folders; with many classes the confusions are listed in place of the matrix."""
    names = tuple(f"Altdeutscher Schäferhund {i}" for i in range(classes))
    interval = (0.123, 0.999)
    row = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 12345, "auc": 0.9876, "interval": interval}
    figure = {"name": "mean average precision", "value": "27.1 % → 5.7 %", "note": "mean over the classes " * 3}
    bin_ = {"confidence": 1.0, "accuracy": 1.0, "count": 12345, "interval": interval}
    matrix = np.full((classes, classes), 7)
    values = {"classes": [row | {"name": name} for name in names], "figures": [figure | {"interval": interval}] * 2}
    text, _ = page({"confusion": matrix.tolist()}, names, **values, reliability=[bin_], number_of_classes=classes)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    assert needed_width(tmp_path / "page.html", tmp_path, 390) <= 390
    assert needed_width(tmp_path / "page.html", tmp_path, 1100) <= 1100
    assert needed_width(tmp_path / "page.html", tmp_path, 1100, "table") <= 1100
