"""Vectors on disk: bytes that NumPy reads alone, where JAX takes them over, and Orbax knows what they are."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from resnet_jax.packing import pack
from resnet_jax.vectors import ALIGNED, handlers, items, read_record, read_state

STATE = {"kernel": jnp.arange(600.0).reshape(3, 200), "half": jnp.ones(5, jnp.bfloat16), "step": jnp.asarray(7)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoint of a step."""
    folder = tmp_path_factory.mktemp("saved")
    with ocp.CheckpointManager(folder, item_handlers=handlers()) as manager:
        manager.save(3, args=items(*pack(STATE), {"said": 1}))
    return folder


def open_read_only(folder):
    options = ocp.CheckpointManagerOptions(read_only=True)
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers())


def test_numpy_alone_can_read_a_file(saved):
    packed, _ = pack(STATE)
    assert len(packed["whole"]) == 3
    for name, vector in packed["whole"].items():
        read = np.fromfile(saved / "3" / "state" / f"whole.{name}", vector.dtype)
        np.testing.assert_array_equal(read, vector)


def test_orbax_knows_sizes_and_types(saved):
    packed, _ = pack(STATE)
    with open_read_only(saved) as manager:
        assert read_record(manager, 3)[0] == {"said": 1}
        known = manager.item_metadata(3)["state"].tree["whole"]
    assert {name: (m.shape, m.dtype) for name, m in known.items()} == {
        name: (vector.shape, vector.dtype) for name, vector in packed["whole"].items()
    }


def test_jax_takes_over_what_was_read_as_it_lies(saved):
    """On a CPU, where the array begins at a multiple of `ALIGNED`; a step that is given it does not write there."""
    with open_read_only(saved) as manager:
        found = read_state(manager, 3, read_record(manager, 3)[1], {})
    chex.assert_trees_all_equal(found, STATE)
    kernel = found["kernel"]
    assert kernel.ctypes.data % ALIGNED == 0
    array = jax.device_put(kernel, jax.devices("cpu")[0])
    assert array.unsafe_buffer_pointer() == kernel.ctypes.data
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    assert array.is_deleted()
    np.testing.assert_array_equal(kernel, STATE["kernel"])
    np.testing.assert_array_equal(after, STATE["kernel"] + 1)


def test_a_file_that_shrinks_under_the_reader_is_named(saved, monkeypatch):
    stat = type(saved).stat
    longer = type("Longer", (), {"st_size": 1 << 12})
    monkeypatch.setattr(type(saved), "stat", lambda path, **more: longer if "whole." in path.name else stat(path))
    with open_read_only(saved) as manager:
        index = read_record(manager, 3)[1]
        with pytest.raises(OSError, match=r"whole\..*-0 became shorter while it was read"):
            read_state(manager, 3, index, {})
