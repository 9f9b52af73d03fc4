"""A small network as a file, and the recipe of a command line."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.commands import ConfigFlag, RecipeFlags, WorkdirFlag, call
from resnet_jax.config import Config
from resnet_jax.models.registry import create_model
from resnet_jax.recipe_files import load_config
from resnet_jax.recipe_flags import checked
from resnet_jax.training.resolve import filled
from resnet_jax.weights.convert import to_torch
from resnet_jax.weights.export import save_tensors
from resnet_jax.weights.sources import Weights
from resnet_jax.weights.tags import Preprocessing


def save_small_network(path: Path) -> None:
    """Writes a random network of ten classes, with what it needs to predict."""
    model = create_model("cifar_resnet8", num_classes=10)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    look = Preprocessing((0.5,) * 3, (0.5,) * 3, 8, 8, 1.0, "bilinear")
    save_tensors(path, Weights(to_torch(model, variables), "cifar_resnet8", {"num_classes": 10}, look), "safetensors")


def digits(**sections: Any) -> Config:
    """The digits recipe with other sections; what these leave open is as in it."""
    recipe = load_config("digits_resnet20")
    return filled(dataclasses.replace(recipe, **sections), recipe)


def parse_recipe(flags: list[str]) -> tuple[Config, str | None]:
    """Recipe and workdir that `train` is given by flags."""

    def train(recipe: RecipeFlags, config: ConfigFlag = None, workdir: WorkdirFlag = None):
        return checked(recipe), workdir

    return call(["train", *flags], {"train": train})
