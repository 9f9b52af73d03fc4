import dataclasses
import os
import shutil
import subprocess
import sys
import tomllib

import pytest

from resnet_jax.config import Config
from resnet_jax.recipe_files import load_config
from resnet_jax.training import loop
from resnet_jax.training.resolve import resolve

from .conftest import ROOT

RECIPES = sorted((ROOT / "configs").glob("*.py"))


def test_recipes_are_found_by_name_where_the_package_is_installed(tmp_path):
    """The files as a wheel lays them out, without the checkout."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in wheel["packages"]:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for folder, place in wheel["force-include"].items():
        shutil.copytree(ROOT / folder, tmp_path / place, ignore=ignored, dirs_exist_ok=True)
    code = "import resnet_jax.recipe_files as r; print(r.load_config('cifar10_fast').model.name, *r.recipe_names())"
    command = [sys.executable, "-c", code]
    printed = subprocess.check_output(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, text=True)
    assert printed.split() == ["cifar_resnet18", *sorted(path.stem for path in RECIPES)]


def test_the_default_is_the_digits_recipe():
    recipe = load_config(ROOT / "configs" / "digits_resnet20.py")
    assert resolve(Config()).config == resolve(recipe).config == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_loads_and_runs_a_step_when_shrunk(path, tmp_path):
    config = load_config(path)
    size = 32 if config.model.pretrained else min(config.data.image_size, 32)
    small = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, dataset="synthetic", synthetic_size=16, image_size=size, eval_image_size=None, workers=0
        ),
        model=dataclasses.replace(config.model, name="cifar_resnet8", pretrained=None),
        train=dataclasses.replace(config.train, steps=1, batch_size=8),
        schedule=dataclasses.replace(config.schedule, warmup_epochs=0.0),
        parallel=dataclasses.replace(config.parallel, devices=1),
        log=dataclasses.replace(config.log, report=False),
    )
    summary = loop.train(small, tmp_path)
    assert summary["steps"] == 1 and summary["validation"]["count"] == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_says_what_to_expect(path):
    text = path.read_text()
    for word in ("Hardware:", "Expected time:", "Expected", "accuracy:", "Source"):
        assert word in text or (word == "Source" and "et al." in text)
