"""Which parts learn and how fast, features that are computed once, and a sharper look for flat minima."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.config import (
    AugmentConfig,
    Config,
    FinetuneConfig,
    InputError,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from resnet_jax.data.sources import load_dataset
from resnet_jax.models.registry import create_model
from resnet_jax.training import linear_probe as probe
from resnet_jax.training import loop
from resnet_jax.training.build import build_model, state_maker
from resnet_jax.training.finetune import make_phases, part_numbers
from resnet_jax.training.optimizers import make_optimizer
from resnet_jax.training.programs import compile_phases, recipe_step, weights_of_classes
from resnet_jax.training.sharding import make_mesh, replicated
from resnet_jax.training.state import path_map

BASE = Config(
    model=ModelConfig("cifar_resnet8"),
    augment=AugmentConfig(crop="none"),
    train=TrainConfig(steps=6, batch_size=16, ema_decay=None, eval_every_epochs=99.0),
    log=LogConfig(every_steps=3, tensorboard=False, report=False),
)
BASE = dataclasses.replace(
    BASE,
    schedule=dataclasses.replace(BASE.schedule, warmup_epochs=0.0),
    parallel=dataclasses.replace(BASE.parallel, devices=1),
)


def tuned(mode, **fields):
    return dataclasses.replace(BASE, finetune=FinetuneConfig(mode, **fields))


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_18", "densenet121", "googlenet"])
def test_parts_are_counted_from_the_stem_up(name):
    model = create_model(name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    parts = part_numbers(shapes["params"])
    stages = [parts[f"stage{i}"] for i in range(1, max(parts.values()))]
    assert stages == list(range(1, len(stages) + 1)) and parts["head"] == len(stages) + 1
    assert {number for part, number in parts.items() if part.startswith("stem")} == {0}
    assert parts.get("norm", len(stages)) == len(stages) and parts.get("transition1", 1) == 1


def test_rates_fall_from_the_head_down_and_own_rules_come_first():
    config = dataclasses.replace(
        tuned("full", layer_decay=0.5), optimizer=OptimizerConfig(rate_rules=(("stage3/.*", 7.0),))
    )
    (phase,) = make_phases(config, ["stem", "stage1", "stage2", "stage3", "head"], 10.0)
    paths = ("head/kernel", "stage3/block1/conv1/kernel", "stage2/x", "stage1/x", "stem/conv/kernel")
    assert [phase.rates(path) for path in paths] == [1.0, 7.0, 0.25, 0.125, 0.0625]


def learned(program, step, state, data):
    """The next state, and the parts with a parameter or a statistic that a step changes."""
    before = jax.device_get(state)
    after, _ = program(state.replace(step=jnp.int32(step)), data, 1)
    found = set()
    for tree, old in ((after.params, before.params), (after.batch_stats, before.batch_stats)):
        path_map(lambda path, same: found.add(path.split("/")[0]) if not same else None,
                 jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), tree, old))  # fmt: skip
    return after, found


def test_a_model_without_a_head_cannot_begin_with_it():
    with pytest.raises(InputError, match="gradual begins with the part `head`, and the model has stem, Dense_0"):
        make_phases(tuned("gradual"), ["stem", "Dense_0"], 10.0)


def test_stages_thaw_from_the_head_down_with_their_statistics():
    config = tuned("gradual", thaw_every_epochs=0.1)
    dataset, mesh = load_dataset(config.data, 0, hold_out=False), make_mesh(1)
    model, schedule = build_model(config, 10), optax.constant_schedule(0.1)
    state, parts = state_maker(config, model, schedule)(), set()
    per_epoch = len(dataset.train) / 16
    phases = make_phases(config, state.params, per_epoch)
    assert [phase.start for phase in phases] == [round(0.1 * per_epoch * i) for i in range(5)]
    programs = compile_phases(config, model, schedule, phases, mesh, replicated(mesh), from_device=True, most=1)
    data = {"image": dataset.train.images[:64], "label": dataset.train.labels[:64]}
    for part, phase, program in zip(("head", "stage3", "stage2", "stage1", "stem"), phases, programs, strict=True):
        parts.add(part)
        state, found = learned(program, phase.start, state, data)
        assert found == parts


def test_a_probe_on_features_that_are_computed_once_is_the_probe(tmp_path, monkeypatch):
    config = dataclasses.replace(tuned("linear_probe"), model=ModelConfig("cifar_resnet8", drop_rate=0.2))
    assert probe.computes_features_once(config)
    results = [loop.train(config, tmp_path / "once")]
    monkeypatch.setattr(loop, "computes_features_once", lambda config: False)
    results.append(loop.train(config, tmp_path / "again"))
    assert results[0]["validation"] == pytest.approx(results[1]["validation"], rel=1e-5)
    assert results[0]["steps"] == 6


@pytest.mark.parametrize(
    "changed",
    [
        {"augment": AugmentConfig(crop="none", flip="random")},
        {"augment": AugmentConfig(crop="none", mixup=0.1)},
        {"augment": AugmentConfig(crop="pad")},
        {"optimizer": OptimizerConfig(rate_rules=(("stage3/.*", 1.0),))},
        {"finetune": FinetuneConfig("full")},
    ],
)
def test_features_are_not_kept_where_they_change(changed):
    assert not probe.computes_features_once(dataclasses.replace(tuned("linear_probe"), **changed))


def test_what_is_frozen_costs_no_gradient():
    """The program of a probe is little longer than that of the forward pass."""
    model = build_model(BASE, 10)
    state = state_maker(BASE, model, lambda step: 0.1)()
    batch = {"image": jnp.zeros((16, 8, 8, 3), jnp.uint8), "label": jnp.zeros(16, jnp.int32)}
    batch["mirrored"] = jnp.zeros(16, bool)

    def convolutions(**options):
        step = recipe_step(BASE, model, make_optimizer(BASE.optimizer, lambda step: 0.1), **options)
        return str(jax.make_jaxpr(step)(state, batch)).count("conv_general_dilated[")

    def forward(state, batch):
        return model.apply({"params": state.params, "batch_stats": state.batch_stats}, batch["image"] * 1.0)

    once = str(jax.make_jaxpr(forward)(state, batch)).count("conv_general_dilated[")
    assert convolutions(frozen=lambda path: not path.startswith("head")) == once < convolutions() / 2


def test_sharpness_aware_steps_take_the_gradient_of_the_worst_point_in_the_neighbourhood():
    """Against the gradient that `jax.grad` gives there, on a network without batch statistics."""
    config = dataclasses.replace(
        BASE, optimizer=OptimizerConfig(momentum=0.0, nesterov=False, weight_decay=0.0, sam_rho=0.1)
    )
    model = create_model("cifar_resnet8", norm="frozen_batch", num_classes=10)
    state = state_maker(config, model, lambda step: 0.1)()
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8), "label": rng.integers(0, 10, 16)}
    batch["mirrored"] = np.zeros(16, bool)

    def loss(params):
        pixels = (batch["image"] / 255.0 - 0.305) / 0.376
        logits = model.apply({"params": params, "batch_stats": state.batch_stats}, jnp.asarray(pixels, jnp.float32))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    gradient = jax.jit(jax.grad(loss))
    grads = gradient(state.params)
    length = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    worst = gradient(jax.tree.map(lambda p, g: p + 0.1 * g / length, state.params, grads))
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, worst)
    optimizer = make_optimizer(config.optimizer, optax.constant_schedule(0.5))
    after, _ = jax.jit(recipe_step(config, model, optimizer))(state, batch)
    chex.assert_trees_all_close(after.params, expected, rtol=1e-3, atol=1e-5)
    assert float(jnp.abs(worst["head"]["kernel"] - grads["head"]["kernel"]).max()) > 1e-3


def test_classes_count_what_the_recipe_says(tmp_path):
    config = dataclasses.replace(BASE, train=dataclasses.replace(BASE.train, class_weights="balanced"))
    dataset = load_dataset(config.data, 0, hold_out=False)
    weights = weights_of_classes(config, dataset, 10)
    counts = np.bincount(dataset.train.labels)
    np.testing.assert_allclose(weights * counts, len(dataset.train) / 10, rtol=1e-6)
    assert loop.train(config, tmp_path)["steps"] == 6
