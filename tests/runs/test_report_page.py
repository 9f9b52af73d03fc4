"""The page's template, with values as `make_report` gives them."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from resnet_jax.config import Config, DataConfig
from resnet_jax.data.dataset import Dataset, FileSource
from resnet_jax.data.loader import BadImages
from resnet_jax.runs import report_page
from resnet_jax.runs.report_page import (
    caption_of,
    chosen_by,
    confusion_of,
    key_figures,
    left_out_of,
    measures_of,
    page_template,
    thresholds_in_words,
    title_of,
    verdict,
    worst,
)
from resnet_jax.training.evaluation import Predictions

from ..browser import Tags, asked, needed_width, needs_chromium

PAGE = Path(report_page.__file__).with_name("report_page.html")
NAME = '<b onclick="x">&'
ROW = {"name": NAME, "precision": 0.5, "recall": None, "f1": 0.25, "support": 1234, "auc": None, "interval": None,
       "threshold": None}  # fmt: skip
PLAIN = {
    "title": NAME, "folder": NAME, "step": 7, "averaged": False, "images": {"train": 9, "test": 3},
    "number_of_classes": 2, "split": "test", "chosen_by": None, "verdict": NAME,
    "figures": [{"name": NAME, "value": "50.0 %", "note": NAME, "interval": (0.2, 0.8)}],
    "curves": {"Loss": "<svg></svg>", "Accuracy": ""}, "classes": [ROW, ROW], "calibrated": "", "reliability_chart": "",
    "reliability": [{"confidence": 0.5, "accuracy": 0.4, "count": 2, "interval": None}], "mistakes": [],
    "left_out": {}, "left_out_more": 0, "thresholds": "", "probabilities": "",
    "run": {NAME: NAME}, "undecodable": [], "own": NAME, "recipe": NAME,
}  # fmt: skip


MISTAKE = {"image": "data:,", "heat": None, "no_evidence": False, "predicted": "1", "truth": "8", "source": "x",
           "confidence": 0.849}  # fmt: skip


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


def test_a_mistake_among_several_labels_is_a_class_that_reaches_its_threshold():
    """The first picture is predicted to have the first class alone, from 0.2 on; the other reaches 0.6 of 0.9."""
    logits, labels = np.asarray([[-1.0, 0.4], [-3.0, 3.0]], np.float32), np.asarray([[0, 0], [1, 1]])
    predictions = Predictions(np.arange(2), logits, labels)
    found = worst(predictions, 1.0, (0.2, 0.9))
    assert [(index, label) for index, label, _ in found] == [(0, 0)] and found[0][2] == pytest.approx(0.2689, abs=1e-4)
    assert [(index, label) for index, label, _ in worst(predictions, 1.0)] == [(0, 1)]


def several_labels(validation=True):
    """Measures of three classes that hold 0.2, 0.5 and 0.8 of the images, all with logits below 0."""
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 3)) < (0.2, 0.5, 0.8)).astype(np.int32)
    logits = (labels + rng.normal(size=labels.shape) - 3).astype(np.float32)
    found = {"loss": 0.5, "count": 60, "predictions": Predictions(np.arange(60), logits, labels)}
    images = (np.zeros((60, 2, 2, 3), np.uint8), labels)
    splits = {"validation": images} if validation else {"test": images}
    data = Dataset(train=images, class_names=tuple("abc"), **splits)
    return measures_of(dict.fromkeys(splits, found), data, data.class_names, 3, [])


def test_headline_and_table_of_several_labels_are_of_the_fitted_thresholds():
    measured = several_labels()
    rows = {row["name"]: row for row in key_figures(measured.plain, measured.kept, 0.5, [])}
    for name, column in (("macro recall", "recall"), ("macro F1", "f1")):
        mean = np.mean([row[column] for row in measured.calibrated["classes"]])
        assert (
            rows[name]["value"] == f"{100 * mean:.1f}\N{NO-BREAK SPACE}%" and "fitted thresholds" in rows[name]["note"]
        )
    assert "fitted thresholds" in rows["accuracy"]["note"] and measured.plain["macro_recall"] < 0.2
    assert "without the temperature" in rows["loss"]["note"]
    said = thresholds_in_words(measured, "validation", other=False)
    assert "predict takes the same" in said and "optimistic" in said
    assert "optimistic" not in thresholds_in_words(measured, "test", other=False)
    assert "resnet-jax predict" not in thresholds_in_words(measured, "test", other=True)
    half = several_labels(validation=False)
    rows = {row["name"]: row for row in key_figures(half.plain, half.kept, 0.5, [])}
    assert "threshold one half" in rows["macro F1"]["note"] and "without the" not in rows["loss"]["note"]
    assert "one half" in thresholds_in_words(half, "test", other=False)
    assert chosen_by("ema/validation/macro_f1", True).endswith("(moving average) with the threshold one half")
    assert chosen_by("validation/map", True) == "validation map"


def test_thresholds_stand_with_the_classes():
    text, _ = page({}, ("a", "b"), classes=[ROW | {"threshold": 0.25}] * 2, thresholds="from its threshold on")
    assert text.count("threshold 25.0\N{NO-BREAK SPACE}%") == 2 and "<p>from its threshold on</p>" in text


def test_calibration_and_mistakes_are_of_the_same_probabilities(monkeypatch):
    """Of one label an image: the temperature is 4, and the worst mistake is in the last row of the table."""
    logits = np.repeat(np.asarray([[8, 0], [8, 0], [4, 0], [0, 8]], np.float32), (12, 3, 5, 10), axis=0)
    labels = np.repeat([0, 1, 0, 1, 1], (12, 3, 4, 1, 10))
    predictions = Predictions(np.arange(30), logits, labels)
    images = (np.zeros((30, 2, 2, 3), np.uint8), labels)
    data = Dataset(train=images, validation=images, class_names=("a", "b"))
    means = {"loss": 0.5, "count": 30, "predictions": predictions}
    measured = measures_of({"validation": means}, data, data.class_names, 3, [])
    assert measured.kept["temperature"] > 2
    monkeypatch.setattr(report_page, "_mistakes", lambda run, split, found, *how: worst(found, *how))
    shown = report_page.of_classes(SimpleNamespace(class_names=("a", "b")), "validation", predictions, measured)
    assert max(row["confidence"] for row in shown["reliability"]) == pytest.approx(shown["mistakes"][0][2], abs=1e-6)
    assert "with the temperature" in shown["calibrated"] and "with the temperature" in shown["probabilities"]
    assert "by\nprobabilities with the temperature" in page({}, ("a", "b"), mistakes=[MISTAKE], **{
        "probabilities": shown["probabilities"]})[0]  # fmt: skip


def test_images_that_are_left_out_are_counted_by_split(tmp_path):
    names = {split: tuple(f"/data/{split}/{i}.png" for i in range(3)) for split in ("train", "validation")}
    data = Dataset(**{k: FileSource(paths, (0, 1, 0)) for k, paths in names.items()}, class_names=("a", "b"))
    run = SimpleNamespace(dataset=data, bad=BadImages("skip", {"/data/validation/0.png"}), other=False)
    assert left_out_of(run, tmp_path) == ({"validation": ["/data/validation/0.png"]}, 0)
    summary = {"steps": 1, "skipped_images": {"count": 3, "names": ["/data/train/1.png", "/elsewhere/2.png"]}}
    found = {"train": ["/data/train/1.png"], "validation": ["/data/validation/0.png"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "read_summary", lambda folder: summary)
        assert left_out_of(run, tmp_path) == (found, 1)
    text, _ = page(
        {},
        ("a", "b"),
        left_out={"train": 1234, "validation": 1},
        left_out_more=5,
        undecodable=[f"{i}.png" for i in range(52)],
    )
    assert "cannot be decoded: 1,234 of train, 1 of validation, 5 more. The" in " ".join(text.split())
    assert "49.png, and 2 more</p>" in text


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
    empty = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0, "auc": None, "interval": None, "threshold": None}
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
    row["threshold"] = 0.999
    figure = {"name": "mean average precision", "value": "27.1 % → 5.7 %", "note": "mean over the classes " * 3}
    bin_ = {"confidence": 1.0, "accuracy": 1.0, "count": 12345, "interval": interval}
    matrix = np.full((classes, classes), 7)
    values = {"classes": [row | {"name": name} for name in names], "figures": [figure | {"interval": interval}] * 2}
    text, _ = page({"confusion": matrix.tolist()}, names, **values, reliability=[bin_], number_of_classes=classes)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    assert needed_width(tmp_path / "page.html", tmp_path, 390) <= 390
    assert needed_width(tmp_path / "page.html", tmp_path, 1100) <= 1100
    assert needed_width(tmp_path / "page.html", tmp_path, 1100, "table") <= 1100


@needs_chromium
def test_a_class_stands_in_one_line_on_a_phone_and_columns_stand_apart(tmp_path):
    row = {"precision": 0.857, "recall": 0.5, "f1": 0.632, "auc": 0.775, "interval": (0.254, 0.746)}
    names = ("automobile", "airplane", "horse")
    classes = [row | {"name": name, "support": 12, "threshold": 0.575} for name in names]
    text, _ = page({}, names, classes=classes)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    script = (
        "(() => { const boxes = cell => { const range = document.createRange(); range.selectNodeContents(cell);"
        " return [...range.getClientRects()]; };"
        " const cells = [...page.querySelectorAll('#classes tr')[1].children].map(boxes);"
        " const lines = new Set(cells[0].map(box => Math.round(box.bottom / 8))).size;"
        " const [images, auc] = cells.slice(-2).map(found => found[0]);"
        " return [lines, auc.left - images.right]; })()"
    )
    lines, gap = map(float, asked(tmp_path / "page.html", tmp_path, 390, script).split(","))
    assert lines == 1 and gap > 12
