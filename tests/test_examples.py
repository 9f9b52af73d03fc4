"""The scripts of `examples/`."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import resnet_jax as rj

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_pyramid_finds_new_squares():
    example = runpy.run_path(str(EXAMPLES / "fpn.py"))
    detector, state, overlaps = example["main"](steps=60)
    new = example["squares"](jax.random.key(7), 256)
    apply = jax.jit(detector.apply)

    def mean_iou(state):
        boxes = apply({"params": state.params, "batch_stats": state.batch_stats}, new["image"])
        return float(example["iou"](boxes, new["label"]).mean())

    untrained = rj.create_state(detector, optax.identity(), jax.random.key(1), (64, 64, 3))
    assert mean_iou(untrained) < 0.3 and overlaps[0] < 0.3
    assert mean_iou(state) > 0.6
    box = jnp.asarray([[0.0, 0.0, 2.0, 2.0]])
    assert abs(float(example["iou"](box, box + 1)[0]) - 1 / 7) < 1e-6
