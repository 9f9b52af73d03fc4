import ast
import subprocess
import sys
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

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


LAYERS = """
typed output configs config files recipe_files recipe_flags
ops ops.*
models models.*
weights weights.*
analysis predict.gradcam predict.fold_batch_norm training.state training.sharding
data data.*
training.[!lsv]* training.losses training.linear_probe training.several_steps training.step training
runs runs.*
training.loop training.sweep* training.verify*
predict predict.* lab lab.*
__init__ __main__ cli commands
"""
"""From below; a file imports of its own line and of those above it in this text. The first line that fits counts."""
CHECKPOINTS_AS_WEIGHTS = {
    ("weights.sources", "training.checkpoints"),
    *(("weights.export", f"training.{name}") for name in ("build", "checkpoints", "parts")),
}
"""Inside functions: a run is a source of weights, and weights are written as a checkpoint."""


def layer_of(module: str) -> int:
    layers = [line.split() for line in LAYERS.strip().splitlines()]
    return next(i for i, names in enumerate(layers) if any(fnmatch(module, name) for name in names))


def test_nothing_imports_upward():
    """The picture in CONTRIBUTING.md."""
    import resnet_jax

    root, upward = Path(resnet_jax.__file__).parent, set()
    for file in root.rglob("*.py"):
        module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resnet_jax."):
                target = node.module.removeprefix("resnet_jax.")
                if layer_of(target) > layer_of(module):
                    upward.add((module, target))
    assert upward == CHECKPOINTS_AS_WEIGHTS
