"""Training steps over 1..N devices with the same share of the batch each, and what the host adds to every step.

The loop's own code draws batches from synthetic data that lies on the devices. On a CPU the devices are virtual: they
share its cores, so that the rows show what splitting costs, not what more devices gain.
"""

import time
from typing import Any

from benchmarks.measure import Contender, alternate, has_gpu, options, print_table, row, write
from benchmarks.overhead import host_rows
from benchmarks.startup import first_step_rows

ON_CPU = ("cifar_resnet20", 32, 64, "float32", (1, 2, 4))  # name, image size, images a device, type, devices
ON_GPU = ("resnet50", 224, 256, "bfloat16", (1, 2, 4, 8, 16))


def scaled_step(name: str, size: int, each: int, dtype: str, devices: int, strategy: str) -> Any:
    """Returns ten steps a call on a number of devices, as `train` runs them."""
    import jax
    import numpy as np

    from resnet_jax.config import AugmentConfig, Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
    from resnet_jax.data.loader import BadImages, whole_split
    from resnet_jax.data.sources import load_dataset
    from resnet_jax.recipe_files import load_config
    from resnet_jax.training.build import build_model, state_maker
    from resnet_jax.training.optimizers import make_optimizer
    from resnet_jax.training.programs import compile_steps
    from resnet_jax.training.resolve import filled
    from resnet_jax.training.sharding import make_mesh, put_everywhere, put_state, replicated, state_sharding

    data = DataConfig("synthetic", image_size=size, synthetic_size=2 * each * devices, synthetic_classes=10)
    config = Config(
        model=ModelConfig(name, compute_dtype=dtype),
        data=data,
        augment=AugmentConfig(crop="none"),
        train=TrainConfig(batch_size=each * devices, ema_decay=None, steps_per_call=1),
        parallel=ParallelConfig(strategy=strategy),
    )
    config = filled(config, load_config("digits_resnet20"))
    dataset, mesh = load_dataset(data, 0), make_mesh(devices)
    model = build_model(config, 10)
    state = put_state(state_maker(config, model, lambda step: 0.01)(), mesh)
    whole = put_everywhere(whole_split(dataset.train, config, BadImages("error"), None, None), mesh)
    out = (state_sharding(state, mesh), replicated(mesh))
    optimizer = make_optimizer(config.optimizer, lambda step: 0.01)
    steps = compile_steps(config, model, optimizer, mesh, out, from_device=True, most=1)
    one = put_everywhere(np.int32(1), mesh)

    def ten() -> dict[str, float]:
        nonlocal state
        began = time.perf_counter()
        for _ in range(10):
            state, sums = steps(state, whole, one)
        jax.block_until_ready((state, sums))
        return {"seconds": time.perf_counter() - began}

    return ten


def main() -> None:
    """Runs all numbers of devices that there are."""
    flags = options(__doc__ or "", strategy="jit")
    name, size, each, dtype, counts = ON_GPU if has_gpu() else ON_CPU
    environment = {}
    if has_gpu():
        import subprocess

        present = len(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines())
        counts = tuple(n for n in counts if n <= present)
    else:
        environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={max(counts)}"}
    kind = "device" if has_gpu() else "virtual device"
    contenders = [
        Contender(f"{n} {kind}{'s' * (n > 1)}", scaled_step,
                  {"name": name, "size": size, "each": each, "dtype": dtype, "devices": n, "strategy": flags.strategy},
                  environment)
        for n in counts
    ]  # fmt: skip
    rounds = flags.rounds or (3 if flags.quick else 7)
    results = alternate(contenders, rounds, warmup=2)
    case = f"train {name} {dtype} {each} a device"
    rows: list[dict[str, Any]] = [
        row(case, c.name, results[c.name], 10 * each * n, "images", devices=n, strategy=flags.strategy)
        for c, n in zip(contenders, counts, strict=True)
    ]
    alone = rows[0].get("median")
    for r in rows:
        if alone and "median" in r:
            r |= {"step_ms": 1e3 * each * r["devices"] / r["median"], "over_one": r["median"] / alone}
    rows += host_rows(rounds) + first_step_rows(1 if flags.quick else 3)
    print_table(rows)
    write("scaling", rows, virtual=not has_gpu())


if __name__ == "__main__":
    main()
