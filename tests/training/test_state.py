import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax import create_model, make_mesh, make_train_step, shard_batch
from resnet_jax.config import OptimizerConfig
from resnet_jax.training.optimizers import make_optimizer
from resnet_jax.training.state import create_state, path_map


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lars"])
def test_a_new_state_is_that_of_the_model_and_the_optimizer(name, ema):
    model, key = create_model("cifar_resnet8"), jax.random.key(3)
    optimizer = make_optimizer(OptimizerConfig(name=name), lambda step: 0.1)
    state = create_state(model, optimizer, key, (32, 32, 3), ema)
    variables = model.init(key, jnp.zeros((1, 32, 32, 3)))
    chex.assert_trees_all_close(state.params, variables["params"], rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_equal(state.batch_stats, variables["batch_stats"])
    assert state.step == 0 and (state.ema is not None) == ema
    theirs = optimizer.init(state.params)
    chex.assert_trees_all_equal(state.opt_state, theirs)
    chex.assert_trees_all_equal_dtypes(state.opt_state, theirs)
    if ema:
        chex.assert_trees_all_equal(state.ema, {"params": state.params, "batch_stats": state.batch_stats})
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)  # each may be donated


class Net(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        x = nn.BatchNorm(not train)(nn.Dense(4)(images))
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.parametrize("devices", [1, 8])
def test_a_state_on_a_mesh_is_the_same_one_and_has_the_step_compiled_once(devices):
    model, optimizer, mesh = Net(), optax.adam(0.1), make_mesh(devices)
    make = (model, optimizer, jax.random.key(3), (8, 8, 3), True)
    state = create_state(*make, mesh=mesh)
    chex.assert_trees_all_equal(state, create_state(*make))
    step = jax.jit(make_train_step(model, optimizer, ema_decay=0.9), donate_argnums=0)
    batch = {"image": np.zeros((16, 8, 8, 3), np.uint8), "label": np.arange(16) % 3}
    for _ in range(3):
        state, _ = step(state, shard_batch(batch, mesh))
    assert step._cache_size() == 1


def test_path_map_names_parameters_by_their_address():
    paths = path_map(lambda path, leaf: path, {"stage1": {"block1": {"conv1": {"kernel": 0}}}})
    assert paths["stage1"]["block1"]["conv1"]["kernel"] == "stage1/block1/conv1/kernel"
