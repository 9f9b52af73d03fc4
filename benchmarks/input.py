"""Images a second that are decoded, cropped (random resized, 224) and flipped: one core alone, then whole loaders.

The pictures are a folder of JPEGs: `--folder`, by default the 200 photographs beside a full checkout. Those of a
camera's size are 64 of them beside each other, so that each part is as sharp as a photograph.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import MEMORY, Contender, alternate, has_gpu, options, print_table, row, with_ratios, write

SIZE, LARGE = 224, 10
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def files_in(folder: str) -> list[str]:
    """Returns the JPEGs of a folder."""
    return [str(path) for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]


def large_pictures(folder: str, into: str, count: int) -> None:
    """Writes JPEGs of 12 million pixels, each of 64 pictures of the folder."""
    from PIL import Image

    files = files_in(folder)
    for n in range(count):
        whole = Image.new("RGB", (4000, 3000))
        for i in range(64):
            with Image.open(files[(64 * n + i) % len(files)]) as part:
                whole.paste(part.convert("RGB"), (i % 8 * 500, i // 8 * 375))
        whole.save(Path(into) / f"{n}.jpg", quality=90)


MORE: dict[str, dict[str, Any]] = {
    "color_jitter": {"color_jitter": 0.4},
    "randaugment": {"randaugment": 9},
    "trivial_augment": {"trivial_augment": True},
    "erasing": {"erasing": 1.0},
}
"""What is done beside cropping and flipping, as fields of our recipe."""


def ours_in_process(folder: str, more: str = "") -> Any:
    """Returns our transform, called for one file after another; it gives uint8, since the device normalises."""
    from resnet_jax.config import AugmentConfig
    from resnet_jax.data.transforms import augment

    files, random = files_in(folder), {"crop": "random_resized", "flip": "random", "interpolation": "bilinear"}
    recipe = AugmentConfig(**(random | MORE.get(more, {})))

    def call() -> None:
        for i, path in enumerate(files):
            augment(path, np.random.default_rng([0, i]), SIZE, recipe)

    return call


def torchvision_transform(more: str = "") -> Any:
    """Returns what torchvision's references do: Pillow, random resized crop, flip, to a normalised float tensor."""
    import torch

    from benchmarks.torch_models import import_torchvision

    torch.set_num_threads(1)
    import_torchvision()
    from torchvision import transforms

    policies = {
        "color_jitter": [transforms.ColorJitter(0.4, 0.4, 0.4)],
        "randaugment": [transforms.RandAugment(2, 9)],
        "trivial_augment": [transforms.TrivialAugmentWide()],
    }
    crop = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    erase = [transforms.RandomErasing(1.0, value="random")] if more == "erasing" else []
    return transforms.Compose([*crop, *policies.get(more, []), transforms.ToTensor(), normalize, *erase])


def torch_in_process(folder: str, more: str = "") -> Any:
    """Returns torchvision's transform, called for one file after another."""
    from PIL import Image

    files, transform = files_in(folder), torchvision_transform(more)

    def call() -> None:
        for path in files:
            with Image.open(path) as image:
                transform(image.convert("RGB"))

    return call


def opencv_in_process(folder: str) -> Any:
    """Returns OpenCV's way as people use it: decode, cut out, resize with INTER_AREA (other pixels than Pillow's),
    flip; uint8.
    """
    import cv2

    cv2.setNumThreads(1)
    files = files_in(folder)

    def call() -> None:
        rng = np.random.default_rng(0)
        for path in files:
            image = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
            height, width = image.shape[:2]
            share = np.sqrt(rng.uniform(0.08, 1.0))
            h, w = max(1, int(height * share)), max(1, int(width * share))
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            image = cv2.resize(image[top : top + h, left : left + w], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
            np.ascontiguousarray(image[:, ::-1] if rng.random() < 0.5 else image)

    return call


def our_batches(folder: str, workers: int, batch: int) -> Any:
    """Yields batches of our whole loader: order, transform, workers, arrays on the device."""
    from resnet_jax.config import AugmentConfig, Config, DataConfig, TrainConfig
    from resnet_jax.data.dataset import FileSource
    from resnet_jax.data.loader import BadImages, train_batches
    from resnet_jax.training.sharding import make_mesh

    files = files_in(folder)
    config = dataclasses.replace(
        Config(),
        data=DataConfig(image_size=SIZE, on_device=False, workers=workers),
        augment=AugmentConfig(crop="random_resized", flip="random", interpolation="bilinear"),
        train=TrainConfig(batch_size=batch),
    )
    source = FileSource(tuple(files), (0,) * len(files))
    return train_batches(source, config, make_mesh(1), BadImages("error"), range(10**6))


def our_loader(folder: str, workers: int, passes: int) -> Any:
    """Returns our whole loader alone; each call reads the whole folder."""
    import jax

    batches, steps = our_batches(folder, workers, 50), len(files_in(folder)) * passes // 50

    return lambda: steady_seconds(lambda: jax.block_until_ready(next(batches)), steps)


def training(folder: str, batch: int, steps: int, real: bool) -> Any:
    """Returns training steps of resnet50, fed by our loader with one worker, or with one batch on the device."""
    import jax

    from benchmarks.checkpoint import prepared

    step, state, data = prepared(SIZE, batch)
    batches = our_batches(folder, 1, batch) if real else None

    def call() -> dict[str, float]:
        nonlocal state
        began, waited = time.perf_counter(), 0.0
        for _ in range(steps):
            asked = time.perf_counter()
            taken = jax.block_until_ready(next(batches)) if batches else data
            waited += time.perf_counter() - asked
            state, sums = step(state, taken)
            jax.block_until_ready((state, sums))
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "waiting": waited / seconds}

    return call


class Files:
    """A torch dataset over files."""

    def __init__(self, folder: str) -> None:
        self.files, self.transform = files_in(folder) * 1000, torchvision_transform()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB"))


def torch_loader(folder: str, workers: int, passes: int) -> Any:
    """Returns torch's DataLoader over the same files with as many workers."""
    from torch.utils.data import DataLoader

    loader = DataLoader(Files(folder), batch_size=50, num_workers=workers, prefetch_factor=2,
                        multiprocessing_context="fork")  # fmt: skip
    steps, batches = len(files_in(folder)) * passes // 50, iter(loader)

    return lambda: steady_seconds(lambda: next(batches), steps)


def steady_seconds(take: Any, steps: int) -> dict[str, float]:
    """Returns the seconds that a number of batches takes, after those that were made ahead have been taken."""
    for _ in range(16):
        take()
    began = time.perf_counter()
    for _ in range(steps):
        take()
    return {"seconds": time.perf_counter() - began}


def fed_steps(folder: str, rounds: int) -> list[dict[str, Any]]:
    """Returns rows of training steps with pictures from the disk and with none; ours with the share of time spent
    waiting.
    """
    batch, steps = (256, 20) if has_gpu() else (16, 3)
    given = {"folder": folder, "batch": batch, "steps": steps}
    pair = [
        Contender("resnet_jax", training, given | {"real": True}, MEMORY | ONE_THREAD),
        Contender("synthetic data", training, given | {"real": False}, MEMORY | ONE_THREAD),
    ]
    rows = []
    for name, times in alternate(pair, rounds).items():
        waiting = [kept["waiting"] for kept in times.get("kept", [])]
        shares = {"waiting": statistics.median(waiting)} if waiting and name == "resnet_jax" else {}
        rows.append(row(f"train resnet50 from the disk, batch {batch}", name, times, batch * steps, "images", **shares))
    return rows


def main() -> None:
    """Runs all cases."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "imagenet_samples"
    flags = options(__doc__ or "", folder=str(beside))
    folder = flags.folder
    count = len(files_in(folder))
    if not count:
        raise SystemExit(f"{folder} holds no JPEGs: give --folder")
    rounds = flags.rounds or (3 if flags.quick else 9)
    one = [
        Contender("resnet_jax", ours_in_process, {"folder": folder}, ONE_THREAD),
        Contender("torchvision", torch_in_process, {"folder": folder}, ONE_THREAD),
        Contender("OpenCV", opencv_in_process, {"folder": folder}, ONE_THREAD),
    ]
    rows: list[dict[str, Any]] = [row("one core", c, t, count, "images") for c, t in alternate(one, rounds).items()]
    for more in MORE:
        given = {"folder": folder, "more": more}
        pair = [
            Contender("resnet_jax", ours_in_process, given, ONE_THREAD),
            Contender("torchvision", torch_in_process, given, ONE_THREAD),
        ]
        times = alternate(pair, max(3, rounds // 2))
        rows += [row(f"one core, {more}", c, t, count, "images") for c, t in times.items()]
    with tempfile.TemporaryDirectory() as large:
        large_pictures(folder, large, LARGE)
        pair = [Contender(c.name, c.build, {"folder": large}, ONE_THREAD) for c in one]
        times = alternate(pair, max(3, rounds // 2))
        rows += [row("one core, 12 megapixels", c, t, LARGE, "images") for c, t in times.items()]
    passes = 3
    for workers in (1, 2):
        common = {"folder": folder, "workers": workers, "passes": passes}
        whole = [
            Contender("resnet_jax", our_loader, common, MEMORY | ONE_THREAD),
            Contender("torch", torch_loader, common, ONE_THREAD),
        ]
        times = alternate(whole, max(3, rounds // 2))
        rows += [row(f"loader, {workers} workers", c, t, count * passes, "images") for c, t in times.items()]
    rows = with_ratios(rows + fed_steps(folder, max(3, rounds // 2)))
    print_table(rows)
    write("input", rows, pictures=count)


if __name__ == "__main__":
    main()
