"""How well `resnet-jax inspect` finds what is wrong with data: flipped labels and twins, planted into a folder.

From train/<class>/* and test/<class>/* of --folder as many pictures are drawn as --pictures says, an eighth of them
from the test split; five percent of the labels are changed to another class, and copies of 50 training pictures are put
into the test split: mirrored, recompressed (quality 40), cropped by 2 pixels at each edge, and all three. Precision is
that of as many of the first findings as were planted; chance is the share of what was planted among all that could be
named. Twins that the pictures had before count as wrong in `all pairs across splits`, and are listed.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import options, write

TWINS, FLIPPED, TESTED = 50, 0.05, 8
KINDS = ("mirrored", "recompressed", "cropped", "all three")
"""What is done to a copy, one after the other."""


def draw(folder: Path, count: int, seed: int) -> list[tuple[Path, str, str]]:
    """Returns (file, split, class) of as many pictures of each class."""
    import numpy as np

    rng, rows = np.random.default_rng(seed), []
    for split, share in (("train", 1 - 1 / TESTED), ("test", 1 / TESTED)):
        classes = sorted(path.name for path in (folder / split).iterdir())
        for name in classes:
            files = sorted((folder / split / name).iterdir())
            wanted = round(count * share / len(classes))
            rows += [(files[i], split, name) for i in rng.permutation(len(files))[:wanted]]
    return rows


def altered(file: Path, kind: str, path: Path) -> None:
    """Writes a copy of a picture that is changed as `KINDS` say."""
    from PIL import Image

    picture: Any = Image.open(file).convert("RGB")
    if kind in ("mirrored", "all three"):
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if kind in ("cropped", "all three"):
        picture = picture.crop((2, 2, picture.width - 2, picture.height - 2))
    picture.save(path, quality=40 if kind in ("recompressed", "all three") else 95)


def plant(rows: list[tuple[Path, str, str]], work: Path, seed: int) -> tuple[Path, dict[str, str], dict[str, tuple]]:
    """Writes a table of the pictures with flipped labels and twins.

    Returns:
      The table; path -> true class of each flipped label; path -> (path of the original, kind) of each twin.
    """
    import csv

    import numpy as np

    rng = np.random.default_rng([seed, 1])
    names = sorted({name for _, _, name in rows})
    train = [i for i, (_, split, _) in enumerate(rows) if split == "train"]
    copied = rng.permutation(train)[:TWINS]
    untouched = np.setdiff1d(np.arange(len(rows)), copied)
    flipped = rng.permutation(untouched)[: round(FLIPPED * len(rows))]
    truth, twins, lines = {}, {}, [[str(file), name, split] for file, split, name in rows]
    for i in flipped.tolist():
        truth[lines[i][0]] = lines[i][1]
        lines[i][1] = str(rng.choice([name for name in names if name != lines[i][1]]))
    for place, i in enumerate(copied.tolist()):
        kind, path = KINDS[place % len(KINDS)], work / f"twin{place}.jpg"
        altered(rows[i][0], kind, path)
        twins[str(path)] = (str(rows[i][0]), kind)
        lines.append([str(path), rows[i][2], "test"])
    table = work / "planted.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["path", "label", "split"], *lines])
    return table, truth, twins


def measured(found: Any, truth: dict[str, str], twins: dict[str, tuple]) -> list[dict[str, Any]]:
    """Returns the rows: labels, labels of each class, twins, and of each kind how many were found."""
    import numpy as np

    pictures, names = found.pictures, found.class_names
    paths = np.asarray([pictures.name(i) for i in range(len(pictures))])
    wrong = np.isin(paths, list(truth))
    own = found.likely[np.arange(len(paths)), pictures.labels]
    first = np.argsort(own, kind="stable")[: wrong.sum()]
    rows = [row("labels", "all classes", wrong[first].mean(), wrong.mean(), int(wrong.sum()))]
    right = [names[found.likely[i].argmax()] == truth[paths[i]] for i in first if wrong[i]]
    rows[0] |= {"suggested_right": float(np.mean(right)), "agreement": found.agreement}
    for label, name in enumerate(names):
        named = first[pictures.labels[first] == label]
        planted = wrong & (pictures.labels == label)
        chance = planted.sum() / (pictures.labels == label).sum()
        share = wrong[named].mean() if len(named) else 0.0
        recall = float(wrong[named].sum() / max(1, planted.sum()))
        rows.append(row("labels", f"labelled {name}", share, chance, len(named)) | {"recall": recall})
    doubtful = found.doubtful.suspects
    rows.append(
        row("labels", "off the confident joint's diagonal", wrong[doubtful].mean(), wrong.mean(), len(doubtful))
    )
    rows[-1]["recall"] = float(wrong[doubtful].sum() / wrong.sum())
    across = found.across()
    counts = np.bincount(pictures.split)
    chance = len(twins) / (counts[0] * counts[1])

    def planted(pair: Any) -> bool:
        a, b = paths[pair.first], paths[pair.second]
        return twins.get(b, ("",))[0] == a or twins.get(a, ("",))[0] == b

    hits = [planted(pair) for pair in across]
    ours = [hit for pair, hit in zip(across, hits, strict=True) if {paths[pair.first], paths[pair.second]} & set(twins)]
    rows.append(row("twins", "all pairs across splits", np.sum(hits[:TWINS]) / TWINS, chance, TWINS))
    rows.append(row("twins", "pairs with a planted picture", np.sum(ours[:TWINS]) / TWINS, chance, TWINS))
    rows.append(row("twins", "all that are named", np.mean(hits), chance, len(hits)) | {"recall": sum(hits) / TWINS})
    seen = {paths[pair.second] if paths[pair.second] in twins else paths[pair.first]
            for pair, hit in zip(across, hits, strict=True) if hit}  # fmt: skip
    for kind in KINDS:
        of_kind = [path for path, (_, how) in twins.items() if how == kind]
        rows.append({"case": "twins", "contender": kind, "found": len(seen & set(of_kind)), "n": len(of_kind)})
    before = [pair for pair in across if not {paths[pair.first], paths[pair.second]} & set(twins)]
    short = ["/".join(Path(path).parts[-3:]) for path in paths]
    listed = [[short[pair.first], short[pair.second], pair.likeness] for pair in before[:30]]
    what = {"case": "twins", "contender": "of the pictures before planting", "found": len(before)}
    rows.append(what | {"pairs": listed})
    return rows


def row(case: str, what: str, precision: Any, chance: Any, count: int) -> dict[str, Any]:
    """Returns one row: precision of `count` findings, and chance."""
    return {"case": case, "contender": what, "precision": float(precision), "chance": float(chance), "n": count}


def main() -> None:
    """Plants, inspects, counts."""
    flags = options(__doc__ or "", folder="", pictures=10_000, kernels=0, seed=0)
    if not flags.folder:
        raise SystemExit("give pictures in train/<class>/* and test/<class>/*: --folder")
    from resnet_jax.commands import prepare_jax
    from resnet_jax.predict.inspect_data import KERNELS, inspect_data

    prepare_jax()
    with tempfile.TemporaryDirectory() as work:
        drawn = draw(Path(flags.folder).resolve(), 500 if flags.quick else flags.pictures, flags.seed)
        table, truth, twins = plant(drawn, Path(work), flags.seed)
        began = time.perf_counter()
        kernels = 100 if flags.quick else flags.kernels or KERNELS
        found = inspect_data(f"csv:{table}", seed=flags.seed, kernels=kernels)
        seconds = time.perf_counter() - began
        rows = measured(found, truth, twins)
    for r in rows:
        figures = ", ".join(f"{k} {v:.3g}" for k, v in r.items() if isinstance(v, int | float))
        print(f"{r['case']:<8}{r['contender']:<48}{figures}")
    print(f"{len(drawn):,} pictures, {seconds:.0f} s, probe and labels agree in {found.agreement:.1%}")
    write("inspect", rows, pictures=len(drawn), kernels=kernels, seconds=seconds, agreement=found.agreement)


if __name__ == "__main__":
    main()
