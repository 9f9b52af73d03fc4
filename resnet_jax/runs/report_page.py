"""`report.html`: what a run came to, in one file that needs nothing else."""

import base64
import dataclasses
import io
import json
import statistics
from html import escape
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from resnet_jax.config import InputError, to_dict
from resnet_jax.data.dataset import default_split
from resnet_jax.data.files import printable
from resnet_jax.data.on_device import normalize
from resnet_jax.data.show import as_shown, overlay
from resnet_jax.data.transforms import fit
from resnet_jax.files import to_json, write_whole
from resnet_jax.models.vit import ViT
from resnet_jax.output import say
from resnet_jax.predict.gradcam import grad_cam
from resnet_jax.runs.charts import line_chart, reliability_chart
from resnet_jax.runs.folder import read_summary
from resnet_jax.runs.trackers import points, read_lines
from resnet_jax.training.evaluation import FinishedRun, Predictions, open_run, served
from resnet_jax.training.manifest import best_of
from resnet_jax.training.measures import fit_calibration, measure, probabilities
from resnet_jax.weights.tags import UNCALIBRATED, Calibration

MISTAKES, THUMBNAIL = 12, 112
"""How many are shown, and at least how many pixels high."""
MOST_CLASSES = 40
"""Of a confusion matrix; of more classes the pairs are listed that are confused most."""


def make_report(folder: Path, checkpoint: str | None = None, dataset: str | None = None) -> Path:
    """Writes `report.html`, `measures.json` and `calibration.json` into a run's folder; returns the page's path.

    The network is that of a checkpoint as `evaluate_run` takes it, with its moving average if it has one. It is
    measured on the test split, or where there is none on the validation split. Temperature and thresholds are fitted on
    the validation split; without one, probabilities stay as they are.

    Raises:
      InputError: the folder holds no run or no such checkpoint, or there is no split to measure on.
    """
    run = open_run(folder, checkpoint, keep=True, dataset=dataset)
    split = default_split(run.dataset)
    run.check_unseen(split)
    means = served(run.evaluate(split) or {}, split)[1]
    predictions: Predictions = means["predictions"]
    calibration, fitted_on = UNCALIBRATED, None
    if run.dataset.validation is not None:
        fitted_on = "validation"
        held_out = (
            predictions if split == fitted_on else served(run.evaluate(fitted_on) or {}, fitted_on)[1]["predictions"]
        )
        calibration = fit_calibration(held_out.logits, held_out.labels)
    names = run.class_names
    plain = measure(predictions.logits, predictions.labels, names)
    found = measure(predictions.logits, predictions.labels, names, calibration)
    step = int(run.state.step)
    write_whole(folder / "calibration.json", to_json({"step": step} | dataclasses.asdict(calibration)) + "\n")
    loss = means["loss"]
    kept = {"step": step, "split": split, "loss": loss} | plain
    kept |= {"calibrated": found, "temperature": calibration.temperature, "calibrated_on": fitted_on}
    write_whole(folder / "measures.json", to_json(kept, indent=1) + "\n")
    lines = read_lines(folder / "metrics.jsonl")
    sections = [
        _heading(run, folder, step, split),
        _tiles(plain, found, loss, calibration),
        _curves(lines),
        _classes(found),
        _confusion(found, names),
        f"<h2>Calibration</h2><p>{CALIBRATED[fitted_on, split]}</p>{reliability_chart(plain['reliability'])}",
        _mistakes(run, split, predictions, calibration),
        _speed(lines, folder),
        _details(run, folder),
    ]
    title = escape(f"{run.config.model.name} on {run.config.data.dataset}")
    head, tail = PAGE.replace("{title}", title, 1).rsplit("{body}", 1)
    write_whole(folder / "report.html", printable("\n".join([head, *sections, tail])))
    return folder / "report.html"


CALIBRATED = {
    (
        None,
        "test",
    ): "Probabilities are as the network gives them: no validation split, no temperature.",
    ("validation", "test"): "The temperature was fitted on the validation split, the chart is of the test split.",
    ("validation", "validation"): "The temperature was fitted on the same pictures, which flatters it a little.",
}
"""What is written of the calibration, by the splits that it was fitted and measured on."""


def _heading(run: FinishedRun, folder: Path, step: int, split: str) -> str:
    config, best = run.config, best_of(folder)
    average = ", moving average" if run.state.ema is not None else ""
    counts = ", ".join(f"{len(source):,} {name}" for name, source in run.dataset.splits().items())
    chosen = ""
    if best is not None and best["step"] == step:
        chosen = f" The step was chosen by {escape(best['metric'])}" + (
            ", so that figures of that split flatter it." if split == "validation" else "."
        )
    return (
        f"<h1>{escape(config.model.name)} on {escape(config.data.dataset)}</h1>"
        f"<p>{escape(folder.name)}: step {step}{average}; images: {counts}; {len(run.class_names)} classes. "
        f"Figures below are of the <b>{split}</b> split.{chosen}</p>"
    )


def _tiles(plain: dict[str, Any], found: dict[str, Any], loss: float, calibration: Calibration) -> str:
    shown = {
        "accuracy": _percent(plain["accuracy"]),
        "top 5": _percent(plain.get("top5")),
        "mean average precision": _percent(plain.get("map")),
        "macro recall": _percent(plain["macro_recall"]),
        "macro F1": _percent(plain["macro_f1"]),
        "AUC, one against the rest": _number(plain["auc"]),
        "loss": _number(loss),
        "calibration error": f"{_percent(plain['ece'])} → {_percent(found['ece'])}",
        "temperature": _number(calibration.temperature),
    }
    tiles = "".join(f"<div><b>{value}</b>{name}</div>" for name, value in shown.items() if value)
    return f'<section class="tiles">{tiles}</section>'


def _curves(lines: list[dict[str, Any]]) -> str:
    kinds = {"train": "train", "validation": "validation", "validation, moving average": "ema/validation"}

    charts = [
        line_chart("Loss", {label: points(lines, f"{kind}/loss") for label, kind in kinds.items()}, "step", log=True),
        line_chart("Accuracy", {label: points(lines, f"{kind}/accuracy") for label, kind in kinds.items()}, "step"),
        line_chart("Learning rate", {"learning rate": points(lines, "learning_rate")}, "step"),
    ]
    return f'<h2>Curves</h2><section class="charts">{"".join(charts)}</section>'


def _classes(found: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(row['name'])}</th><td>{_percent(row['precision'])}</td><td>{_percent(row['recall'])}</td>"
        f"<td>{_percent(row['f1'])}</td><td>{row['support']:,}</td><td>{_number(row['auc'])}</td></tr>"
        for row in found["classes"]
    )
    head = "<tr><th>class</th><th>precision</th><th>recall</th><th>F1</th><th>images</th><th>AUC</th></tr>"
    return f'<h2>Classes</h2><div class="wide"><table id="classes">{head}{rows}</table></div>'


def _confusion(found: dict[str, Any], names: tuple[str, ...]) -> str:
    if "confusion" not in found:
        return ""
    matrix = np.asarray(found["confusion"])
    if len(names) > MOST_CLASSES:
        wrong = matrix * (1 - np.eye(len(names), dtype=int))
        pairs = [divmod(int(i), len(names)) for i in np.argsort(-wrong, axis=None)[:30]]
        rows = "".join(
            f"<tr><th>{escape(names[a])}</th><td>{escape(names[b])}</td><td>{wrong[a, b]}</td></tr>"
            for a, b in pairs
            if wrong[a, b]
        )
        head = "<tr><th>class</th><th>taken for</th><th>images</th></tr>"
        return f'<h2>Confused most</h2><div class="wide"><table id="confusion">{head}{rows}</table></div>'
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(
            f'<td style="--share:{share[i, j]:.3f}"{" class=right" if i == j else ""}>{matrix[i, j] or ""}</td>'
            for j in range(len(names))
        )
        + "</tr>"
        for i, name in enumerate(names)
    )
    table = f'<table id="confusion" class="confusion"><tr><th>truth \\ said</th>{head}</tr>{rows}</table>'
    return f'<h2>Confusion</h2><div class="wide">{table}</div>'


def worst(predictions: Predictions, temperature: float) -> list[tuple[int, int, float]]:
    """The most confident mistakes: (place among the predictions, class that is wrong, its probability)."""
    multilabel = predictions.labels.ndim == 2
    p = probabilities(predictions.logits, multilabel, temperature)
    wrong = (
        p * (1 - predictions.labels)
        if multilabel
        else np.where(np.arange(p.shape[1]) == predictions.labels[:, None], 0.0, p)
    )
    label, confidence = wrong.argmax(1), wrong.max(1)
    mistaken = confidence > 0.5 if multilabel else p.argmax(1) != predictions.labels
    order = np.argsort(-confidence * mistaken)[: min(MISTAKES, int(mistaken.sum()))]
    return [(int(i), int(label[i]), float(confidence[i])) for i in order]


def _mistakes(run: FinishedRun, split: str, predictions: Predictions, calibration: Calibration) -> str:
    chosen = worst(predictions, calibration.temperature)
    if not chosen:
        return "<h2>Mistakes</h2><p>There are none.</p>"
    config, source, names = run.config, run.dataset.split(split), run.class_names
    size, look = config.data.eval_image_size or config.data.image_size, config.augment
    places = [int(predictions.index[i]) for i, _, _ in chosen]
    seen = [fit(source[i][0], size, look.eval_crop, look.interpolation, config.data.channels) for i in places]
    model: Any = run.model
    images = normalize(jnp.asarray(np.stack(seen)), config.data.mean, config.data.std, model.dtype)
    variables = run.state.ema or {"params": run.state.params, "batch_stats": run.state.batch_stats}
    spoke = [None] * len(chosen)
    if not isinstance(model, ViT):
        spoke = list(np.asarray(grad_cam(model, variables, images, jnp.asarray([label for _, label, _ in chosen]))))
    cards = []
    for (i, label, confidence), place, picture, heat in zip(chosen, places, seen, spoke, strict=True):
        truth = predictions.labels[i]
        true = ", ".join(names[k] for k in np.flatnonzero(truth)) if truth.ndim else names[truth]
        where = escape(Path(source.describe(place)).name)
        cards.append(
            f'<figure class="mistake">{_picture(as_shown(picture))}'
            f"{'' if heat is None else _picture(overlay(picture, heat))}"
            f"<figcaption><b>{escape(names[label])}</b> {confidence:.0%}, in truth {escape(true or 'nothing')}"
            f"<small>{where}</small></figcaption></figure>"
        )
    text = "The most confident ones, and what in them spoke for the wrong class (Grad-CAM)."
    return f'<h2>Mistakes</h2><p>{text}</p><section class="mistakes">{"".join(cards)}</section>'


def _picture(pixels: Any) -> str:
    from PIL import Image

    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    factor = max(1, -(-THUMBNAIL // image.height))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _speed(lines: list[dict[str, Any]], folder: Path) -> str:
    rows = []
    for name, label in (
        ("images_per_second", "images a second"),
        ("data_wait", "waiting for data, share of the time"),
    ):
        if values := [value for _, value in points(lines, name)]:
            rows.append(f"<tr><th>{label}, median</th><td>{statistics.median(values):.4g}</td></tr>")
    try:
        summary = read_summary(folder)
    except InputError as error:
        say(f"WARNING: {error}; the report leaves it out", error=True)
        summary = None
    if summary:
        rows += [f"<tr><th>{name}</th><td>{escape(str(summary[name]))}</td></tr>" for name in ("device", "steps")]
        rows.append(f"<tr><th>seconds of the last start</th><td>{summary['seconds']:.1f}</td></tr>")
        rows += [f"<tr><th>{escape(n)}</th><td>{escape(v)}</td></tr>" for n, v in summary["versions"].items()]
    return f'<h2>Run</h2><div class="wide"><table id="run">{"".join(rows)}</table></div>'


def _details(run: FinishedRun, folder: Path) -> str:
    recipe = escape(json.dumps(to_dict(run.config), indent=2))
    bad = sorted(run.bad.names)
    unread = f"<p>Not counted, since they cannot be decoded: {escape(', '.join(bad[:50]))}</p>" if bad else ""
    return f"{unread}<details><summary>Recipe</summary><pre>{recipe}</pre></details>"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


PAGE = (Path(__file__).with_name("report_page.html")).read_text()
"""The empty page, with its style."""
