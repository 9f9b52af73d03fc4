"""The page's template, with values as `make_report` gives them."""

import numpy as np
import pytest

from resnet_jax.runs.report_page import confusion_of, template, worst
from resnet_jax.training.evaluation import Predictions

from ..browser import Tags

NAME = '<b onclick="x">&'
ROW = {"name": NAME, "precision": 0.5, "recall": None, "f1": 0.25, "support": 1234, "auc": None}
PLAIN = {
    "title": NAME, "folder": NAME, "step": 7, "averaged": False, "images": {"train": 9, "test": 3},
    "number_of_classes": 2, "split": "test", "chosen_by": None, "tiles": {"accuracy": "50.0%", "top 5": ""},
    "curves": {"Loss": "<svg></svg>", "Accuracy": ""}, "classes": [ROW, ROW], "calibrated": "", "reliability_chart": "",
    "reliability": [{"confidence": 0.5, "accuracy": 0.4, "count": 2}], "mistakes": [], "run": {NAME: NAME},
    "undecodable": [], "recipe": NAME,
}  # fmt: skip


def page(measures, names, **values):
    text = template().render(PLAIN | {"class_names": names} | confusion_of(measures, names) | values)
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
    text, found = page({}, ("a", "b"), mistakes=[mistake | {"source": NAME}] * 2)
    assert found.count["img"] == (4 if heat else 2) and ("Grad-CAM" in text) == (heat is not None)


def test_the_worst_mistakes_are_those_of_which_the_network_is_most_certain():
    logits = np.asarray([[4, 0, 0], [0, 2, 0], [0, 0, 3], [0, 1, 0]], np.float32)
    found = worst(Predictions(np.arange(4), logits, np.asarray([0, 0, 0, 2])), 1.0)
    assert [(index, label) for index, label, _ in found] == [(2, 2), (1, 1), (3, 1)] and found[0][2] > 0.9
