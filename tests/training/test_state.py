import chex
import jax
import jax.numpy as jnp
import pytest

from resnet_jax import create_model
from resnet_jax.training.state import init_variables, path_map


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnetv2_164"])
def test_init_variables_are_those_of_init(name):
    model = create_model(name, stage_sizes=(1, 1, 1))
    images = jnp.zeros((1, 32, 32, 3))
    chex.assert_trees_all_equal(init_variables(model, jax.random.key(3), images), model.init(jax.random.key(3), images))


def test_path_map_names_parameters_by_their_address():
    paths = path_map(lambda path, leaf: path, {"stage1": {"block1": {"conv1": {"kernel": 0}}}})
    assert paths["stage1"]["block1"]["conv1"]["kernel"] == "stage1/block1/conv1/kernel"
