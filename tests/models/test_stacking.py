"""Blocks one by one and stacked blocks in a loop are the same network."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from resnet_jax import create_model, fold_batch_norm, from_torch, load_pretrained, to_torch
from resnet_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.stacking import grid, stack_blocks, unstack_blocks
from resnet_jax.runs.forecast import forecast
from resnet_jax.training.optimizers import make_optimizer
from resnet_jax.training.sharding import compiler_options, make_mesh, state_sharding
from resnet_jax.training.state import create_state

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 16, 3)), jnp.float32)
SMALL = ResNet((1, 3), widths=(8, 8), stem="3x3", stem_width=8, stem_pool="none", num_classes=5, act="silu")


def gradient(model, variables):
    """Loss, moved statistics and gradient, all block by block."""

    def loss(params):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        logits, moved = model.apply(given, IMAGES, train=True, mutable=["batch_stats"])
        return jnp.square(logits).mean(), moved

    return unstack_blocks(jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"]))


@pytest.mark.parametrize(
    "fields",
    [
        {"block": "basic", "remat": "block"},
        {"preact": True, "remat": "stage"},
        {"block": "basic", "remat": "stage", "stage_sizes": (1, 8)},  # seven in four groups of two
    ],
)
def test_a_loop_over_blocks_computes_what_they_do_one_by_one(fields):
    model = SMALL.clone(zero_init_last=False, **fields)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    stacked = stack_blocks(variables)
    shapes = jax.eval_shape(model.clone(scan=True).init, jax.random.key(0), IMAGES)
    chex.assert_trees_all_equal_shapes(stacked, shapes)
    assert stacked["params"]["stage2"]["blocks"]["conv1"]["kernel"].shape[0] == model.stage_sizes[1] - 1
    expected = gradient(model, variables)
    chex.assert_trees_all_close(gradient(model.clone(scan=True), stacked), expected, rtol=1e-4, atol=1e-6)


def test_stacking_a_whole_state_is_undone_exactly():
    optimizer = make_optimizer(Config().optimizer, optax.constant_schedule(0.1))
    state = create_state(SMALL, optimizer, jax.random.key(0), (16, 16, 3), ema=True)
    stacked = stack_blocks(state)
    assert len(jax.tree.leaves(stacked)) < len(jax.tree.leaves(state))
    chex.assert_trees_all_equal(unstack_blocks(stacked), state)
    chex.assert_trees_all_equal(stack_blocks(stacked), stacked)
    chex.assert_trees_all_equal(unstack_blocks(state), state)


def test_a_program_does_not_grow_with_depth():
    def length(blocks):
        model = SMALL.clone(stage_sizes=(blocks,) * 2, scan=True, remat="block")
        shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
        step = jax.jit(jax.grad(lambda v: model.apply(v, IMAGES, train=True, mutable=["batch_stats"])[0].sum()))
        return len(step.lower(shapes).as_text())

    assert length(200) < 1.02 * length(2)


def test_groups_of_blocks_let_memory_grow_with_the_root_of_depth():
    """Four times as many blocks: beside the parameters' gradients about twice as much, where it was four times."""

    def kept(blocks, remat):
        model = SMALL.clone(stage_sizes=(blocks,), widths=(8,), block="basic", scan=True, remat=remat)
        shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
        step = jax.jit(jax.grad(lambda v: model.apply(v, IMAGES, train=True, mutable=["batch_stats"])[0].sum()))
        return step.lower(shapes).compile(compiler_options()).memory_analysis().temp_size_in_bytes

    grown = {remat: kept(401, remat) - kept(101, remat) for remat in ("block", "stage")}
    images = IMAGES.size // 3 * 8 * 4
    assert grown["block"] >= 300 * images and grown["stage"] < 40 * images, grown


@pytest.mark.parametrize(
    ("count", "expected"), [(1, (1, 1)), (7, (4, 2)), (17, (6, 3)), (110, (11, 10)), (199, (20, 10))]
)
def test_groups_leave_few_blocks_to_spare(count, expected):
    assert grid(count) == expected


def test_rematerialisation_lowers_what_a_compiled_step_holds():
    """Of cifar_resnet32 on one device; deeper nets gain more: cifar_resnet110 goes to 21 %."""
    data, train = DataConfig(image_size=32), TrainConfig(batch_size=64, ema_decay=None)
    models = [ModelConfig("cifar_resnet32", num_classes=10, remat=remat) for remat in ("none", "block")]
    whole, less = (forecast(Config(model, data, train=train), 1)["temporary"] for model in models)
    assert less < 0.37 * whole


def test_weights_come_and_go_in_either_form(tmp_path):
    model, variables = SMALL, jax.jit(SMALL.init)(jax.random.key(1), IMAGES)
    looped, stacked = model.clone(scan=True), stack_blocks(variables)
    tensors = to_torch(looped, stacked)
    chex.assert_trees_all_equal(tensors, to_torch(model, variables))
    chex.assert_trees_all_equal(from_torch(looped, tensors), stacked)
    folded, values = fold_batch_norm(looped, stacked)
    np.testing.assert_allclose(
        jax.jit(folded.apply)(values, IMAGES), jax.jit(model.apply)(variables, IMAGES), rtol=1e-3, atol=1e-4
    )


def test_pretrained_weights_enter_a_looped_model(tmp_path):
    from safetensors.numpy import save_file

    model = create_model("cifar_resnet20", num_classes=10)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    save_file(to_torch(model, variables), tmp_path / "net.safetensors")
    looped, stacked = load_pretrained(str(tmp_path / "net.safetensors"), "cifar_resnet20", scan=True)
    assert looped.scan
    chex.assert_trees_all_equal(stacked, stack_blocks(variables))


def test_stacks_are_spread_within_their_blocks():
    stack = {"stage1": {"block1": jnp.zeros(1), "blocks": {"kernel": jnp.zeros((64, 3, 3, 32, 32))}}}
    places = state_sharding(stack, make_mesh(8, 8))
    assert places["stage1"]["blocks"]["kernel"].spec == P(None, None, None, "fsdp")


def test_unequal_blocks_are_refused():
    with pytest.raises(ValueError, match="scan needs equal blocks"):
        jax.eval_shape(SMALL.clone(scan=True, drop_path_rate=0.1).init, jax.random.key(0), IMAGES)
