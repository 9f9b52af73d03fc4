import subprocess
import sys

LIGHT = """
import sys
import resnet_jax as rj
from resnet_jax.data import on_device
from resnet_jax.training import losses, optimizers, state, step
import resnet_jax.sharding
heavy = "grain tensorflow_datasets PIL cv2 tyro rich matplotlib sklearn orbax huggingface_hub tensorboardX torch"
print([name for name in heavy.split() if name in sys.modules])
"""


def test_the_package_the_models_and_the_step_need_jax_flax_and_optax_alone():
    result = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    baseline = "import jax, flax.linen, optax, sys\n" + LIGHT.splitlines()[-2] + "\n" + LIGHT.splitlines()[-1]
    theirs = subprocess.run([sys.executable, "-c", baseline], capture_output=True, text=True, check=True)
    assert result.stdout == theirs.stdout


def test_train_is_there_when_asked_for():
    import resnet_jax

    assert callable(resnet_jax.train)
