"""A state as few arrays and back: every bit, every kind of tree, and what is spread over devices stays as it is."""

import json
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from resnet_jax.config import InputError
from resnet_jax.packing import addresses, pack, unpack
from resnet_jax.sharding import make_mesh, state_sharding
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


def unpack_all(packed, index):
    """The arrays of all vectors by address."""
    return {name: x for vector, rows in index.items() for name, x in unpack(packed["whole"][vector], rows).items()}


def test_every_bit_comes_back_under_its_address():
    packed, index = pack(tree())
    assert sorted(str(x.dtype) for x in packed["whole"].values()) == ["bfloat16", "float32", "int32"]
    assert not packed["spread"]
    found = unpack_all(packed, json.loads(json.dumps(index)))
    assert sorted(found) == sorted(addresses(tree()))
    for name, array in zip(addresses(tree()), jax.tree.leaves(tree()), strict=True):
        assert bits(found[name]) == bits(array), name


def test_a_vector_ends_where_it_would_be_too_large(monkeypatch):
    """Two of the arrays fit and a third does not; one that is larger than a vector has one of its own."""
    monkeypatch.setattr("resnet_jax.packing.VECTOR", 4 * 21)
    arrays = {f"a{i}": jnp.arange(10.0) + i for i in range(5)} | {
        "large": jnp.arange(50.0),
        "odd": jnp.ones(3, jnp.int8),
    }
    packed, index = pack(arrays)
    inside = [[name for name, _ in rows] for rows in index.values()]
    assert inside == [["a0", "a1"], ["a2", "a3"], ["a4"], ["large"], ["odd"]]
    chex.assert_trees_all_equal(unpack_all(packed, index), arrays)


def test_arrays_of_odd_sizes_come_last():
    """So that the others begin where JAX on a CPU takes them over."""
    _, index = pack({"a": jnp.ones(16), "bias": jnp.ones(1000), "c": jnp.ones(32)})
    assert [name for name, _ in index["float32-0"]] == ["a", "c", "bias"]


def test_vectors_are_copies():
    """What a step does to a state that it was given must not reach the checkpoint."""
    state = {"one": jnp.zeros(2**12), "more": jnp.zeros(2**23)}
    packed, _ = pack(state)
    for vector in packed["whole"].values():
        assert not any(np.shares_memory(vector, np.asarray(x)) for x in state.values())
    changed = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    assert all((x == 0).all() for x in packed["whole"].values()) and (changed["more"] == 1).all()


def test_vectors_of_the_right_size_are_written_over():
    """And others are made anew."""
    first, _ = pack(tree(1))
    again, index = pack(tree(2), first["whole"])
    assert all(np.shares_memory(again["whole"][vector], first["whole"][vector]) for vector in index)
    found = unpack_all(again, index)
    for name, array in zip(addresses(tree(2)), jax.tree.leaves(tree(2)), strict=True):
        assert bits(found[name]) == bits(array), name
    other, index = pack({"a": jnp.ones(3), "b": jnp.ones(3, jnp.int32)}, {"float32-0": np.zeros(4, np.float32)})
    chex.assert_trees_all_equal(unpack_all(other, index), {"a": jnp.ones(3), "b": jnp.ones(3, jnp.int32)})


def test_what_is_spread_over_devices_is_not_packed():
    mesh = make_mesh(8)
    spread = jax.device_put(jnp.arange(64.0), NamedSharding(mesh, P("data")))
    whole = jax.device_put(jnp.arange(64.0), NamedSharding(mesh, P()))
    packed, _ = pack({"spread": spread, "whole": whole})
    assert list(packed["spread"]) == ["spread"] and packed["whole"]["float32-0"].shape == (64,)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_checkpoint_holds_every_bit(tmp_path, devices):
    """Whole, and with the large arrays spread."""
    mesh = make_mesh(devices, fsdp=devices)
    state = jax.device_put(tree(3), state_sharding(tree(3), mesh))
    assert len(pack(state)[0]["spread"]) == (0 if devices == 1 else 2)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(5, state, {"best": None})
        checkpoints.settle()
        restored, record, step = checkpoints.restore(lambda: state)
    assert record == {"best": None} and step == 5
    for again in (restored, read_checkpoint(tmp_path, state)[0]):
        assert jax.tree.structure(again) == jax.tree.structure(state)
        assert [x.sharding for x in jax.tree.leaves(again)] == [x.sharding for x in jax.tree.leaves(state)]
        assert list(map(bits, jax.tree.leaves(again))) == list(map(bits, jax.tree.leaves(state)))


def test_a_part_of_a_checkpoint(tmp_path):
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, tree(), {})
        checkpoints.settle()
        part = {"params": {"conv": {"scale": tree()["params"]["conv"]["scale"]}}}
        found, _, _ = checkpoints.restore(lambda: part)
    assert bits(found["params"]["conv"]["scale"]) == bits(part["params"]["conv"]["scale"])


def test_another_shape_is_named(tmp_path):
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, {"scale": jnp.ones(4)}, {})
        checkpoints.settle()
        with pytest.raises(InputError, match=r"scale is \(4,\) in the checkpoint of step 1, not \(5,\)"):
            checkpoints.restore(lambda: {"scale": jnp.ones(5)})
