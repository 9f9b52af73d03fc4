"""Seconds of an epoch with the data on the device, and to a fixed accuracy in a short recipe, beside the same in torch.

The images are class folders (`--folder`, with `train` and `test`), such as CIFAR-10's. Both sides train the same
network with the same recipe: SGD with Nesterov momentum, one cycle, pad-and-crop and flips, batch 128. All test images
are evaluated every `EVERY` steps, which is not timed; the first time that they come to `--target` counts.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import MEMORY, Contender, alternate, has_gpu, options, print_table, row, with_ratios, write

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH, RATE, DECAY = 128, 0.2, 5e-4
EVERY = 100  # a whole number of our calls, which have 5 steps, or 50 on a GPU


def decode(folder: str, into: Path) -> int:
    """Writes the arrays of both splits of a folder of 32x32 pictures for `arrays`; returns the training images."""
    from resnet_jax.config import Config, DataConfig
    from resnet_jax.data.loader import BadImages, whole_split
    from resnet_jax.data.sources import load_dataset
    from resnet_jax.recipe_files import load_config
    from resnet_jax.training.resolve import filled

    config, bad = Config(data=DataConfig(dataset=f"folder:{folder}", image_size=32)), BadImages("error")
    config = filled(config, load_config("digits_resnet20"))
    dataset = load_dataset(config.data, seed=0, hold_out=False)
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        np.savez(into / name, **whole_split(split, config, bad))
    return len(dataset.train)


def arrays(folder: str) -> list[dict[str, Any]]:
    """Returns training and test split in memory."""
    return [dict(np.load(Path(folder) / f"{name}.npz")) for name in ("train", "test")]


def timed(steps: int, advance: Callable[[int], None], accuracy: Callable[[], float]) -> dict[str, Any]:
    """Trains that many steps by `advance(count)`, which waits until they are done, and times that without `accuracy`.

    Returns:
      `seconds` and `accuracy` at the end, and `curve`: both after every `EVERY` steps.
    """
    seconds, curve = 0.0, []
    for done in range(0, steps, EVERY):
        began = time.perf_counter()
        advance(min(EVERY, steps - done))
        seconds += time.perf_counter() - began
        curve.append((seconds, accuracy()))
    return {"seconds": seconds, "accuracy": curve[-1][1], "curve": curve}


def time_to(target: float, curve: list[tuple[float, float]]) -> float | None:
    """Returns the seconds after which a curve first reaches the target."""
    return next((seconds for seconds, accuracy in curve if accuracy >= target), None)


def steps_in(epochs: int, images: int) -> int:
    """Returns the steps that both sides take: a whole number of our calls."""
    return max(1, round(epochs * images / BATCH / in_a_call())) * in_a_call()


def in_a_call() -> int:
    """Returns how many of our steps one call of the device makes."""
    return 50 if has_gpu() else 5


def ours(name: str, folder: str, epochs: int, seeds: int) -> Any:
    """Returns a function whose calls train from scratch, each with the next seed; the time is that of the epochs alone,
    compiled before.
    """
    import jax
    import jax.numpy as jnp

    from resnet_jax.training.metrics import add, means
    from resnet_jax.training.programs import recipe_eval_step
    from resnet_jax.training.sharding import compiler_options, run_in_caller

    run_in_caller()
    train, test = arrays(folder)
    in_one_call, steps = in_a_call(), steps_in(epochs, len(train["label"]))
    data = jax.device_put(train)
    prepared = [prepare(name, data, seed, epochs, steps, in_one_call) for seed in range(seeds)]
    model, config = prepared[0][2:]
    evaluate = jax.jit(recipe_eval_step(config, model), compiler_options=compiler_options())
    left = iter(prepared)

    def call() -> dict[str, Any]:
        new_state, run, *_ = next(left)
        state = jax.block_until_ready(new_state())

        def advance(count: int) -> None:
            nonlocal state
            for _ in range(count // in_one_call):
                state, sums = run(state, data, in_one_call)
            jax.block_until_ready((state, sums))

        def accuracy() -> float:
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            parts = []
            for start in range(0, len(test["label"]), 1000):
                batch = {name: jnp.asarray(values[start : start + 1000]) for name, values in test.items()}
                parts.append(evaluate(variables, batch | {"mask": jnp.ones(len(batch["label"]), bool)})[0])
            return means(add(parts))["accuracy"]

        return timed(steps, advance, accuracy)

    return call


def prepare(name: str, data: Any, seed: int, epochs: int, steps: int, in_one_call: int) -> tuple[Any, Any, Any, Any]:
    """Returns what makes the first state of a seed, the compiled steps, the model and the recipe."""
    import jax

    from resnet_jax import config as c
    from resnet_jax.training.build import build_model, state_maker
    from resnet_jax.training.optimizers import make_optimizer, make_schedule
    from resnet_jax.training.programs import draw_from, recipe_step
    from resnet_jax.training.resolve import resolve
    from resnet_jax.training.several_steps import steps_on_device
    from resnet_jax.training.sharding import compiler_options, make_mesh

    config = c.Config(
        model=c.ModelConfig(name=name, zero_init_last=False),
        data=c.DataConfig(image_size=32, mean=MEAN, std=STD),
        augment=c.AugmentConfig(pad=4, flip="random"),
        optimizer=c.OptimizerConfig(learning_rate=RATE, weight_decay=DECAY, decay_rules=((".*", 1.0),)),
        schedule=c.ScheduleConfig(name="one_cycle"),
        train=c.TrainConfig(batch_size=BATCH, seed=seed, ema_decay=None),
    )
    config = resolve(config).config
    model, schedule = build_model(config, 10), make_schedule(config, steps, steps / epochs)
    train_step = recipe_step(config, model, make_optimizer(config.optimizer, schedule))
    device_step = steps_on_device(train_step, draw_from(config, make_mesh(1)), in_one_call)
    new_state = state_maker(config, model, schedule)
    run = jax.jit(device_step, donate_argnums=0, compiler_options=compiler_options())
    return new_state, run.lower(new_state(), data, in_one_call).compile(), model, config


def torch_epochs(name: str, folder: str, epochs: int, seeds: int) -> Any:
    """Returns what `ours` does, of torch eager, data on the device, channels_last."""
    import torch

    from benchmarks.torch_models import sgd, synchronize, torch_model

    train, test = arrays(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (MEAN, STD))

    def tensors(split: Any) -> tuple[Any, Any]:
        images = torch.from_numpy(split["image"]).to(device).permute(0, 3, 1, 2)
        return images, torch.from_numpy(split["label"].astype(np.int64)).to(device)

    (images, labels), (test_images, test_labels) = tensors(train), tensors(test)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    steps, left = steps_in(epochs, len(labels)), iter(range(seeds))

    def batch_of(index: Any) -> Any:
        corner = torch.randint(0, 9, (2, len(index)), device=device)
        rows = corner[0][:, None] + torch.arange(32, device=device)
        columns = corner[1][:, None] + torch.arange(32, device=device)
        mirrored = torch.rand(len(index), device=device) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        cut = padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return ((cut.permute(0, 3, 1, 2).float() - mean) / std).to(memory_format=torch.channels_last)

    def call() -> dict[str, Any]:
        torch.manual_seed(next(left))
        model = torch_model(name, 10).to(device, memory_format=torch.channels_last).train()
        optimizer = sgd(model, RATE, DECAY)
        cycle = {"cycle_momentum": False, "final_div_factor": 1e4}
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, **cycle)
        order = [torch.randperm(len(labels), device=device) for _ in range(epochs + 1)]
        batches = iter(torch.cat(order).split(BATCH))
        synchronize(device)

        def advance(count: int) -> None:
            for index in islice(batches, count):
                loss = torch.nn.functional.cross_entropy(model(batch_of(index)), labels[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
            synchronize(device)

        def right(images: Any, labels: Any) -> int:
            return (model((images.float() - mean) / std).argmax(1) == labels).sum().item()

        def accuracy() -> float:
            model.eval()
            with torch.inference_mode():
                found = sum(map(right, test_images.split(1000), test_labels.split(1000)))
            model.train()
            return found / len(test_labels)

        return timed(steps, advance, accuracy)

    return call


def main() -> None:
    """Trains with three seeds on both sides."""
    flags = options(__doc__ or "", folder="", epochs=4, models="cifar_resnet20", seeds=3, target=0.75)
    if not flags.folder:
        raise SystemExit("give --folder with train/<class>/* and test/<class>/*")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        images = decode(flags.folder, Path(folder))
        for name in flags.models.split(","):
            given = {"name": name, "folder": folder, "epochs": flags.epochs, "seeds": flags.seeds}
            contenders = [
                Contender("resnet_jax", ours, given, MEMORY, ("jax", "flax.linen", "optax")),
                Contender("torch eager", torch_epochs, given, MEMORY, ("torch",)),
            ]
            results = alternate(contenders, rounds=flags.seeds, warmup=0)
            for table in (at_the_end, to_target):
                rows += with_ratios([table(name, kind, result, flags) for kind, result in results.items()])
            write("epoch", rows, folder_images=images)
    print_table(rows)
    for r in (r for r in rows if "accuracy_mean" in r):
        print(f"{r['case']} {r['contender']}: accuracy {r['accuracy_mean']:.2%} +- {r['accuracy_deviation']:.2%}")


def at_the_end(name: str, kind: str, result: dict[str, Any], flags: Any) -> dict[str, Any]:
    """Returns a row from the runs of all seeds: epochs a second, and the accuracy at the end."""
    case = f"{flags.epochs} epochs {name}"
    if "error" in result:
        return row(case, kind, result, flags.epochs, "epochs")
    accuracies = [kept["accuracy"] for kept in result["kept"]]
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    more = {"accuracies": accuracies, "accuracy_mean": statistics.mean(accuracies), "accuracy_deviation": deviation}
    return row(case, kind, result, flags.epochs, "epochs", **more, curves=[kept["curve"] for kept in result["kept"]])


def to_target(name: str, kind: str, result: dict[str, Any], flags: Any) -> dict[str, Any]:
    """Returns a row from the runs of all seeds: how many trainings to `--target` a second."""
    times = [time_to(flags.target, kept["curve"]) for kept in result.get("kept", [])]
    if None in times:
        result = {"error": f"{times.count(None)} of {len(times)} seeds did not come to it"}
    elif times:
        result = result | {"seconds": times}
    return row(f"{name} to {flags.target:.0%} of {flags.epochs} epochs", kind, result, 1, "runs")


if __name__ == "__main__":
    main()
