"""`inspect.html` and `inspect.csv`: what was found in a dataset, to look at and to act on."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.data.folders import printable
from resnet_jax.data.inspect import Pair
from resnet_jax.data.show import sized
from resnet_jax.files import to_json, write_whole
from resnet_jax.predict.inspect_data import LEAST_HALF, SPLIT_SHARE, Inspection, TwoInOne
from resnet_jax.runs.report_page import INSPECTION, THUMBNAIL, data_uri, page_template, place_of

CARDS = 24
"""Findings of a kind that the page shows; the table has all."""
GROUP = 8
"""Pictures that the page shows of each half of a class."""
COLUMNS = (
    *("finding", "picture", "index", "split", "label", "suggested", "score"),
    *("other_picture", "other_index", "other_split", "other_label"),
)
"""Of the table."""


def write_inspection(found: Inspection, folder: Path) -> Path:
    """Writes `inspect.html`, `inspect.csv` and `inspect.json` into a folder, which is made; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = findings(found)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "inspect.csv", printable(text.getvalue()))
    record = summary_of(found)
    write_whole(folder / INSPECTION, to_json(record, indent=1) + "\n")
    page = page_template(Path(__file__).with_name("inspect_page.html")).render(
        record=record,
        title=place_of(found.dataset),
        verdict=verdict(found),
        splits={name: int(np.sum(found.pictures.split == k)) for k, name in enumerate(found.pictures.splits)},
        sections=sections_of(found),
        joint=joint_of(found),
        two=two_of(found),
        undecodable=list(found.pictures.undecodable)[:50],
        notes=found.notes,
    )
    write_whole(folder / "inspect.html", printable(page))
    return folder / "inspect.html"


def findings(found: Inspection) -> list[dict[str, Any]]:
    """Returns the rows of the table, all findings of a kind one after the other, the clearest first."""
    rows: list[dict[str, Any]] = []
    for kind, pairs in (("twins across splits", found.across()), ("twins in a split", found.inside())):
        for pair in pairs:
            leaves, stays = to_remove(found, pair)
            differ = labelled(found, leaves) != labelled(found, stays)
            suggested = "check both labels, remove one" if differ else "remove"
            rows.append(row_of(found, kind, leaves, suggested, pair.likeness, stays))
    if found.doubtful is not None and found.likely is not None:
        for i, label in zip(found.doubtful.suspects, found.doubtful.suggested, strict=True):
            score = 1 - float(found.likely[i, found.pictures.labels[i]])
            rows.append(row_of(found, "doubtful label", int(i), found.class_names[label], score))
    for i in found.unlike:
        rows.append(row_of(found, "unlike all others", int(i), "look at", float(found.distance[i])))
    for two in found.two:
        if two.found:
            halves = f"look whether it is two: {two.sizes[0]} and {two.sizes[1]} pictures"
            label = {"label": found.class_names[two.label], "suggested": halves, "score": f"{two.share:.4g}"}
            rows.append({"finding": "class of two"} | label)
    return rows


def row_of(
    found: Inspection, kind: str, i: int, suggested: str, score: float, other: int | None = None
) -> dict[str, Any]:
    """Returns one row of the table."""
    row = {"finding": kind, "suggested": suggested, "score": f"{score:.4g}"}
    for prefix, which in (("", i), ("other_", other)):
        if which is not None:
            row[f"{prefix}picture"] = found.pictures.name(which)
            row[f"{prefix}index"] = str(found.pictures.index[which])
            row[f"{prefix}split"] = found.pictures.splits[found.pictures.split[which]]
            row[f"{prefix}label"] = labelled(found, which)
    return row


def labelled(found: Inspection, i: int) -> str:
    """Returns the names of a picture's classes; empty where labels are no classes."""
    if not found.class_names:
        return ""
    label = found.pictures.labels[i]
    return ";".join(found.class_names[k] for k in (np.flatnonzero(label) if label.ndim else [label]))


def to_remove(found: Inspection, pair: Pair) -> tuple[int, int]:
    """Returns which picture of a pair to remove, and which stays: of two splits that of the earlier one (training, then
    validation), so that what is measured on stays; inside a split the second.
    """
    of_first, of_second = found.pictures.split[pair.first], found.pictures.split[pair.second]
    return (pair.first, pair.second) if of_first < of_second else (pair.second, pair.first)


def summary_of(found: Inspection) -> dict[str, Any]:
    """Returns the counts, as `inspect.json` holds them."""
    doubtful = found.doubtful
    estimate = None if doubtful is None else float(len(found.pictures) * (1 - np.trace(doubtful.joint)))
    differ = sum(labelled(found, pair.first) != labelled(found, pair.second) for pair in found.pairs)
    lines = [
        (
            "twins across splits",
            len(found.across()),
            "pairs in two splits: what is measured is known by heart",
        ),
        ("twins in a split", len(found.inside()), "pairs inside a split"),
        ("twins with different labels", differ, "of these pairs, in one split or in two"),
    ]
    if doubtful is not None:
        lines.append(("doubtful labels", len(doubtful.suspects), "off the diagonal of the confident joint"))
    lines.append(("unlike all others", len(found.unlike), "far from their nearest neighbours among the features"))
    if found.two:
        lines.append(("classes of two", sum(two.found for two in found.two), "whose pictures fall into two groups"))
    return {
        "dataset": found.dataset,
        "pictures": len(found.pictures),
        "features": found.features,
        "agreement": found.agreement,
        "wrong_labels_estimated": estimate,
        "findings": [{"name": name, "count": count, "note": note} for name, count, note in lines],
        "undecodable": len(found.pictures.undecodable),
    }


def verdict(found: Inspection) -> str:
    """Returns one sentence on what was found."""
    across, count = found.across(), len(found.pictures)
    if across:
        known = {i for pair in across for i in (pair.first, pair.second) if found.pictures.split[i]}
        return f"{len(known):,} of the pictures that are measured on are in another split too."
    problems = len(found.inside()) + (0 if found.doubtful is None else len(found.doubtful.suspects))
    if not problems:
        return "No doubts."
    doubts = f"doubt{'s' * (problems != 1)} on {count:,} pictures."
    if len(found.pictures.splits) == 1:
        return f"{problems:,} {doubts}"
    return f"No picture is in two splits; {problems:,} other {doubts}"


def agreement_line(agreement: float) -> str:
    """Returns the figure to read first in words: how far the doubtful labels can be trusted."""
    return f"the probe agrees with {agreement:.1%} of the labels: the rest are its mistakes or wrong labels"


def sections_of(found: Inspection) -> list[dict[str, Any]]:
    """Returns the sections of the page that show pictures: `title`, `text`, `cards`, `count`."""

    def pair_card(pair: Pair) -> dict[str, Any]:
        notes = [f"likeness {pair.likeness:.3f}", *(["mirrored"] if pair.mirrored else [])]
        return {"pictures": [picture_of(found, i) for i in to_remove(found, pair)], "note": ", ".join(notes)}

    def label_card(place: int) -> dict[str, Any]:
        assert found.doubtful is not None and found.likely is not None
        i, label = int(found.doubtful.suspects[place]), int(found.doubtful.suggested[place])
        given = float(found.likely[i, found.pictures.labels[i]])
        note = f"labelled {labelled(found, i)} ({percent(given)}), held for {found.class_names[label]}"
        return {"pictures": [picture_of(found, i)], "note": f"{note} ({percent(float(found.likely[i, label]))})"}

    def unlike_card(i: int) -> dict[str, Any]:
        return {"pictures": [picture_of(found, i)], "note": f"{found.distance[i]:.1f} times the usual distance"}

    across, inside = found.across(), found.inside()
    sections = [
        section("Twins across splits", TWINS_ACROSS, across, pair_card),
        section("Twins in a split", TWINS_INSIDE, inside, pair_card),
    ]
    if found.doubtful is not None:
        count = len(found.doubtful.suspects)
        sections.append(section("Doubtful labels", DOUBTFUL, list(range(count)), label_card))
    sections.append(section("Unlike all others", UNLIKE, [int(i) for i in found.unlike], unlike_card))
    return sections


TWINS_ACROSS = (
    "The same picture, as it is, mirrored, recompressed or cropped a little, in two splits. The first of each pair is "
    "the one to remove, so that what is measured on stays."
)
TWINS_INSIDE = "The same picture twice in one split; the first of each pair is the one to remove."
DOUBTFUL = (
    "Labels that a probe, fitted without the picture, holds for wrong, by confident learning; the least probable "
    "first. Look at each: the probe errs too, and the more, the less it agrees with the other labels."
)
UNLIKE = "Pictures far from their nearest neighbours: broken, rare, or of something else."


def section(title: str, text: str, items: list[Any], card: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Returns a section with the first `CARDS` of its findings."""
    return {"title": title, "text": text, "count": len(items), "cards": [card(item) for item in items[:CARDS]]}


def picture_of(found: Inspection, i: int) -> dict[str, Any]:
    """Returns what the page shows of a picture."""
    pixels = found.pictures.shown(i, found.channels)
    split = found.pictures.splits[found.pictures.split[i]]
    return {
        "image": data_uri(sized(pixels, THUMBNAIL, 2 * THUMBNAIL)),
        "name": found.pictures.name(i),
        "file": Path(found.pictures.name(i)).name,
        "where": ", ".join(word for word in (split, labelled(found, i)) if word),
    }


def joint_of(found: Inspection) -> list[dict[str, Any]]:
    """Returns the pairs of classes that are confused most: given label, likely class, the estimated number."""
    if found.doubtful is None:
        return []
    off = found.doubtful.joint * (1 - np.eye(len(found.class_names))) * len(found.pictures)
    rows = [divmod(int(place), len(found.class_names)) for place in np.argsort(-off, axis=None, kind="stable")[:10]]
    names = found.class_names
    return [{"given": names[i], "likely": names[j], "count": off[i, j]} for i, j in rows if off[i, j] >= 0.5]


def two_of(found: Inspection) -> dict[str, Any]:
    """Returns what the page says of classes that are two: the rule, a line for each class, pictures of those found."""

    def halves(two: TwoInOne) -> list[list[dict[str, Any]]]:
        groups = two.members[: two.sizes[0]], two.members[two.sizes[0] :]
        return [[picture_of(found, int(i)) for i in spread(group, GROUP)] for group in groups]

    rows = [
        {"name": found.class_names[two.label], "share": two.share, "sizes": two.sizes, "found": two.found}
        for two in found.two
    ]
    shown = [{"name": found.class_names[two.label], "halves": halves(two)} for two in found.two if two.found][:6]
    return {"rows": rows[:20], "shown": shown, "share": SPLIT_SHARE, "least": LEAST_HALF}


def spread(values: np.ndarray, most: int) -> np.ndarray:
    """Returns at most `most` values, evenly over an array."""
    return values[np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))]


def percent(value: float) -> str:
    """Returns a share as the page writes it."""
    return f"{100 * value:.0f}\N{NO-BREAK SPACE}%"
