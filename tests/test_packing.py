"""A state as few arrays and back: every bit, every kind of tree, and what is spread over devices stays as it is."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from resnet_jax.config import InputError
from resnet_jax.packing import addresses, pack, unpack
from resnet_jax.sharding import SPREAD_ABOVE, make_mesh
from resnet_jax.training.checkpoints import Checkpoints, read_checkpoint


class Momentum(NamedTuple):
    trace: dict
    count: jax.Array


def tree(seed=0):
    """Arrays of every kind that a state holds."""
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 64, 64)), jnp.float32)
    scale = jnp.asarray(rng.normal(size=64), jnp.float32).at[3].set(jnp.nan).at[4].set(-0.0)
    half = jnp.asarray(rng.normal(size=(5, 7)), jnp.bfloat16)
    moments = (Momentum({"kernel": kernel + 1}, jnp.asarray(7, jnp.int32)), None, [scale + 1])
    return {"params": {"conv": {"kernel": kernel, "scale": scale}, "half": half}, "opt_state": moments, "stats": {}}


def bits(array):
    return np.asarray(array).dtype, np.asarray(array).shape, np.asarray(array).tobytes()


def test_every_bit_comes_back_under_its_address():
    packed, index = pack(tree())
    assert {name: x.dtype for name, x in packed["small"].items()} == {
        "float32": np.float32, "bfloat16": jnp.bfloat16, "int32": np.int32
    }  # fmt: skip
    assert sorted(packed["large"]) == ["opt_state.0.trace.kernel", "params.conv.kernel"]
    found = unpack(packed, json.loads(json.dumps(index)))
    assert sorted(found) == sorted(addresses(tree()))
    for name, array in zip(addresses(tree()), jax.tree.leaves(tree()), strict=True):
        assert bits(found[name]) == bits(array), name


def test_what_is_spread_over_devices_is_not_packed():
    mesh = make_mesh(8)
    spread = jax.device_put(jnp.arange(64.0), NamedSharding(mesh, P("data")))
    whole = jax.device_put(jnp.arange(64.0), NamedSharding(mesh, P()))
    packed, _ = pack({"spread": spread, "whole": whole})
    assert list(packed["large"]) == ["spread"] and packed["small"]["float32"].shape == (64,)


@pytest.mark.parametrize("only", ["small", "large", "both"])
def test_a_checkpoint_holds_every_bit(tmp_path, only):
    state = tree(3)
    if only != "both":
        state = [x for x in jax.tree.leaves(state) if (x.size < SPREAD_ABOVE) == (only == "small")]
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(5, state, {"best": None})
        checkpoints.settle()
        restored, record = checkpoints.restore(state, 5)
    assert record == {"best": None}
    for again in (restored, read_checkpoint(tmp_path, state)[0]):
        assert jax.tree.structure(again) == jax.tree.structure(state)
        assert list(map(bits, jax.tree.leaves(again))) == list(map(bits, jax.tree.leaves(state)))


def test_another_shape_is_named(tmp_path):
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, {"scale": jnp.ones(4)}, {})
        checkpoints.settle()
        with pytest.raises(InputError, match=r"scale is \(4,\) in the checkpoint of step 1, not \(5,\)"):
            checkpoints.restore({"scale": jnp.ones(5)}, 1)
