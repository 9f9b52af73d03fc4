"""The three ways to split a step, the scopes of batch normalisation, and the state spread over devices."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.config import AugmentConfig, Config, DataConfig, InputError, LogConfig, ParallelConfig, TrainConfig
from resnet_jax.data.dataset import ArraySource, Dataset
from resnet_jax.data.loader import BadImages, train_batches, whole_split
from resnet_jax.models.layers import BatchNorm
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import ResNet
from resnet_jax.training.build import state_maker
from resnet_jax.training.optimizers import make_optimizer
from resnet_jax.training.programs import check_scope, compile_steps, steps_in_call, steps_per_call
from resnet_jax.training.sharding import (
    make_mesh,
    put_everywhere,
    put_state,
    replicated,
    state_sharding,
    uncached_where_it_hangs,
)
from resnet_jax.training.state import create_state

from ..small import digits

pytestmark = pytest.mark.xdist_group("strategies")  # one process makes what they share

RNG = np.random.default_rng(0)
SPLIT = ArraySource(RNG.integers(0, 256, (80, 8, 8, 3), dtype=np.uint8), RNG.integers(0, 5, 80))
DATA = Dataset(SPLIT, None, SPLIT, tuple("abcde"))
MODEL = ResNet((1, 1), block="basic", widths=(8, 16), stem="3x3", stem_width=8, stem_pool="none", num_classes=5)


def run(devices, strategy="jit", batch_norm="global", fsdp=1, on_device=True, steps=20, model=MODEL, accumulate=1):
    """The state after so many steps with augmentation, mixup and averages."""
    config = digits(
        data=DataConfig(image_size=8, on_device=on_device),
        augment=AugmentConfig(crop="pad", pad=1, flip="random", mixup=0.3),
        train=TrainConfig(
            batch_size=16, ema_decay=0.9, label_smoothing=0.1, accumulate_steps=accumulate, steps_per_call=1
        ),
        parallel=ParallelConfig(strategy=strategy, batch_norm=batch_norm, fsdp=fsdp),
    )
    mesh, schedule = make_mesh(devices, fsdp), optax.constant_schedule(0.05)
    state = put_state(state_maker(config, model, schedule)(), mesh)
    step, total = stepper(config, model, mesh, schedule, state, steps), 0.0
    for _ in range(steps):
        state, sums = step(state)
        assert np.sum(sums["count"]) == 16
        total += float(np.sum(sums["loss"]))
    return jax.device_get(state), total


def stepper(config, model, mesh, schedule, state, steps, most=1):
    """`step(state, n=most) -> (state, sums)`, the next n of some steps, as the loop calls them."""
    out = (state_sharding(state, mesh), replicated(mesh))
    optimizer, bad = make_optimizer(config.optimizer, schedule), BadImages("error")
    how = {"from_device": config.data.on_device, "most": most}
    program = compile_steps(config, model, optimizer, mesh, out, **how)
    numbers = put_everywhere({n: np.int32(n) for n in range(1, most + 1)}, mesh)
    if config.data.on_device:
        whole = put_everywhere(whole_split(DATA.train, config, bad), mesh)
        return lambda state, n=most: program(state, whole, numbers[n])
    batches = train_batches(DATA.train, config, mesh, bad, range(steps))

    def step(state, n=most):
        given = [next(batches) for _ in range(n)]
        return program(state, given + given[-1:] * (most - n), numbers[n])

    return step


@pytest.fixture(scope="module")
def alone():
    return {on_device: run(1, on_device=on_device) for on_device in (True, False)}


def same(result, expected):
    chex.assert_trees_all_close(result[0], expected[0], rtol=1e-5, atol=2e-5)
    assert result[1] == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize(
    ("strategy", "devices"), [("jit", 2), ("jit", 8), *((s, n) for s in ("shard_map", "pmap") for n in (1, 2, 8))]
)
def test_every_strategy_on_any_devices_is_one_device(strategy, devices, alone):
    same(run(devices, strategy), alone[True])


@pytest.mark.parametrize("strategy", ["shard_map", "pmap"])
def test_the_same_with_data_from_the_host(strategy, alone):
    same(run(4, strategy, on_device=False), alone[False])


@pytest.mark.parametrize("batch_norm", ["local", "ghost:2"])
def test_scopes_mean_the_same_in_every_strategy(batch_norm, alone):
    expected = run(4, "jit", batch_norm)
    for strategy in ("shard_map", "pmap"):
        same(run(4, strategy, batch_norm), expected)
    same(run(1, "jit", "ghost:4" if batch_norm == "local" else batch_norm), expected)
    assert abs(expected[1] - alone[True][1]) > 1e-3


class OwnNet(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, train):
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(images)
        return nn.Dense(5)(x.mean((1, 2)))


class Without(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(5)(nn.BatchNorm(use_running_average=not train)(images).mean((1, 2)))


class Frozen(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(5)(nn.BatchNorm(use_running_average=True)(images).mean((1, 2)))


def own(strategy, batch_norm):
    config = Config(
        data=DataConfig(image_size=8),
        train=TrainConfig(batch_size=16),
        parallel=ParallelConfig(strategy=strategy, batch_norm=batch_norm),
    )
    return lambda net, devices=8: check_scope(config, net, devices)


@pytest.mark.parametrize("strategy", ["shard_map", "pmap"])
def test_a_net_whose_norms_see_one_device_alone_is_refused_where_the_recipe_says_the_whole_batch(strategy):
    check = own(strategy, "global")
    with pytest.raises(InputError, match=r"Without would be those of each device's own 2 images.*axis_name=self.axis"):
        check(Without())
    for fine in (OwnNet(), Frozen()):
        check(fine)
    check(Without(), devices=1)
    own(strategy, "local")(Without())


def test_a_scope_that_a_net_does_not_have_is_refused():
    for batch_norm in ("local", "ghost:4"):
        with pytest.raises(InputError, match=f"parallel.batch_norm {batch_norm} has no effect on OwnNet, which has no"):
            own("jit", batch_norm)(OwnNet())
        own("jit", batch_norm)(MODEL)
    own("jit", "local")(OwnNet(), devices=1)
    own("jit", "ghost:16")(OwnNet())


def test_ghost_batches_are_batches_of_their_own():
    x = jnp.asarray(RNG.normal(size=(6, 3, 3, 4)), jnp.float32)
    whole, ghost = BatchNorm(), BatchNorm(ghost=2)
    variables = whole.init(jax.random.key(0), x)
    y, moved = ghost.apply(variables, x, train=True, mutable=["batch_stats"])
    parts = [whole.apply(variables, x[i : i + 2], train=True, mutable=["batch_stats"]) for i in (0, 2, 4)]
    np.testing.assert_allclose(y, np.concatenate([part for part, _ in parts]), rtol=1e-5, atol=1e-5)
    mean = jax.tree.map(lambda *stats: np.mean(stats, 0), *(stats for _, stats in parts))
    chex.assert_trees_all_close(moved, mean, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="batch of 5 images does not divide into ghost batches of 2"):
        ghost.apply(variables, x[:5], train=True, mutable=["batch_stats"])


def test_a_state_spread_over_devices_trains_the_same():
    wide = MODEL.clone(widths=(32, 64), stem_width=32)
    expected = run(1, model=wide)
    for devices, fsdp in ((8, 8), (8, 2), (4, 4)):
        with uncached_where_it_hangs(make_mesh(devices, fsdp)):
            same(run(devices, fsdp=fsdp, model=wide), expected)


@pytest.mark.parametrize(("name", "spread"), [("resnet50", (8, 2)), ("resnetv2_152x4_bit", (8,))])
def test_a_device_holds_its_share_of_the_state_of_a_large_model(name, spread):
    """Read from the compiled program of an update: parameters, momentum and averages."""
    optimizer = make_optimizer(Config().optimizer, optax.constant_schedule(0.1))
    model = create_model(name)
    shapes = jax.eval_shape(lambda: create_state(model, optimizer, jax.random.key(0), (64, 64, 3), ema=True))
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    for parts in spread:
        shardings = state_sharding(shapes, make_mesh(8, parts))
        placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        update = jax.jit(lambda state: jax.tree.map(lambda x: x * 2, state), donate_argnums=0, out_shardings=shardings)
        held = update.lower(placed).compile().memory_analysis().argument_size_in_bytes
        assert held <= 1.1 / parts * whole


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "pmap", "fsdp": 2}, "fsdp needs parallel.strategy jit"),
        ({"strategy": "shard_map", "fsdp": 2}, "fsdp needs parallel.strategy jit"),
        ({"batch_norm": "ghosts"}, "choose global, local or ghost:N"),
        ({"batch_norm": "ghost:0"}, "choose global, local or ghost:N"),
        ({"coordinator": "localhost:1"}, "belong together"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        ParallelConfig(**fields)


def test_devices_that_do_not_divide_are_named():
    with pytest.raises(InputError, match="8 devices do not divide"):
        make_mesh(8, 3)


@pytest.mark.parametrize("strategy", ["jit", "shard_map"])
@pytest.mark.parametrize("devices", [1, 4])
def test_parts_of_a_batch_add_up_to_the_batch(strategy, devices):
    """To the last rounding without batch normalisation; with it each part is a ghost batch."""
    grouped = MODEL.clone(norm="group", widths=(32, 32), stem_width=32)
    expected = run(1, model=grouped, steps=5)
    same(run(devices, strategy, model=grouped, steps=5, accumulate=4), expected)


def test_parts_move_the_running_statistics_one_after_the_other():
    state, loss = run(1, steps=1, accumulate=2)
    whole, _ = run(1, steps=1)
    assert (
        np.isfinite(loss)
        and np.abs(state.batch_stats["stem"]["norm"]["mean"]).max()
        > 1.5 * np.abs(whole.batch_stats["stem"]["norm"]["mean"]).max()
    )


@pytest.mark.parametrize("remat", ["block", "stage"])
def test_what_is_computed_twice_comes_to_the_same(remat, alone):
    same(run(1, model=MODEL.clone(remat=remat)), alone[True])


@pytest.mark.parametrize("on_device", [True, False])
def test_a_call_ends_where_something_is_due(on_device):
    config = digits(data=DataConfig(image_size=8, on_device=on_device), train=TrainConfig(batch_size=16))
    mesh, schedule = make_mesh(1), optax.constant_schedule(0.05)
    state = put_state(state_maker(config, MODEL, schedule)(), mesh)
    call, step, ended = stepper(config, MODEL, mesh, schedule, state, 13, most=3), 0, []
    while step < 13:
        n = steps_in_call(step, 3, ends=(13,), every=(4, 6))
        state, sums = call(state, n)
        step += n
        ended.append(step)
        assert np.count_nonzero(sums["count"]) == n
    assert ended == [3, 4, 6, 8, 11, 12, 13] and int(state.step) == 13


def test_a_recipe_that_does_not_say_how_many_steps_a_call_has():
    assert steps_per_call(Config(), True) > steps_per_call(Config(), False) > 1
    for drawn in (True, False):
        assert steps_per_call(Config(train=TrainConfig(steps_per_call=7)), drawn) == 7
        assert steps_per_call(Config(parallel=ParallelConfig(strategy="pmap")), drawn) == 1
        assert steps_per_call(Config(log=LogConfig(profile="3:5")), drawn) == 1
        assert steps_per_call(Config(), drawn, own_model=True) == 1  # on a CPU, as here


@pytest.mark.parametrize("on_device", [True, False])
def test_the_loop_moves_nothing_unasked_and_compiles_once(on_device):
    compiled = []

    def listen(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    config = digits(data=DataConfig(image_size=8, on_device=on_device), train=TrainConfig(batch_size=16, ema_decay=0.9))
    mesh, schedule = make_mesh(4), optax.constant_schedule(0.05)
    state = put_state(state_maker(config, MODEL, schedule)(), mesh)
    step = stepper(config, MODEL, mesh, schedule, state, 12, most=4)
    state, _ = step(state)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with jax.transfer_guard("disallow"):
            for _ in range(2):
                state, _ = step(state)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compiled and int(state.step) == 12
