"""Images a second of a whole training step: forward, backward, batch statistics, SGD with momentum."""

import time
from typing import Any

from benchmarks.limits import forward_flops, measure_limits
from benchmarks.measure import MEMORY, Contender, alternate, hardware, has_gpu, network_rows, options, write

STEPS = {"cpu": 2, "gpu": 10}
"""Steps of a large net that are timed together; on a CPU ours runs them in one call, as the loop does."""
PUBLISHED = 8000
"""Images a second of resnet50 on one H200 in MLPerf Training 4.0: MXNet with hand-written fused kernels, eight GPUs."""
OURS, THEIRS = ("jax", "flax.linen", "optax"), ("torch",)

ON_CPU = (("resnet50", 224, 16, "float32", 11), ("cifar_resnet20", 32, 128, "float32", 15),
          ("cifar_resnet18", 32, 128, "float32", 5))  # fmt: skip
ON_GPU = (("resnet50", 224, 256, "bfloat16", 15), ("resnet50", 224, 128, "float32", 10),
          ("cifar_resnet20", 32, 128, "float32", 10), ("cifar_resnet18", 32, 512, "bfloat16", 10))  # fmt: skip


def jax_train_step(
    name: str,
    batch: int,
    size: int,
    classes: int,
    dtype: str,
    example: bool,
    options: bool,
    in_one_call: int = 1,
    calls: int = 1,
) -> Any:
    """Returns a function that takes training steps of our network, or of Flax's example network, with our step.

    Args:
      name: of the model.
      batch: images of a step.
      size: side of an image in pixels.
      classes: number of logits.
      dtype: of the model, `float32` or `bfloat16`.
      example: take Flax's example network.
      options: set the compiler options that our loop sets.
      in_one_call: steps in one call of the device; a small net draws its batches from data on the device, a large one
        is given them.
      calls: until the function waits for the device.
    """
    import jax
    import numpy as np

    from benchmarks.flax_example import network
    from resnet_jax.config import AugmentConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
    from resnet_jax.training.optimizers import make_optimizer
    from resnet_jax.training.programs import draw_from, recipe_step
    from resnet_jax.training.resolve import resolve
    from resnet_jax.training.several_steps import steps_on_batches, steps_on_device
    from resnet_jax.training.sharding import batch_sharding, compiler_options, make_mesh, run_in_caller
    from resnet_jax.training.state import create_state

    if not example:
        run_in_caller()
    drawn = in_one_call > 1 and size == 32
    config = Config(
        model=ModelConfig(name=name, compute_dtype=dtype),
        data=DataConfig(image_size=size, on_device=drawn),
        augment=AugmentConfig(crop="none"),
        optimizer=OptimizerConfig(weight_decay=1e-4),
        train=TrainConfig(batch_size=batch, ema_decay=None),
    )
    config = resolve(config).config
    model = network(name, classes, dtype, example)
    optimizer = make_optimizer(config.optimizer, lambda step: 0.01)
    state = jax.jit(lambda: create_state(model, optimizer, jax.random.key(0), (size, size, 3), ema=False))()
    chosen = compiler_options() if options else {}
    function = recipe_step(config, model, optimizer)
    if in_one_call > 1:
        mesh = make_mesh(1)
        if drawn:
            function = steps_on_device(function, draw_from(config, mesh), in_one_call)
        else:
            function = steps_on_batches(function, batch_sharding(mesh), in_one_call)
    step_function = jax.jit(function, donate_argnums=0, compiler_options=chosen)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    data = jax.device_put({"image": images, "label": rng.integers(0, classes, batch, dtype=np.int32)})
    batches = data if drawn else (data,) * in_one_call
    given = (batches, jax.device_put(np.int32(in_one_call))) if in_one_call > 1 else (data,)

    def step() -> dict[str, float]:
        nonlocal state
        began = time.perf_counter()
        for _ in range(calls):
            state, sums = step_function(state, *given)
        jax.block_until_ready((state, sums))
        return {"seconds": (time.perf_counter() - began) / in_one_call / calls}

    return step


def torch_step(**arguments: Any) -> Any:
    """Returns PyTorch's training step; torch is imported in its own process."""
    from benchmarks.torch_models import torch_train_step

    return torch_train_step(**arguments)


def main() -> None:
    """Runs all cases that fit the hardware."""
    flags = options(__doc__ or "", only="")
    cases = ON_GPU if has_gpu() else ON_CPU
    if flags.quick:
        cases = cases[1:2] if not has_gpu() else cases[2:3]
    from resnet_jax.models.registry import create_model

    limits = {dtype: measure_limits(dtype) for dtype in {case[3] for case in cases}}
    rows: list[dict[str, Any]] = []
    for name, size, batch, dtype, rounds in cases:
        if flags.only not in name:
            continue
        classes = 1000 if size == 224 else 10
        common = {"name": name, "batch": batch, "size": size, "classes": classes, "dtype": dtype}
        flops = 3 * forward_flops(create_model(name, num_classes=classes), size)
        times = alternate(contenders(common), flags.rounds or rounds, warmup=3, settle=0.5)
        found = network_rows(f"train {name} {dtype} batch {batch}", times, batch, flops, limits[dtype]["flops"])
        if (name, dtype, hardware()["gpu"]) == ("resnet50", "bfloat16", "NVIDIA H200"):
            found = [r | {"of_published": r["median"] / PUBLISHED} if "median" in r else r for r in found]
            print(f"ours is {found[0].get('of_published', 0):.2f} of the published {PUBLISHED} images/s")
        rows += found
        write("train_step", rows, limits=limits)


def contenders(common: dict[str, Any]) -> list[Contender]:
    """Returns all that take part in one case."""
    small, gpu = common["size"] == 32, has_gpu()
    if small:  # steps in a call of ours, as the loop has them, and steps until a wait
        in_one_call, steps = (50, 50) if gpu else (5, 1)
    else:
        in_one_call, steps = (1, STEPS["gpu"]) if gpu else (STEPS["cpu"], STEPS["cpu"])
    one = common | {"example": False, "options": True, "calls": steps}
    ours = one | {"in_one_call": in_one_call, "calls": max(1, steps // in_one_call)}
    theirs = common | {"steps": steps}
    found = [
        Contender("resnet_jax", jax_train_step, ours, MEMORY, OURS),
        Contender("torch eager", torch_step, theirs | {"compiled": False}, imports=THEIRS),
        Contender("torch.compile", torch_step, theirs | {"compiled": True}, imports=THEIRS),
        Contender("Flax's example", jax_train_step, one | {"example": True, "options": False}, imports=OURS),
    ]
    if not gpu:  # what each of our two settings for CPUs is worth, and the first of them to the opponent
        found += [
            Contender("torch eager, our memory", torch_step, theirs | {"compiled": False}, MEMORY, THEIRS),
            Contender("system's memory", jax_train_step, ours, imports=OURS),
            Contender("no options", jax_train_step, ours | {"options": False}, MEMORY, OURS),
        ]
    if in_one_call > 1:
        found.append(Contender("one step a call", jax_train_step, one, MEMORY, OURS))
    return found


if __name__ == "__main__":
    main()
