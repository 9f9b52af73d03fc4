import jax
import numpy as np
import pytest

from resnet_jax.config import InputError, ParallelConfig
from resnet_jax.sharding import check_batch, make_mesh, put_batch, start_processes


def test_a_batch_is_split_over_all_devices():
    mesh = make_mesh()
    batch = put_batch({"image": np.arange(16, dtype=np.float32)}, mesh)
    assert mesh.size == 8
    assert [s.data.tolist() for s in batch["image"].addressable_shards] == [[2 * i, 2 * i + 1] for i in range(8)]


@pytest.mark.parametrize(("size", "nearest"), [(30, 32), (33, 32), (3, 8), (101, 104), (100, 96)])
def test_the_nearest_batch_that_divides_is_named(size, nearest):
    with pytest.raises(InputError, match=f"nearest that does is {nearest}$"):
        check_batch(size, make_mesh())
    check_batch(nearest, make_mesh())


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(InputError, match="there are 8 devices"):
        make_mesh(9)
    assert make_mesh(3).devices.tolist() == jax.devices()[:3]


def test_no_cluster_to_join_is_said():
    with pytest.raises(InputError, match=r"parallel.distributed auto: .*off on one host"):
        start_processes(ParallelConfig(distributed="auto"))


def test_a_process_id_in_the_environment_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    with pytest.raises(InputError, match="JAX_PROCESS_ID=two in the environment: give a whole number"):
        start_processes(ParallelConfig(distributed="auto"))
