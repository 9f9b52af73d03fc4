import os
import platform
import subprocess
import sys

import jax
import numpy as np
import pytest

from resnet_jax.cli import MEMORY
from resnet_jax.config import InputError, ParallelConfig
from resnet_jax.runs.processes import start_processes
from resnet_jax.training.sharding import check_batch, make_mesh, shard_batch


def test_a_batch_is_split_over_all_devices():
    mesh = make_mesh()
    batch = shard_batch({"image": np.arange(16, dtype=np.float32)}, mesh)
    assert mesh.size == 8
    assert [s.data.tolist() for s in batch["image"].addressable_shards] == [[2 * i, 2 * i + 1] for i in range(8)]


def test_a_batch_that_does_not_divide_is_refused_with_the_remedy():
    with pytest.raises(InputError, match=r"20 examples does not divide over 8 devices: leave out the last 4,.*`mask`"):
        shard_batch({"image": np.zeros((20, 4, 4, 3)), "label": np.zeros(20, int)}, make_mesh())


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


FAULTS = """
import resource, jax, jax.numpy as jnp
from resnet_jax.training.sharding import run_in_caller
run_in_caller()
wide, narrow = jnp.ones((8, 1, 3, 3)), jnp.ones((1, 8, 3, 3))
convolve = lambda x, kernel: jax.lax.conv(x, kernel, (1, 1), "SAME")
step = jax.jit(lambda x: convolve(convolve(x, wide), narrow).sum())
x = jnp.ones((1, 1, 1024, 2048))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min([faults() for _ in range(4)][1:]))
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_a_program_on_a_cpu_finds_the_memory_of_its_last_call():
    def least_of_faults(tunables):
        environment = os.environ | {"XLA_FLAGS": "", "GLIBC_TUNABLES": tunables}
        command = [sys.executable, "-c", FAULTS]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    small_pages = MEMORY.replace("hugetlb=1", "hugetlb=0")
    pages = 8 * 1024 * 2048 * 4 // os.sysconf("SC_PAGE_SIZE")
    assert least_of_faults(small_pages) < pages / 10 < pages / 2 < least_of_faults("")
