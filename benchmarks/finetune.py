"""What fine-tuning and balancing bring: accuracies over seeds, not times.

With --folder: a small ResNet is trained on eight of the ten classes of a folder; then 50 pictures each of the other two
train it from scratch, as a linear probe, and fully. Without: twelve kinds of stripes, the commonest class with fifty
times as many pictures as the rarest, tested on as many of each.
"""

import csv
import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import options, write

SHOTS, NEW = 50, 2
CLASSES, MOST, LEAST, SIDE, TESTED = 12, 250, 5, 16, 40


def base(dataset: str, size: int, seed: int, epochs: float, batch: int, **sections: Any) -> Any:
    """Returns a recipe for cifar_resnet20 without averages and reports."""
    from resnet_jax import config as c

    default = c.Config()
    return dataclasses.replace(
        default,
        data=c.DataConfig(dataset=dataset, image_size=size, mean=(0.47,) * 3, std=(0.25,) * 3),
        augment=sections.pop("augment", c.AugmentConfig(crop="pad", pad=size // 8, flip="random")),
        train=c.TrainConfig(
            epochs=epochs,
            batch_size=batch,
            seed=seed,
            ema_decay=None,
            metric="none",
            eval_every_epochs=1e9,
            **sections.pop("train", {}),
        ),
        schedule=c.ScheduleConfig(warmup_epochs=min(2.0, 0.2 * epochs)),
        log=c.LogConfig(tensorboard=False, report=False, every_steps=100),
        **sections,
    )


def table(path: Path, rows: list[tuple[Path, str, str]]) -> str:
    """Writes a table of (picture, label, split); returns the name of its dataset."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return f"csv:{path}"


def transfer(root: Path, work: Path, seeds: int, epochs: float) -> list[dict[str, Any]]:
    """Returns rows of accuracies on the test pictures of the two new classes."""
    import numpy as np

    from resnet_jax import config as c
    from resnet_jax import train

    names = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())

    def files(split: str, classes: list[str]) -> list[tuple[Path, str, str]]:
        return [(path, name, split) for name in classes for path in sorted((root / split / name).iterdir())]

    old, new = names[:-NEW], names[-NEW:]
    whole = table(work / "old.csv", files("train", old) + files("test", old))
    first = train(base(whole, 32, 0, epochs, 128), work / "pretrained")
    print(f"pretrained on {len(old)} classes: {first['test']['accuracy']:.2%}")
    source = c.ModelConfig(name="cifar_resnet20", pretrained=str(work / "pretrained"))
    slow = c.OptimizerConfig(learning_rate=0.02, clip_norm=1.0)
    still = c.AugmentConfig(crop="none", flip="none")
    ways = {
        "from scratch": {},
        "from scratch, 4 x as long": {"longer": 4},
        "linear probe": {"model": source, "finetune": c.FinetuneConfig("linear_probe"), "augment": still},
        "full": {"model": source, "finetune": c.FinetuneConfig("full", layer_decay=0.7), "optimizer": slow},
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        chosen = []
        for name in new:
            rows = files("train", [name])
            chosen += [rows[i] for i in rng.permutation(len(rows))[:SHOTS]]
        few = table(work / f"few{seed}.csv", chosen + files("test", new))
        for way, sections in ways.items():
            sections = dict(sections)
            config = base(few, 32, seed, 40.0 * sections.pop("longer", 1), 20, **sections)
            found[way].append(train(config, work / f"{way}-{seed}")["test"]["accuracy"])
    return [line("transfer", way, "accuracy", values) for way, values in found.items()]


def stripes(work: Path, seed: int) -> str:
    """Writes twelve classes of noisy stripes, each of its own angle, from the commonest to the rarest."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    rows = []
    for k in range(CLASSES):
        count = round(MOST * (LEAST / MOST) ** (k / (CLASSES - 1)))
        for i in range(count + TESTED):
            angle = np.pi * (k + rng.normal(0, 0.25)) / CLASSES
            phase = rng.uniform(0, 2 * np.pi)
            wave = np.sin(0.9 * (x * np.cos(angle) + y * np.sin(angle)) + phase)
            pixels = 128 + 50 * wave[..., None] + rng.normal(0, 45, (SIDE, SIDE, 3))
            path = work / f"stripes{seed}" / f"{k:02d}-{i:03d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
            rows.append((path, f"angle{k:02d}", "train" if i < count else "test"))
    return table(work / f"stripes{seed}.csv", rows)


def imbalance(work: Path, seeds: int, epochs: float) -> list[dict[str, Any]]:
    """Returns rows of macro recalls."""
    from resnet_jax import config as c
    from resnet_jax import train

    ways: dict[str, dict[str, Any]] = {
        "nothing": {},
        "class_weights balanced": {"train": {"class_weights": "balanced"}},
        "class_weights effective_number": {"train": {"class_weights": "effective_number"}},
        "focal": {"train": {"loss": "focal"}},
        "sampling balanced": {"sampling": "balanced"},
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(seeds):
        dataset = stripes(work, seed)
        for way, sections in ways.items():
            sections = dict(sections)
            sampling = sections.pop("sampling", "natural")
            still = c.AugmentConfig(crop="pad", pad=1, flip="none")
            config = base(dataset, SIDE, seed, epochs, 64, augment=still, **sections)
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, sampling=sampling))
            found[way].append(train(config, work / f"{way}-{seed}")["test"]["macro_recall"])
    return [line("imbalance", way, "macro_recall", values) for way, values in found.items()]


def line(case: str, way: str, metric: str, values: list[float]) -> dict[str, Any]:
    """Prints and returns a row: mean and deviation over the seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    print(f"{case:<12}{way:<34}{metric} {statistics.mean(values):.2%} +- {spread:.2%}, n = {len(values)}")
    row = {"case": case, "contender": way, "unit": metric, "median": statistics.median(values), "n": len(values)}
    row |= {"quartiles": [min(values), max(values)], "mean": statistics.mean(values), "deviation": spread}
    return row | {"values": values}


def main() -> None:
    """Runs one of them; a folder holds train/<class>/* and test/<class>/*."""
    flags = options(__doc__ or "", folder="", seeds=3, epochs=5.0)
    with tempfile.TemporaryDirectory() as work:
        if flags.folder:
            write("finetune", transfer(Path(flags.folder).resolve(), Path(work), flags.seeds, flags.epochs))
        else:
            rows = imbalance(Path(work), flags.seeds, 4.0 if flags.quick else 15.0)
            write("finetune", rows, name="imbalance")


if __name__ == "__main__":
    main()
