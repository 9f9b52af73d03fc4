"""The training step in a loop of your own, on eight virtual devices; some 20 seconds on a CPU.

python examples/own_loop.py
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np
import optax

import resnet_jax as rj

rng = np.random.default_rng(0)
labels = rng.integers(0, 4, 2048).astype(np.int32)
images = rng.integers(0, 160, (2048, 16, 16, 3)) + 95 * (labels[:, None, None, None] == np.arange(3))
images = images.astype(np.uint8)

model = rj.create_model("cifar_resnet8", num_classes=4)
tx, mesh = optax.sgd(0.1, momentum=0.9), rj.make_mesh()
state = rj.create_state(model, tx, jax.random.key(0), image_shape=(16, 16, 3), mesh=mesh)
pixels = {"mean": (0.4, 0.4, 0.4), "std": (0.25, 0.25, 0.25)}
step = jax.jit(rj.make_train_step(model, tx, **pixels), donate_argnums=0)
evaluate = jax.jit(rj.make_eval_step(model, **pixels))

for i in range(0, 1536, 128):
    batch = {"image": images[i : i + 128], "label": labels[i : i + 128]}
    state, sums = step(state, rj.shard_batch(batch, mesh))
    print(f"step {state.step}: loss {rj.means(sums)['loss']:.3f}")

held_out = rj.shard_batch({"image": images[1536:], "label": labels[1536:]}, mesh)
sums, _ = evaluate(state.variables, held_out)
print(f"accuracy {rj.means(sums)['accuracy']:.1%} on {len(mesh.devices)} devices")
