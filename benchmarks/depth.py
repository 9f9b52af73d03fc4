"""A thousand layers: what a step of batch 8 needs from 20 to 1202 layers, equal blocks in a loop and computed twice.

After that, what computing blocks twice saves, read from compiled steps of cifar_resnet110 at batch 128.
"""

import time
from typing import Any

from benchmarks.measure import Contender, alternate, options, write
from benchmarks.weights import peak_mib

BATCH, SIZE = 8, 32


def one_step(name: str, remat: str) -> Any:
    """Compiles the step, takes it once, and checks the gradient of every block."""

    def call() -> dict[str, float]:
        import jax
        import jax.numpy as jnp
        import numpy as np
        import optax

        from resnet_jax.config import Config, DataConfig, ModelConfig, TrainConfig
        from resnet_jax.models.stacking import unstack_blocks
        from resnet_jax.runs.forecast import forecast
        from resnet_jax.training.build import build_model, in_form, state_maker
        from resnet_jax.training.programs import recipe_step
        from resnet_jax.training.resolve import resolve

        config = Config(
            ModelConfig(name, num_classes=10, scan=True, remat=remat),  # type: ignore[arg-type]
            DataConfig(image_size=SIZE),
            train=TrainConfig(batch_size=BATCH, ema_decay=None),
        )
        config = resolve(config).config
        temporary = forecast(config, 1)["temporary"]
        model = build_model(config, 10)
        optimizer = optax.trace(0.0)  # the state then is the gradient itself
        state = in_form(state_maker(config, model, lambda step: 0.1)(), config)
        state = state.replace(opt_state=optimizer.init(state.params))
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8)
        batch = {"image": images, "label": rng.integers(0, 10, BATCH), "mirrored": np.zeros(BATCH, bool)}
        began = time.perf_counter()
        step = jax.jit(recipe_step(config, model, optimizer), donate_argnums=0).lower(state, batch).compile()
        compiled = time.perf_counter() - began
        began = time.perf_counter()
        state, sums = jax.block_until_ready(step(state, batch))
        seconds = time.perf_counter() - began
        gradient = unstack_blocks(state.opt_state.trace)
        norms = [
            float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(block))))
            for stage, blocks in gradient.items()
            if stage.startswith("stage")
            for block in blocks.values()
        ]
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        found = {"seconds": seconds, "compile_seconds": compiled, "temporary_mib": temporary / 2**20}
        found |= {"peak_mib": peak_mib(), "parameters": parameters, "blocks": len(norms)}
        found |= {"loss": float(sums["loss"]) / BATCH, "least_gradient": min(norms), "greatest_gradient": max(norms)}
        return found

    return call


def step_memory(name: str, remat: str, scan: bool) -> Any:
    """Returns the temporary memory of a compiled step at batch 128; nothing is run."""

    def call() -> dict[str, float]:
        from resnet_jax.config import Config, DataConfig, ModelConfig, TrainConfig
        from resnet_jax.runs.forecast import forecast

        model = ModelConfig(name, num_classes=10, remat=remat, scan=scan)  # type: ignore[arg-type]
        data, train = DataConfig(image_size=SIZE), TrainConfig(batch_size=128, ema_decay=None)
        began = time.perf_counter()
        temporary = forecast(Config(model, data, train=train), 1)["temporary"]
        return {"seconds": time.perf_counter() - began, "temporary_mib": temporary / 2**20}

    return call


def memory_rows(name: str) -> list[dict[str, Any]]:
    """Returns rows of memory with and without computing blocks twice, and in a loop."""
    rows: list[dict[str, Any]] = []
    for remat, scan in (("none", False), ("block", False), ("block", True), ("stage", True)):
        form = f"remat {remat}" + (", scan" if scan else "")
        given = {"name": name, "remat": remat, "scan": scan}
        result = alternate([Contender(form, step_memory, given)], 1, warmup=0)[form]
        rows.append({"case": f"{name} batch 128", "contender": form})
        if "error" in result:
            rows[-1]["error"] = result["error"]
        else:
            rows[-1] |= once(result["kept"][0]["temporary_mib"], "MiB")
            rows[-1]["over_none"] = rows[-1]["median"] / rows[0].get("median", float("nan"))
        print(rows[-1], flush=True)
    return rows


def once(value: float, unit: str) -> dict[str, Any]:
    """Returns a value that was measured once, as the other benchmarks write theirs."""
    return {"median": value, "quartiles": [value, value], "n": 1, "unit": unit}


def main() -> None:
    """Measures each network each way, in a process of its own."""
    flags = options(__doc__ or "")
    names = ["cifar_resnet20", "cifar_resnet56", "cifar_resnet110", "cifar_resnet1202", "cifar_resnetv2_1001"]
    rows = []
    for name in names[:2] if flags.quick else names:
        for remat in ("block", "stage"):
            form = f"scan, remat {remat}"
            result = alternate([Contender(form, one_step, {"name": name, "remat": remat})], 1, warmup=0)[form]
            rows.append({"case": f"{name} batch {BATCH}", "contender": form})
            if "error" in result:
                rows[-1]["error"] = result["error"]
            else:
                rows[-1] |= once(result["seconds"][0], "s a step") | result["kept"][0]
            print(rows[-1], flush=True)
    rows += memory_rows("cifar_resnet20" if flags.quick else "cifar_resnet110")
    write("depth", rows)


if __name__ == "__main__":
    main()
