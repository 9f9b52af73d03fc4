"""Eight virtual CPU devices, a compilation cache that all tests share, and the pictures beside the checkout."""

import gc
import os
import signal
from importlib import metadata

os.environ["JAX_PLATFORMS"] = "cpu"
# Level 0 and no fusion emitters halve the time to compile; what is compiled is slower, over few steps. Compiling in one
# piece, not in 32, takes a quarter less of what is left. XLA ends the process over a flag that it does not know, and
# since JAX 0.12 it does not know the last one.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
if tuple(int(part) for part in metadata.version("jaxlib").split(".")[:2]) < (0, 12):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]

gc.set_threshold(50_000)  # as the command does
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the runs that tests start would ignore it, too


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(pytestconfig):
    """What one run has compiled the next one finds, in `.pytest_cache`, which `pytest --cache-clear` empties."""
    folder = pytestconfig.cache.mkdir("xla")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # of processes that tests start
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def pictures() -> Path:
    """The folder of real pictures that lies beside a full checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real pictures in {folder}")
    return folder
