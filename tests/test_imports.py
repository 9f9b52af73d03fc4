import subprocess
import sys
from importlib import metadata

import pytest

from resnet_jax.typed import DISTRIBUTION

LIGHT = """
import sys
import resnet_jax as rj
face = [getattr(rj, name) for name in rj.__all__ if name not in ("train", "sweep", "restore", "verify")]
from resnet_jax.data import on_device
from resnet_jax.training import losses, optimizers, state, step
import resnet_jax.training.sharding
heavy = "grain tensorflow_datasets PIL cv2 tyro rich matplotlib sklearn orbax huggingface_hub tensorboardX torch"
print([name for name in heavy.split() if name in sys.modules])
"""


def test_the_package_the_models_and_the_step_need_jax_flax_and_optax_alone():
    result = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    baseline = "import jax, flax.linen, optax, sys\n" + LIGHT.splitlines()[-2] + "\n" + LIGHT.splitlines()[-1]
    theirs = subprocess.run([sys.executable, "-c", baseline], capture_output=True, text=True, check=True)
    assert result.stdout == theirs.stdout


def test_a_checkout_on_the_path_needs_no_installation():
    """Machines with a GPU are often given a copy of the files alone."""
    code = "from importlib import metadata as m; m.distribution = None; import resnet_jax as rj; print(rj.__version__)"
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert printed == metadata.version(DISTRIBUTION) + "\n"


def test_every_name_is_there_when_asked_for():
    import resnet_jax

    names = set(resnet_jax.__all__) - {"__version__", "analysis"}
    assert names == {name for home in resnet_jax._HOMES.values() for name in home} and names < set(dir(resnet_jax))
    assert all(getattr(resnet_jax, name).__name__ == name for name in names)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = resnet_jax.trian


def test_the_command_is_there_before_jax():
    """It replaces its process once, and jax would have been imported twice."""
    code = "import sys, resnet_jax.cli; print('jax' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False False\n"


WITHOUT_JAX = """
import contextlib, sys
from resnet_jax.cli import main
for line in ("--help", "--version", "train --help", "train --train.sed 3", "plan --train.seed -1", "plan --config x"):
    with contextlib.suppress(SystemExit):
        main(line.split())
    assert "jax" not in sys.modules, line
"""


def test_help_and_wrong_flags_are_answered_before_jax():
    subprocess.run([sys.executable, "-c", WITHOUT_JAX], check=True, capture_output=True)
