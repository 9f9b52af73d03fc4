"""Vectors on disk: bytes that NumPy reads alone, where JAX takes them over, and Orbax knows what they are."""

import io
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from resnet_jax.integrity import Damaged, seal
from resnet_jax.packing import pack
from resnet_jax.pages import PAGE, read_pages
from resnet_jax.vectors import handlers, items, name_of, read_record, read_state

STATE = {"kernel": jnp.arange(6000.0).reshape(3, 2000), "half": jnp.ones(5, jnp.bfloat16), "step": jnp.asarray(7)}


def save(folder):
    """Writes the checkpoint of step 3."""
    with ocp.CheckpointManager(folder, item_handlers=handlers()) as manager:
        manager.save(3, args=items(*pack(STATE), {"said": 1}))
    seal(folder / "3", {})


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
    """However it was written: past the system's memory, or through it. So is it read."""
    if way == "no such flag":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    elif way == "refused":
        monkeypatch.setattr(os, "O_DIRECT", os.O_DIRECTORY, raising=False)
    elif way == "in odd pieces":
        write, readinto = io.FileIO.write, io.FileIO.readinto

        class Halting(io.FileIO):
            def write(self, data):
                return write(self, data[: 1000 if self.tell() else 1536])

            def readinto(self, data):
                return readinto(self, data[: 1000 if self.tell() else 1536])

        monkeypatch.setattr("resnet_jax.pages.open", lambda file, mode, **_: Halting(file, mode), raising=False)
    save(tmp_path)
    packed, _ = pack(STATE)
    assert len(packed["whole"]) == 3 and max(vector.nbytes for vector in packed["whole"].values()) > PAGE
    for name, vector in packed["whole"].items():
        path = tmp_path / "3" / name_of(name)
        np.testing.assert_array_equal(np.fromfile(path, vector.dtype), vector)
        np.testing.assert_array_equal(read_pages(path), np.fromfile(path, np.uint8))


def read(folder):
    """All of it, where it lies in memory after reading."""
    with open_read_only(folder) as manager:
        return read_state(manager, 3, read_record(manager, 3)[1], {}, lambda arrays: arrays)


def test_orbax_knows_sizes_and_types(saved):
    packed, _ = pack(STATE)
    with open_read_only(saved) as manager:
        assert read_record(manager, 3)[0] == {"said": 1}
        known = manager.item_metadata(3)["state"].tree["whole"]
        alone = manager.restore(3, args=ocp.args.Composite(state=ocp.args.PyTreeRestore())).state["whole"]
    chex.assert_trees_all_equal(alone, packed["whole"])
    assert {name: (m.shape, m.dtype) for name, m in known.items()} == {
        name: (vector.shape, vector.dtype) for name, vector in packed["whole"].items()
    }


def test_jax_takes_over_what_was_read_as_it_lies(saved):
    """On a CPU, where the array begins at a page; a step that is given it does not write there."""
    found = read(saved)
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
    with pytest.raises(OSError, match=r"whole\..*-0 became shorter while it was read"):
        read_pages(saved / "3" / name_of("float32-0"))
    with pytest.raises(Damaged, match=r"whole\..* is missing or cannot be read"):  # whichever comes first
        read(saved)


def test_a_flipped_bit_is_found_while_it_is_read(tmp_path):
    save(tmp_path)
    path = tmp_path / "3" / name_of("float32-0")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match=r"state/whole.float32-0 has other contents"):
        read(tmp_path)
