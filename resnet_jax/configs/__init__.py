"""The recipes that are shipped, one a file: beside this one in a wheel, in `configs/` in a checkout.

Another recipe may start from one of them: `from resnet_jax.configs.finetune_folder import config`.
"""

from pathlib import Path

FOLDER = next(
    folder
    for folder in (Path(__file__).parent, Path(__file__).parents[2] / "configs")
    if (folder / "digits_resnet20.py").is_file()
)
__path__ = [str(FOLDER)]
