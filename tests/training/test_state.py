from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import create_model
from resnet_jax.config import OptimizerConfig
from resnet_jax.training.optimizers import make_optimizer
from resnet_jax.training.state import evaluate, init_variables, path_map


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnetv2_164"])
def test_init_variables_are_those_of_init(name):
    model = create_model(name, stage_sizes=(1, 1, 1))
    images = jnp.zeros((1, 32, 32, 3))
    chex.assert_trees_all_equal(init_variables(model, jax.random.key(3), images), model.init(jax.random.key(3), images))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lars"])
def test_optimizers_begin_as_by_their_own_init(name):
    model = create_model("cifar_resnet8")
    params = init_variables(model, jax.random.key(3), jnp.zeros((1, 32, 32, 3)))["params"]
    init = make_optimizer(OptimizerConfig(name=name), lambda step: 0.1).init
    ours, theirs = evaluate(init, params), init(params)
    chex.assert_trees_all_equal(ours, theirs)
    chex.assert_trees_all_equal_dtypes(ours, theirs)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(ours))
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((ours, params))]
    assert len(set(buffers)) == len(buffers)


def test_evaluate_takes_numbers_and_draws_and_may_be_traced():
    def function(key, x):
        return {
            "draw": jax.random.normal(key, (3,)) * 2,
            "number": 7,
            "given": x,
            "full": jnp.full((2, 2), 0.5),
            "k": key,
        }

    key, x = jax.random.key(1), jnp.arange(3.0)
    for values in (evaluate(function, key, x), jax.jit(lambda key, x: evaluate(function, key, x))(key, x)):
        np.testing.assert_array_equal(values["draw"], function(key, x)["draw"])
        assert values["number"] == 7 and (values["given"] == x).all() and (values["full"] == 0.5).all()
        assert values["k"] == key
    shapes = jax.eval_shape(partial(evaluate, function), key, x)
    assert shapes["draw"].shape == (3,)


def test_path_map_names_parameters_by_their_address():
    paths = path_map(lambda path, leaf: path, {"stage1": {"block1": {"conv1": {"kernel": 0}}}})
    assert paths["stage1"]["block1"]["conv1"]["kernel"] == "stage1/block1/conv1/kernel"
