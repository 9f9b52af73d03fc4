"""What a TPU's own compiler says of a training step: ours beside Flax's example network, around the same optimizer.

No TPU is needed, but its compiler (`pip install 'jax[tpu]'`); the figures are of one chip: FLOPs, bytes accessed, bytes
of memory beside the arguments, bytes that the chips exchange.
"""

import time
from typing import Any

from benchmarks.measure import options, write

CASES = (("resnet50", 128, 64, "bfloat16"),)  # name, image size, images a chip, type
QUICK = (("cifar_resnet20", 32, 8, "bfloat16"),)


def compiled(name: str, size: int, each: int, dtype: str, target: str, example: bool) -> dict[str, Any]:
    """Returns the costs of a step of one of the two networks, compiled for the chips of a target."""
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks.flax_example import network
    from resnet_jax.runs.forecast import collective_bytes
    from resnet_jax.runs.tpu_target import target_mesh
    from resnet_jax.training.sharding import batch_sharding, replicated, sharded_over
    from resnet_jax.training.state import create_state
    from resnet_jax.training.step import make_train_step

    mesh = target_mesh(target)
    model = network(name, 1000 if size > 32 else 10, dtype, example)
    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9, nesterov=True))
    shapes = jax.eval_shape(lambda: create_state(model, optimizer, jax.random.key(0), (size, size, 3)))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), shapes)
    count, split = each * mesh.size, batch_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((count, size, size, 3), jnp.dtype(dtype), sharding=split),
        "label": jax.ShapeDtypeStruct((count,), jnp.int32, sharding=split),
    }
    step = sharded_over(mesh)(make_train_step(model, optimizer))
    lowered = jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh)).lower(state, batch)
    began = time.perf_counter()
    program = lowered.compile()
    seconds, costs, memory = time.perf_counter() - began, program.cost_analysis() or {}, program.memory_analysis()
    assert memory is not None
    return {
        "network": "Flax's example" if example else "ours",
        "flops": costs["flops"],
        "bytes_accessed": costs["bytes accessed"],
        "temporary": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "collectives": collective_bytes(program.as_text() or ""),
        "compile_seconds": seconds,
    }


def main() -> None:
    """Prints the two networks' costs and writes them."""
    from resnet_jax.runs.tpu_target import prepare_environment

    given = options(__doc__ or "", target="v5e:2x2")
    prepare_environment(given.target)
    rows = []
    for name, size, each, dtype in QUICK if given.quick else CASES:
        pair = [compiled(name, size, each, dtype, given.target, example) for example in (False, True)]
        case = {"case": f"{name} {size} px, {each} images a chip, {dtype}", "target": given.target}
        ratios = {key: pair[0][key] / pair[1][key] for key in ("flops", "bytes_accessed", "peak") if pair[1][key]}
        rows += [case | found for found in pair] + [case | {"network": "ours / theirs"} | ratios]
        for row in rows[-3:]:
            print({key: value for key, value in row.items() if key not in ("case", "target")})
    if not given.quick:
        write("tpu_cost", rows, f"tpu_cost-{given.target.replace(':', '-')}")


if __name__ == "__main__":
    main()
