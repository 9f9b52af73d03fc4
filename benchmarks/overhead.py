"""Microseconds that the host spends on a step of the digits with the data on the device.

The loop's own code runs with a program of the same arguments and results that computes nothing, so that what is left is
Python, dispatch and bookkeeping.
"""

import time
from typing import Any

from benchmarks.measure import options, print_table, row, write


def host_rows(rounds: int) -> list[dict[str, Any]]:
    """Times rounds of a thousand steps, one of them in a call and as many as the recipe's default has."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from resnet_jax.data.sources import load_dataset
    from resnet_jax.recipe_files import load_config
    from resnet_jax.training.build import build_model, state_maker
    from resnet_jax.training.programs import STEPS_PER_CALL

    config = load_config("digits_resnet20")
    dataset = load_dataset(config.data, 0)
    state = state_maker(config, build_model(config, len(dataset.class_names)), lambda step: 0.1)()
    data = {"image": jnp.zeros((1437, 8, 8, 3), jnp.uint8), "label": jnp.zeros(1437, jnp.int32)}
    zero = {"loss": np.float32(0), "accuracy": np.float32(0), "count": np.float32(96)}
    step = jax.jit(lambda state, data, n: (state, jax.tree.map(jnp.asarray, zero)), donate_argnums=0)
    rows, arrays = [], len(jax.tree.leaves((state, data)))
    for n in (1, STEPS_PER_CALL):
        seconds, number = [], jnp.int32(n)
        for _ in range(1 + rounds):
            parts, under_way = [], ()
            began = time.perf_counter()
            for i in range(0, 1000, n):
                state, sums = step(state, data, number)
                parts.append((i, n, sums))
                jax.block_until_ready(under_way)
                under_way = sums
            jax.block_until_ready(state)
            seconds.append((time.perf_counter() - began) / 1000)
        times = {"seconds": [1 / (1e6 * s) for s in seconds[1:]], "setup": seconds[0]}
        case = f"host time of a step, {n} a call{' (the default)' if n > 1 else ''}"
        rows.append(row(case, "resnet_jax", times, 1, "us") | {"unit": "us", "arrays": arrays})
    return rows


def main() -> None:
    """Runs and writes them."""
    flags = options(__doc__ or "")
    rows = host_rows(flags.rounds or 9)
    print_table(rows)
    write("overhead", rows)


if __name__ == "__main__":
    main()
