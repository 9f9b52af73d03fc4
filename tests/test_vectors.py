"""Vectors on disk: bytes that NumPy reads alone, where JAX takes them over, and Orbax knows what they are."""

import io
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from resnet_jax.packing import PAGE, pack
from resnet_jax.vectors import handlers, items, name_of, read_record, read_state

STATE = {"kernel": jnp.arange(6000.0).reshape(3, 2000), "half": jnp.ones(5, jnp.bfloat16), "step": jnp.asarray(7)}


def save(folder):
    """Writes the checkpoint of step 3."""
    with ocp.CheckpointManager(folder, item_handlers=handlers()) as manager:
        manager.save(3, args=items(*pack(STATE), {"said": 1}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoint of a step."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder)
    return folder


def open_read_only(folder):
    options = ocp.CheckpointManagerOptions(read_only=True)
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers())


@pytest.mark.parametrize("way", ["as the disk allows", "no such flag", "refused", "in odd pieces"])
def test_numpy_alone_can_read_a_file(tmp_path, monkeypatch, way):
    """However it was written: past the system's memory, or through it."""
    if way == "no such flag":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    elif way == "refused":
        monkeypatch.setattr(os, "O_DIRECT", os.O_DIRECTORY, raising=False)
    elif way == "in odd pieces":
        write = io.FileIO.write

        class Halting(io.FileIO):
            def write(self, data):
                return write(self, data[: 1000 if self.tell() else 1536])

        monkeypatch.setattr("resnet_jax.vectors.open", lambda file, *_, **__: Halting(file, "wb"), raising=False)
    save(tmp_path)
    packed, _ = pack(STATE)
    assert len(packed["whole"]) == 3 and max(vector.nbytes for vector in packed["whole"].values()) > PAGE
    for name, vector in packed["whole"].items():
        read = np.fromfile(tmp_path / "3" / name_of(name), vector.dtype)
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
    """On a CPU, where the array begins at a page; a step that is given it does not write there."""
    with open_read_only(saved) as manager:
        found = read_state(manager, 3, read_record(manager, 3)[1], {})
    chex.assert_trees_all_equal(found, STATE)
    kernel = found["kernel"]
    assert kernel.ctypes.data % PAGE == 0
    array = jax.device_put(kernel, jax.devices("cpu")[0])
    assert array.unsafe_buffer_pointer() == kernel.ctypes.data
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    assert array.is_deleted()
    np.testing.assert_array_equal(kernel, STATE["kernel"])
    np.testing.assert_array_equal(after, STATE["kernel"] + 1)


def test_a_file_that_shrinks_under_the_reader_is_named(saved, monkeypatch):
    stat = type(saved).stat
    longer = type("Longer", (), {"st_size": 1 << 20})
    monkeypatch.setattr(type(saved), "stat", lambda path, **more: longer if "whole." in path.name else stat(path))
    with open_read_only(saved) as manager:
        index = read_record(manager, 3)[1]
        with pytest.raises(OSError, match=r"whole\..*-0 became shorter while it was read"):
            read_state(manager, 3, index, {})
