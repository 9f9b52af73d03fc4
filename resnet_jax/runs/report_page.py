"""`report.html`: what a run came to, in one file that needs nothing else."""

import base64
import dataclasses
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config import Config, InputError, to_dict
from resnet_jax.data.dataset import Dataset, Source, default_split
from resnet_jax.data.folders import printable
from resnet_jax.data.on_device import normalize
from resnet_jax.data.show import as_shown, overlay, sized
from resnet_jax.data.transforms import fit
from resnet_jax.files import read_file, to_json, write_whole
from resnet_jax.models.densenet import DenseNet
from resnet_jax.models.googlenet import GoogLeNet
from resnet_jax.models.resnet import ResNet
from resnet_jax.output import say
from resnet_jax.predict.gradcam import grad_cam
from resnet_jax.runs.charts import chosen_step, line_chart, reliability_chart, spoken
from resnet_jax.runs.folder import read_summary
from resnet_jax.runs.trackers import points, read_lines
from resnet_jax.training.evaluation import FinishedRun, Predictions, Result, everywhere, open_run, served
from resnet_jax.training.manifest import best_of
from resnet_jax.training.metrics import fit_calibration, measure, probabilities, wilson
from resnet_jax.training.parts import NO_PARTS, Parts, parts_in_words
from resnet_jax.typed import from_extra
from resnet_jax.weights.sources import preprocessing_in
from resnet_jax.weights.tags import UNCALIBRATED

MISTAKES, THUMBNAIL = 12, 112
"""How many mistakes are shown, and the height that their images have at least, in pixels; twice as much at most."""
MOST_CLASSES = 40
"""With more classes than this the page lists the most frequent confusions in place of the whole matrix."""
MEASURES, CALIBRATION = "measures.json", "calibration.json"
"""Names of the files with a report's figures, and with what predictions take of them."""
INSPECTION = "inspect.json"
"""Name of the file with what `resnet-jax inspect` counted in a run's data."""
CALIBRATED = {
    (
        None,
        "test",
    ): "There is no validation split to fit a temperature on: these are the network's own probabilities.",
    (
        "validation",
        "test",
    ): "The probabilities here and below are with the temperature, which was fitted on the validation split.",
    (
        "validation",
        "validation",
    ): "The probabilities here and below are with the temperature. It was fitted on the split "
    "it is measured on, so the chart and the calibration error with it are optimistic.",
}
"""What the page says of the calibration, by the splits that it was fitted and measured on."""
EACH_CLASS = (
    "Each class of each image is a prediction here, that it is there or is not, whichever is likelier: the threshold "
    "is one half."
)
"""What the page says of it where images have several labels."""


def make_report(
    folder: Path, checkpoint: str | None = None, dataset: str | None = None, parts: Parts = NO_PARTS
) -> Path:
    """Writes `report.html`, `measures.json` and `calibration.json` into a run's folder; returns the page's path. Of
    several processes all must call it, and the first writes.

    The network is measured on the test split, or on the validation split if there is no test split. Temperature and
    thresholds are fitted on the validation split; without one, probabilities stay as the network gives them.

    Args:
      folder: the folder of a run.
      checkpoint: `best`, `latest` or a step, as `evaluate_run` takes it. A moving average of the parameters is used in
        place of the parameters if the run has one.
      dataset: where the run's data lies now, if it has moved, as `data.dataset` of a recipe; or other data, of which no
        `calibration.json` is written.
      parts: those of the user's own that the run was trained with.

    Raises:
      InputError: the folder holds no run or no such checkpoint, or there is no split to measure on.
    """
    run = open_run(folder, checkpoint, keep=True, dataset=dataset, parts=parts)
    split = default_split(run.dataset)
    run.check_unseen(split)
    result: Result = {}
    for name in measured_splits(run.dataset, run.class_names):
        result |= run.evaluate(name) or {}
    step, best, lines = int(run.state.step), best_of(folder), read_lines(folder / "metrics.jsonl")
    own = list(run.parts.metrics)
    measured = measures_of(result, run.dataset, run.class_names, step, own)
    plain, loss, calibrated = measured.plain, measured.kept["loss"], measured.calibrated
    sections = {} if calibrated is None else of_classes(run, split, served(result, split)[1]["predictions"], measured)
    left_out, more = left_out_of(run, folder)
    left = {name: len(names) for name, names in left_out.items()}
    if jax.process_index() != 0:  # it has helped to evaluate
        return folder / "report.html"
    kept = measured.kept | ({"dataset": dataset} if run.other else {})
    if run.class_names and not run.other:
        write_whole(folder / CALIBRATION, to_json(measured.calibration) + "\n")
    write_whole(folder / MEASURES, to_json(kept, indent=1) + "\n")
    page = page_template(Path(__file__).with_name("report_page.html")).render(
        title=title_of(run.config),
        verdict=verdict(calibrated or plain, split, loss),
        folder=folder.name,
        step=step,
        averaged=run.state.ema is not None,
        images={name: len(source) for name, source in run.dataset.splits().items()},
        left_out=left,
        left_out_more=more,
        thresholds=thresholds_in_words(measured, split, run.other),
        number_of_classes=len(run.class_names),
        split=split,
        chosen_by=chosen_by(best["metric"], "map" in plain) if best is not None and best["step"] == step else None,
        figures=key_figures(plain, {} if calibrated is None else kept, loss, own),
        curves=_curves(lines, own, _counts(run, left), chosen_step(folder), "map" in plain),
        run=_run(lines, folder),
        inspection=read_inspection(folder),
        undecodable=sorted({name for names in left_out.values() for name in names}),
        own=parts_in_words(folder),
        recipe=json.dumps(to_dict(run.config), indent=2),
        **sections,
    )
    write_whole(folder / "report.html", printable(page))
    return folder / "report.html"


@dataclass(frozen=True)
class Measures:
    """What a report measures of a checkpoint.

    Attributes:
      plain: measures of the probabilities as the network gives them, and metrics of the user's own.
      calibrated: measures with the calibration; None where there are no classes.
      kept: what `measures.json` holds.
      calibration: what `calibration.json` holds.
    """

    plain: dict[str, Any]
    calibrated: dict[str, Any] | None
    kept: dict[str, Any]
    calibration: dict[str, Any]


def measured_splits(dataset: Dataset, class_names: tuple[str, ...]) -> list[str]:
    """Returns the splits that a report evaluates: the one it measures and, for classes, the one it calibrates on."""
    both = bool(class_names) and dataset.validation is not None
    return list(dict.fromkeys([default_split(dataset)] + ["validation"] * both))


def measures_of(
    result: Result, dataset: Dataset, class_names: tuple[str, ...], step: int, own: Sequence[str]
) -> Measures:
    """Returns what a report measures.

    Args:
      result: evaluations of `measured_splits`, with predictions where there are classes.
      class_names: of the outputs; empty where they are no classes.
      step: of the checkpoint.
      own: names of metrics of the user's own.
    """
    split = default_split(dataset)
    means = served(result, split)[1]
    head, own_metrics = {"step": step, "split": split, "loss": means["loss"]}, {name: means[name] for name in own}
    if not class_names:
        plain = {"count": means["count"]} | own_metrics
        return Measures(plain, None, head | plain, {})
    predictions: Predictions = means["predictions"]
    calibration, fitted_on = UNCALIBRATED, None
    if dataset.validation is not None:
        fitted_on = "validation"
        held_out: Predictions = served(result, fitted_on)[1]["predictions"]
        calibration = fit_calibration(held_out.logits, held_out.labels)
    plain = measure(predictions.logits, predictions.labels, class_names) | own_metrics
    calibrated = measure(predictions.logits, predictions.labels, class_names, calibration)
    more = {"calibrated": calibrated, "temperature": calibration.temperature, "calibrated_on": fitted_on}
    return Measures(plain, calibrated, head | plain | more, {"step": step} | dataclasses.asdict(calibration))


def of_classes(run: FinishedRun, split: str, predictions: Predictions, measured: Measures) -> dict[str, Any]:
    """Returns what the page shows of classes."""
    names, calibrated, kept = run.class_names, measured.calibrated, measured.kept
    assert calibrated is not None
    multilabel = "map" in calibrated
    thresholds: Sequence[float] | None = (
        measured.calibration["thresholds"] or [0.5] * len(names) if multilabel else None
    )
    fitted_on = kept["calibrated_on"]
    return {
        "classes": [
            row | {"interval": interval_of(row["recall"], row["support"]), "threshold": threshold}
            for row, threshold in zip(calibrated["classes"], thresholds or repeat(None, len(names)), strict=True)
        ],
        "class_names": names,
        **confusion_of(calibrated, names),
        "calibrated": CALIBRATED[fitted_on, split] + f" {EACH_CLASS}" * multilabel,
        "reliability_chart": reliability_chart(calibrated["reliability"]),
        "reliability": [row | {"interval": wilson(row["accuracy"], row["count"])} for row in calibrated["reliability"]],
        "mistakes": _mistakes(run, split, predictions, kept["temperature"], thresholds),
        "probabilities": "the network's own probabilities"
        if fitted_on is None
        else "probabilities with the temperature",
    }


def page_template(file: Path) -> Any:
    """Returns the template of a page in a file, a `jinja2.Template` that escapes every value."""
    with from_extra("report", "the page"):
        import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": _percent, "number": _number, "auc": _auc, "interval": _interval}
    return environment.from_string(file.read_text(encoding="utf-8"))


def title_of(config: Config) -> str:
    """Returns what a person would call a run: its data without the folders above it, and its model."""
    return f"{place_of(config.data.dataset)} with {config.model.name}"


def place_of(dataset: str) -> str:
    """Returns what a person would call data: `data.dataset` of a recipe without its kind and the folders above."""
    kind, _, place = dataset.partition(":")
    if kind in ("folder", "csv"):
        place = place.rstrip("/").rpartition("/")[2]
    return place or kind


def thresholds_in_words(measured: Measures, split: str, other: bool) -> str:
    """Returns what the page says of the thresholds by which its figures count; "" where images have one label.

    Args:
      measured: what the page shows.
      split: that the figures are of.
      other: the data is not that of the run.
    """
    if "map" not in measured.plain:
        return ""
    if measured.calibration["thresholds"] is None:
        return "A class is predicted from a probability of one half on: no validation split is there to fit thresholds."
    return (
        "A class is predicted from its threshold on, which stands with its name in the table of classes. The "
        "thresholds were fitted on the validation split for the best F1 of each class"
        + ", so what is counted by them on that split is optimistic" * (split == "validation")
        + ("." if other else "; resnet-jax predict takes the same.")
    )


def chosen_by(metric: str, multilabel: bool) -> str:
    """Returns what the page says of the metric that chose a step, of images with one label or `multilabel`."""
    counted = multilabel and metric.endswith(("/accuracy", "/macro_recall", "/macro_f1"))
    return spoken(metric) + " with the threshold one half" * counted


def left_out_of(run: FinishedRun, folder: Path) -> tuple[dict[str, list[str]], int]:
    """Returns the names of the images that could not be decoded by split, for the splits that have any, in this
    evaluation and in the run; and how many more the run had, which are not found: its summary names the first 1,000, as
    they were called where its data lay then.
    """
    try:
        summary = read_summary(folder) or {}
    except InputError:  # `_run` says so
        summary = {}
    skipped = summary.get("skipped_images", {"count": 0, "names": []})
    bad = run.bad.names | set(skipped["names"])
    splits = run.dataset.splits().items() if bad else ()
    names = {kind: [source.describe(i) for i in range(len(source))] for kind, source in splits}
    found = {kind: [name for name in names[kind] if name in bad] for kind in names}
    more = 0 if run.other else max(0, skipped["count"] - sum(map(len, found.values())))
    return {kind: some for kind, some in found.items() if some}, more


def verdict(measures: dict[str, Any], split: str, loss: float) -> str:
    """Returns one sentence on what a run came to."""
    count = f"{measures['count']:,} {split} images"
    if "accuracy" not in measures:
        return f"The loss on {count} is {_number(loss)}."
    share = f"{_percent(measures['accuracy'])} of {count}"
    low, high = wilson(measures["accuracy"], measures["count"])
    what = "have all their labels right" if "map" in measures else "are named right"
    return f"{share} {what} (95\N{NO-BREAK SPACE}% interval {_interval((low, high))})."


def key_figures(plain: dict[str, Any], kept: dict[str, Any], loss: float, own: list[str]) -> list[dict[str, Any]]:
    """Returns the rows of the table on top of the page: `name`, `value` as text, `note`, and `interval` where it is a
    share of images.

    Args:
      plain: measures of the probabilities as the network gives them, and metrics of the user's own.
      kept: `calibrated` measures, which are shown, the `temperature`, and the split `calibrated_on`, where there are
        classes.
      own: names of metrics of the user's own.
    """
    shown, multilabel = plain | kept.get("calibrated", {}), "map" in plain
    of_loss = "mean over the images" + ", without the temperature" * bool(kept and kept["calibrated_on"])
    rest = [("loss", _number(loss), of_loss), *((name, _number(plain[name]), "") for name in own)]
    rows: list[tuple[str, str, str]] = []
    if kept:
        count = shown["count"]
        empty = sum(row["support"] == 0 for row in shown.get("classes", ()))
        over = "mean over the classes" + (f" that have images; {empty:,} have none" if empty else "")
        at = f"; {'fitted thresholds' if kept['calibrated_on'] else 'threshold one half'}" if multilabel else ""
        right = f"{round(shown['accuracy'] * count):,} of {count:,} images"
        rows = [
            ("accuracy", _percent(shown["accuracy"]), f"all labels right: {right}{at}" if multilabel else right),
            ("top 5", _percent(shown.get("top5")), "the label is among the five likeliest classes"),
            ("mean average precision", _percent(shown.get("map")), "mean over the classes, without a threshold"),
            ("macro recall", _percent(shown["macro_recall"]), f"{over}, rare ones like frequent ones{at}"),
            ("macro F1", _percent(shown["macro_f1"]), f"{over}{at}"),
            ("AUC", _auc(shown["auc"]), "one class against the rest, mean; 0.5 is chance"),
        ]
    rows += rest
    if kept:
        before, after = (_percent(measures["ece"]) for measures in (plain, kept["calibrated"]))
        what = "mean distance of confidence and accuracy" + "; threshold one half" * multilabel
        if kept["calibrated_on"] is None:
            rows.append(("calibration error", before, what))
        else:
            worse = kept["temperature"] != 1 and kept["calibrated"]["ece"] >= plain["ece"]
            note = f"{what}, before and after fitting the temperature"
            note += "; it is fitted for the least loss, and does not help this error here" * worse
            rows.append(("calibration error", f"{before} → {after}", note))
            rows.append(
                ("temperature", _number(kept["temperature"]), "above 1 the network was too certain, below 1 not enough")
            )
    shares = {"accuracy": shown.get("accuracy"), "top 5": shown.get("top5")}
    return [
        {"name": name, "value": value, "note": note, "interval": interval_of(shares.get(name), plain["count"])}
        for name, value, note in rows
        if value
    ]


def read_inspection(folder: Path) -> dict[str, Any] | None:
    """Returns what `inspect.json` in a run's folder says; None where there is none, or it is none of ours."""
    try:
        found = json.loads(read_file(folder / INSPECTION))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"dataset", "pictures", "findings"} <= set(found) else None


def interval_of(share: float | None, count: int) -> tuple[float, float] | None:
    """Returns the 95 % interval of a share of images; None where there is none."""
    return None if share is None or not count else wilson(share, count)


def _counts(run: FinishedRun, left_out: dict[str, int]) -> dict[str, int]:
    """Returns how many images the curves' shares were counted on: label of a line -> count."""
    validation = run.dataset.validation
    count = 0 if validation is None else len(validation) - left_out.get("validation", 0)
    return {"validation": count, "validation, moving average": count}


def _curves(
    lines: list[dict[str, Any]],
    own: list[str],
    counts: dict[str, int],
    chosen: tuple[int, str] | None,
    multilabel: bool,
) -> dict[str, str]:
    """Returns charts of the lines of metrics.jsonl: title -> SVG, "" where there is nothing to draw; `own` are the
    names of the user's own metrics, `counts` and `chosen` as `line_chart` takes them, `multilabel` whether images
    have several labels.
    """
    kinds = {"train": "train", "validation": "validation", "validation, moving average": "ema/validation"}

    def curves(quantity: str) -> dict[str, Any]:
        return {label: points(lines, f"{kind}/{quantity}") for label, kind in kinds.items()}

    rate = {"learning rate": points(lines, "learning_rate")}
    accuracy = "Accuracy (all labels right, threshold one half)" if multilabel else "Accuracy"
    how: dict[str, Any] = {"chosen": chosen, "stepped": "train"}
    return {
        "Loss": line_chart("Loss", curves("loss"), "step", log=True, y_name="loss", **how),
        accuracy: line_chart(accuracy, curves("accuracy"), "step", y_name="accuracy", share=True, counts=counts, **how),
        **{name: line_chart(name, curves(name), "step", y_name=name, **how) for name in own},
        "Learning rate": line_chart("Learning rate", rate, "step", y_name="learning rate"),
    }


def confusion_of(measures: dict[str, Any], names: tuple[str, ...]) -> dict[str, list[Any]]:
    """Returns the confusion matrix as rows of cells, without rows for many classes, and the most frequent confusions;
    both are empty where images have several labels.
    """
    if "confusion" not in measures:
        return {"confusion": [], "confused": []}
    matrix = np.asarray(measures["confusion"])
    wrong = matrix * (1 - np.eye(len(names), dtype=int))
    pairs = [divmod(int(i), len(names)) for i in np.argsort(-wrong, axis=None, kind="stable")[:30]]
    confused = [{"truth": names[a], "predicted": names[b], "count": wrong[a, b]} for a, b in pairs if wrong[a, b]]
    if len(names) > MOST_CLASSES:
        return {"confusion": [], "confused": confused}
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    rows = [
        [{"count": count, "share": share} for count, share in zip(*row, strict=True)]
        for row in zip(matrix.tolist(), shares.tolist(), strict=True)
    ]
    return {"confusion": rows, "confused": confused}


def worst(
    predictions: Predictions, temperature: float, thresholds: Sequence[float] | None = None
) -> list[tuple[int, int, float]]:
    """Returns the most confident mistakes: (index among the predictions, the wrong class, its probability). Where
    images have several labels that is a class that reaches its threshold, by default one half, and is no label.
    """
    multilabel = predictions.labels.ndim == 2
    p = probabilities(predictions.logits, multilabel, temperature)
    wrong = (
        np.where(p >= np.asarray(thresholds or 0.5), p * (1 - predictions.labels), 0.0)
        if multilabel
        else np.where(np.arange(p.shape[1]) == predictions.labels[:, None], 0.0, p)
    )
    label, confidence = wrong.argmax(1), wrong.max(1)
    mistaken = confidence > 0 if multilabel else p.argmax(1) != predictions.labels
    order = np.argsort(-confidence * mistaken)[: min(MISTAKES, int(mistaken.sum()))]
    return [(int(i), int(label[i]), float(confidence[i])) for i in order]


def _mistakes(
    run: FinishedRun, split: str, predictions: Predictions, temperature: float, thresholds: Sequence[float] | None
) -> list[dict[str, Any]]:
    """Returns what the page shows of each of the most confident mistakes."""
    chosen = worst(predictions, temperature, thresholds)
    if not chosen:
        return []
    config, source, names = run.config, run.dataset.split(split), run.class_names
    look = preprocessing_in(config)
    indices = [int(predictions.index[i]) for i, _, _ in chosen]
    how = (look.eval_image_size, look.eval_crop, look.interpolation, config.data.channels)
    seen = [fit(source[i][0], *how) for i in indices]
    model: Any = run.model
    heats = [None] * len(chosen)
    if isinstance(model, ResNet | DenseNet | GoogLeNet):
        images = normalize(jnp.asarray(np.stack(seen)), look.mean, look.std, model.dtype)
        variables = jax.device_get(everywhere(run.state.averages or run.state.variables, run.mesh))
        heats = list(np.asarray(grad_cam(model, variables, images, jnp.asarray([label for _, label, _ in chosen]))))
    cards = []
    for (i, label, confidence), index, pixels, heat in zip(chosen, indices, seen, heats, strict=True):
        truth, shown = predictions.labels[i], sized(as_shown(pixels), THUMBNAIL, 2 * THUMBNAIL)
        true = ", ".join(names[k] for k in np.flatnonzero(truth)) if truth.ndim else names[truth]
        card = {"predicted": names[label], "confidence": confidence, "truth": true or "nothing"}
        card |= {"source": caption_of(source, index), "image": data_uri(shown)}
        card |= {"heat": None if heat is None else data_uri(overlay(shown, heat))}
        cards.append(card | {"no_evidence": heat is not None and not np.any(heat)})
    return cards


def caption_of(source: Source, index: int) -> str:
    """Returns what the page calls an example: a file by its path below the root of the data, or its folder and name."""
    key = source.key(index)
    return "/".join(Path(key).parts[-2:]) if Path(key).is_absolute() else key


def data_uri(pixels: Any) -> str:
    """Returns a picture, PIL's or uint8 [height, width, 3], as the data URI of a JPEG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _run(lines: list[dict[str, Any]], folder: Path) -> dict[str, str]:
    """Returns the rows of the table on the run: name -> text."""
    rows = {}
    forms = (
        ("images_per_second", "training images per second, median", "{:,.0f}".format),
        ("data_wait", "share of time waiting for data, median", _percent),
    )
    for name, label, form in forms:
        if values := [value for _, value in points(lines, name)]:
            rows[label] = form(statistics.median(values))
    try:
        summary = read_summary(folder)
    except InputError as error:
        say(f"WARNING: {error}; the report leaves it out", error=True)
        summary = None
    if summary:
        rows |= {"device": summary["device"], "steps": f"{summary['steps']:,}"}
        rows["seconds that it took, since the last start"] = f"{summary['seconds']:,.1f}"
        rows |= summary["versions"]
    return rows


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{100 * ends[0]:.1f} to {_percent(ends[1])}"


def _auc(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
