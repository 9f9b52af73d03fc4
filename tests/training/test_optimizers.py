import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.config import Config, InputError, OptimizerConfig, ScheduleConfig, TrainConfig
from resnet_jax.training.optimizers import make_optimizer, make_schedule, warmup_steps

PARAMS = {"conv": {"kernel": jnp.full((3, 4), 2.0)}, "norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lars"])
def test_every_optimizer_descends_a_parabola(name):
    rate = {"sgd": 0.02, "adamw": 0.1, "lamb": 0.1, "lars": 5.0}[name]
    schedule = optax.cosine_decay_schedule(rate, 300)
    optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=0.0), schedule)
    params, target = {"conv": PARAMS["conv"]}, {"conv": {"kernel": jnp.full((3, 4), 3.0)}}

    def loss(params):
        return jnp.square(params["conv"]["kernel"] - target["conv"]["kernel"]).sum()

    state, start = optimizer.init(params), loss(params)
    step = jax.jit(lambda p, s: optimizer.update(jax.grad(loss)(p), s, p))
    for _ in range(300):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert loss(params) < 0.01 * start


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lars"])
def test_decay_touches_kernels_only(name):
    optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=0.1), optax.constant_schedule(1.0))
    updates, _ = optimizer.update(ZEROS, optimizer.init(PARAMS), PARAMS)
    assert np.all(np.asarray(updates["conv"]["kernel"]) < 0)
    assert not np.any(updates["norm"]["scale"]) and not np.any(updates["norm"]["bias"])


def test_sgd_is_that_of_pytorch():
    """Two steps of `torch.optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)` by hand."""
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.01), optax.constant_schedule(0.1))
    p, v, params = 2.0, 0.0, {"conv": {"kernel": jnp.full((1, 1), 2.0)}}
    state = optimizer.init(params)
    for gradient in (0.5, -0.3):
        decayed = gradient + 0.01 * p
        v = 0.9 * v + decayed
        p -= 0.1 * (decayed + 0.9 * v)
        updates, state = optimizer.update({"conv": {"kernel": jnp.full((1, 1), gradient)}}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["conv"]["kernel"], p, rtol=1e-6)


def test_rules_take_the_first_match_and_must_cover_everything():
    rules = (("conv/kernel", 0.5), (".*", 1.0))
    config = OptimizerConfig(weight_decay=0.1, momentum=0.0, nesterov=False, decay_rules=rules)
    optimizer = make_optimizer(config, optax.constant_schedule(1.0))
    updates, _ = optimizer.update(ZEROS, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["conv"]["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["norm"]["scale"], -0.1, rtol=1e-6)
    uncovered = dataclasses.replace(config, decay_rules=rules[:1])
    with pytest.raises(InputError, match="norm/bias"):
        make_optimizer(uncovered, optax.constant_schedule(1.0)).init(PARAMS)


def test_clipping_bounds_the_norm_of_the_update():
    config = OptimizerConfig(weight_decay=0.0, momentum=0.0, nesterov=False, clip_norm=0.5)
    optimizer = make_optimizer(config, optax.constant_schedule(1.0))
    updates, _ = optimizer.update(jax.tree.map(lambda p: p + 3.0, PARAMS), optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-5)


def rates(schedule, steps, learning_rate=1.0, **train):
    config = Config(
        schedule=ScheduleConfig(**schedule),
        optimizer=OptimizerConfig(learning_rate=learning_rate, base_batch_size=train.pop("base", None)),
        train=TrainConfig(**train),
    )
    function = make_schedule(config, 100, 10.0)
    return [float(function(step)) for step in steps]


def test_schedules_at_their_corners():
    cosine = rates({"name": "cosine", "warmup_epochs": 1.0}, (0, 5, 10, 55, 99))
    np.testing.assert_allclose(cosine, [0.0, 0.5, 1.0, 0.5, 0.0003], atol=1e-3)
    step = rates({"name": "step", "warmup_epochs": 0.0, "boundaries": (0.5, 0.75)}, (0, 49, 51, 74, 76, 99))
    np.testing.assert_allclose(step, [1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-5)
    constant = rates({"name": "constant", "warmup_epochs": 1.0, "warmup_factor": 0.5}, (0, 5, 10, 99))
    np.testing.assert_allclose(constant, [0.5, 0.75, 1, 1], rtol=1e-5)
    one_cycle = rates({"name": "one_cycle"}, (0, 30, 99))
    np.testing.assert_allclose(one_cycle, [0.04, 1.0, 0.0], atol=2e-3)


def test_linear_scaling_by_batch():
    assert rates({"name": "constant", "warmup_epochs": 0.0}, (3,), 0.1, base=256, batch_size=1024) == [
        pytest.approx(0.4)
    ]


def test_a_warm_up_longer_than_the_run_is_a_fifth_of_it():
    found = rates({"name": "constant", "warmup_epochs": 10.0}, (0, 10, 20, 99))
    np.testing.assert_allclose(found, [0.0, 0.5, 1.0, 1.0], rtol=1e-6)
    config = Config(schedule=ScheduleConfig(warmup_epochs=2.0))
    assert warmup_steps(config, 10, 12.0) == (
        2,
        "schedule.warmup_epochs 2 is 24 steps, and the run has 10: shortened to 2",
    )
    assert warmup_steps(config, 1, 12.0)[0] == 0 and warmup_steps(config, 99, 12.0) == (24, "")


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lars"])
def test_rates_by_rule_freeze_and_scale(name):
    """Frozen parameters stay to the last bit, decay included; the others move as with a rate of their own."""
    rules = (("norm/.*", 0.0), ("conv/.*", 0.5))
    ruled, halved = (
        make_optimizer(OptimizerConfig(name=name, weight_decay=0.1, rate_rules=r), optax.constant_schedule(rate))
        for r, rate in ((rules, 0.2), ((), 0.1))
    )
    gradients = jax.tree.map(lambda p: 0.3 + jnp.arange(p.size, dtype=jnp.float32).reshape(p.shape), PARAMS)
    results = []
    for optimizer in (ruled, halved):
        params, state = PARAMS, optimizer.init(PARAMS)
        for _ in range(3):
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        results.append(params)
    np.testing.assert_allclose(results[0]["conv"]["kernel"], results[1]["conv"]["kernel"], rtol=1e-5)
    for leaf in ("scale", "bias"):
        np.testing.assert_array_equal(results[0]["norm"][leaf], PARAMS["norm"][leaf])
        assert np.any(results[1]["norm"][leaf] != PARAMS["norm"][leaf])


def test_a_rate_rule_that_matches_nothing_is_named():
    optimizer = make_optimizer(
        OptimizerConfig(rate_rules=((".*", 0.0), ("head/.*", 1.0))), optax.constant_schedule(1.0)
    )
    with pytest.raises(InputError, match=r"'head/\.\*' is the first match of no parameter"):
        optimizer.init(PARAMS)
