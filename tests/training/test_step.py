import dataclasses
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import resnet_jax
from resnet_jax.config import AugmentConfig, InputError, ModelConfig, TrainConfig
from resnet_jax.data.on_device import draw_batch
from resnet_jax.models.resnet import ResNet
from resnet_jax.recipe_files import load_config
from resnet_jax.training.optimizers import make_optimizer, make_schedule
from resnet_jax.training.programs import draw_from, recipe_eval_step, recipe_step
from resnet_jax.training.several_steps import steps_on_batches, steps_on_device
from resnet_jax.training.sharding import batch_sharding, make_mesh, replicated, shard_batch
from resnet_jax.training.state import create_state

from ..small import digits

RNG = np.random.default_rng(0)
DATA = {"image": RNG.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), "label": RNG.integers(0, 7, 40, dtype=np.int32)}
BATCH = {name: values[:16] for name, values in DATA.items()}
CONFIG = digits(
    augment=AugmentConfig(crop="pad", pad=1, flip="random", mixup=0.3),
    train=TrainConfig(batch_size=16, label_smoothing=0.1, ema_decay=0.9),
)


def net(dtype=jnp.float32):
    row = {"stage_sizes": (1, 1), "block": "basic", "widths": (8, 16), "stem": "3x3", "stem_width": 8}
    return ResNet(**row, stem_pool="none", num_classes=7, dtype=dtype, zero_init_last=False)


def new_state(model, optimizer):
    return create_state(model, optimizer, jax.random.key(0), (8, 8, 3), ema=True)


def run(devices, steps=3, config=CONFIG):
    """State and sums of some steps on a mesh of so many devices, from the same start."""
    mesh, model = make_mesh(devices), net(jnp.dtype(config.model.compute_dtype))
    optimizer = make_optimizer(config.optimizer, optax.constant_schedule(0.1))
    state = jax.jit(lambda: new_state(model, optimizer), out_shardings=replicated(mesh))()
    step = jax.jit(recipe_step(config, model, optimizer), donate_argnums=0, out_shardings=replicated(mesh))
    for _ in range(steps):
        state, sums = step(state, shard_batch(BATCH, mesh))
    assert step._cache_size() == 1
    return jax.device_get(state), jax.device_get(sums)


def test_the_loss_falls_and_the_step_counts():
    first, later = run(1, steps=1)[1], run(1, steps=40)
    assert later[0].step == 40
    assert later[1]["loss"] < 0.8 * first["loss"]
    assert later[1]["count"] == 16


def test_the_gradient_is_that_of_finite_differences():
    config = dataclasses.replace(
        CONFIG,
        augment=dataclasses.replace(CONFIG.augment, crop="none"),
        optimizer=dataclasses.replace(CONFIG.optimizer, weight_decay=0.0, momentum=0.0, nesterov=False),
    )
    model, optimizer = net(), make_optimizer(config.optimizer, optax.constant_schedule(1.0))
    state, step = new_state(model, optimizer), jax.jit(recipe_step(config, model, optimizer))
    after, _ = step(state, BATCH)
    gradient = jax.tree.map(lambda a, b: a - b, state.params, after.params)
    length = float(optax.tree.norm(gradient))

    def loss(shift):
        params = jax.tree.map(lambda p, g: p + shift * g / length, state.params, gradient)
        _, sums = step(state.replace(params=params), BATCH)
        return float(sums["loss"]) / 16

    numeric = (loss(3e-3) - loss(-3e-3)) / 6e-3
    np.testing.assert_allclose(numeric, length, rtol=2e-2)


def test_ema_starts_fast_and_ends_at_its_decay():
    model, optimizer = net(), make_optimizer(CONFIG.optimizer, optax.constant_schedule(0.1))
    state, step = new_state(model, optimizer), jax.jit(recipe_step(CONFIG, model, optimizer))
    after, _ = step(state, BATCH)
    expected = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, state.params, after.params)
    chex.assert_trees_all_close(after.ema["params"], expected, rtol=1e-4, atol=1e-6)
    late = state.replace(step=jnp.int32(10_000))
    after, _ = step(late, BATCH)
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, state.batch_stats, after.batch_stats)
    chex.assert_trees_all_close(after.ema["batch_stats"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("devices", [1, 2])
def test_several_steps_in_one_call_are_the_steps_one_by_one(devices, streamed):
    mesh, model = make_mesh(devices), net()
    optimizer = make_optimizer(CONFIG.optimizer, optax.constant_schedule(0.1))
    train_step = recipe_step(CONFIG, model, optimizer)
    data = jax.device_put(DATA, replicated(mesh))
    drawn = [draw_batch(DATA, np.int32(i), CONFIG.train.batch_size, CONFIG.train.seed) for i in range(4)]
    batches = jax.device_put(drawn, batch_sharding(mesh))
    start = jax.jit(lambda: new_state(model, optimizer), out_shardings=replicated(mesh))
    results = []
    for most, calls in ((1, (1, 1, 1, 1)), (3, (3, 1))):
        state = start()
        if streamed:
            steps = steps_on_batches(train_step, batch_sharding(mesh), most)
        else:
            steps = steps_on_device(train_step, draw_from(CONFIG, mesh), most)
        step = jax.jit(steps, donate_argnums=0)
        losses: list[float] = []
        for n in calls:
            given = batches[len(losses) : len(losses) + n]
            state, sums = step(state, given + given[-1:] * (most - n) if streamed else data, n)
            assert sums["loss"].shape == (most,) and not sums["count"][n:].any()
            losses.extend(np.asarray(sums["loss"][:n]))
        results.append((jax.device_get(state), np.asarray(losses)))
    assert step._cache_size() == 1
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


def test_bfloat16_trains_and_keeps_float32_state():
    config = dataclasses.replace(CONFIG, model=ModelConfig(compute_dtype="bfloat16"))
    state, sums = run(1, steps=30, config=config)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.batch_stats, state.ema))} == {
        np.dtype("float32")
    }
    assert sums["loss"].dtype == np.float32 and sums["loss"] < run(1, steps=1, config=config)[1]["loss"]


def test_masked_examples_do_not_count():
    model = net()
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    step = jax.jit(lambda *given: recipe_eval_step(CONFIG, model)(*given)[0])
    whole = step(variables, BATCH | {"mask": np.ones(16, bool)})
    padded = {name: np.concatenate([values[:5], values[:11]]) for name, values in BATCH.items()}
    part = step(variables, padded | {"mask": np.arange(16) < 5})
    rest = {name: np.concatenate([values[5:], values[:5]]) for name, values in BATCH.items()}
    other = step(variables, rest | {"mask": np.arange(16) < 11})
    chex.assert_trees_all_close(jax.tree.map(lambda a, b: a + b, part, other), whole, rtol=1e-5, atol=1e-5)
    assert part["count"] == 5 and whole["count"] == 16


def test_evaluation_with_flips_does_not_tell_left_from_right():
    model = net()
    state = new_state(model, optax.sgd(0.1))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    config = dataclasses.replace(CONFIG, augment=dataclasses.replace(CONFIG.augment, eval_flip=True))
    mirrored = BATCH | {"image": BATCH["image"][:, :, ::-1]}
    steps = {False: jax.jit(recipe_eval_step(CONFIG, model)), True: jax.jit(recipe_eval_step(config, model))}
    sums = {
        (flips, which): step(variables, batch | {"mask": np.ones(16, bool)})[0]["loss"]
        for flips, step in steps.items()
        for which, batch in (("as it is", BATCH), ("mirrored", mirrored))
    }
    assert abs(sums[True, "as it is"] - sums[True, "mirrored"]) < 1e-4
    assert abs(sums[False, "as it is"] - sums[False, "mirrored"]) > 1e-2


def test_warm_up_and_boundaries_of_he_et_al():
    schedule = make_schedule(load_config("cifar10_resnet110"), 64_000, 50_000 / 128)
    rates = [float(schedule(step)) for step in (0, 389, 392, 31_999, 32_001, 47_999, 48_001, 63_999)]
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-5)


class OwnNet(nn.Module):
    """A user's module: no batch statistics, dropout when training."""

    @nn.compact
    def __call__(self, images, train):
        x = nn.relu(nn.Dense(32)(images.reshape(images.shape[0], -1)))
        return nn.Dense(3)(nn.Dropout(0.1, deterministic=not train)(x))


def squared_error(logits, batch):
    return jnp.square(logits - jax.nn.one_hot(batch["label"], 3)).sum(-1)


def test_a_module_and_a_loss_of_ones_own_train_on_one_device_and_on_eight():
    """The public face, without a recipe: jitted on a batch that is split over devices, or the same on each of them."""
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 3
    batch = {"image": rng.normal(size=(64, 4, 4, 1)).astype(np.float32) + labels[:, None, None, None], "label": labels}
    mesh, tx = make_mesh(8), optax.adam(1e-2)
    losses = {}
    for name, options in (("one", {}), ("eight", {}), ("each", {"mesh": mesh})):
        model = OwnNet()
        state = resnet_jax.create_state(model, tx, jax.random.key(0), image_shape=(4, 4, 1))
        step = jax.jit(resnet_jax.make_train_step(model, tx, loss=squared_error, **options), donate_argnums=0)
        given = batch if name == "one" else shard_batch(batch, mesh)
        losses[name] = []
        for _ in range(40):
            state, sums = step(state, given)
            losses[name].append(float(sums["loss"]) / float(sums["count"]))
        evaluate = jax.jit(resnet_jax.make_eval_step(model, loss=squared_error))
        found, logits = evaluate({"params": state.params}, batch | {"mask": np.ones(64, bool)})
        assert found["accuracy"] == (np.asarray(logits).argmax(-1) == labels).sum() > 60
    assert losses["one"][-1] < 0.2 * losses["one"][0]
    np.testing.assert_allclose(losses["one"], losses["eight"], rtol=1e-4)
    assert losses["each"][0] == pytest.approx(losses["one"][0], rel=0.2)  # other units are dropped


class Normed(nn.Module):
    """Batch norm whose statistics are of all devices where an axis is given."""

    axis_name: str | None = None
    outputs: int = 3

    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(8, (3, 3))(images)
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name if train else None)(x)
        return nn.Dense(self.outputs)(nn.relu(x).mean((1, 2)))


PIXELS = {
    "image": np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8),
    "label": np.arange(16) % 3,
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.2, 0.3)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_small_integers_are_labels_of_many_classes_too(dtype):
    model, tx = Normed(outputs=300), optax.sgd(0.1)
    state = resnet_jax.create_state(model, tx, jax.random.key(0), image_shape=(8, 8, 3))
    small = PIXELS | {"label": PIXELS["label"].astype(dtype)}
    (after, sums), (expected, its_sums) = (resnet_jax.make_train_step(model, tx)(state, b) for b in (small, PIXELS))
    jax.tree.map(np.testing.assert_array_equal, (after.params, sums), (expected.params, its_sums))
    evaluate = resnet_jax.make_eval_step(model)
    jax.tree.map(np.testing.assert_array_equal, *(evaluate(state.variables, b)[0] for b in (small, PIXELS)))


def test_labels_that_would_be_spread_over_the_logits_are_refused():
    model, tx = Normed(), optax.sgd(0.1)
    state = resnet_jax.create_state(model, tx, jax.random.key(0), image_shape=(8, 8, 3))
    column = PIXELS | {"label": PIXELS["label"][:, None]}
    with pytest.raises(InputError, match=r"\[16, 1\] for logits \[16, 3\].*take label\[:, 0\]"):
        resnet_jax.make_train_step(model, tx)(state, column)
    with pytest.raises(InputError, match=r"\[1\] for logits \[16, 3\]; expected"):
        resnet_jax.make_eval_step(model)(state.variables, PIXELS | {"label": PIXELS["label"][:1]})


def test_one_logit_has_an_accuracy_where_the_label_says_what_is_meant():
    def loss(logits, batch):
        return optax.sigmoid_binary_cross_entropy(logits[:, 0], batch["label"].reshape(-1))

    model, tx = Normed(outputs=1), optax.sgd(0.1)
    state = resnet_jax.create_state(model, tx, jax.random.key(0), image_shape=(8, 8, 3))
    step, evaluate = resnet_jax.make_train_step(model, tx, loss=loss), resnet_jax.make_eval_step(model, loss=loss)
    flat = PIXELS | {"label": PIXELS["label"] % 2}
    assert "accuracy" not in step(state, flat)[1] | evaluate(state.variables, flat)[0]
    column = flat | {"label": flat["label"][:, None]}
    sums, logits = evaluate(state.variables, column)
    assert sums["accuracy"] == ((logits > 0) == column["label"]).sum() != 8 and "accuracy" in step(state, column)[1]


@pytest.mark.parametrize("name", ["loss", "count", "skipped"])
def test_a_metric_does_not_take_the_place_of_a_sum_of_ours(name):
    model, tx = Normed(), optax.sgd(0.1)
    state = resnet_jax.create_state(model, tx, jax.random.key(0), image_shape=(8, 8, 3))
    metrics = {name: lambda logits, batch: logits[:, 0]}
    with pytest.raises(InputError, match=f"{name} is a name of ours"):
        resnet_jax.make_train_step(model, tx, metrics=metrics)(state, PIXELS)
    with pytest.raises(InputError, match=f"{name} is a name of ours"):
        resnet_jax.make_eval_step(model, metrics=metrics)(state.variables, PIXELS)


def after_three_steps(step, state, batch):
    for _ in range(3):
        state, sums = step(state, batch)
    return state, sums


def test_the_step_is_the_same_under_jit_shard_map_pmap_and_in_a_program_of_ones_own():
    tx, mesh = optax.sgd(0.1, momentum=0.9), resnet_jax.make_mesh(8)
    state = resnet_jax.create_state(Normed(), tx, jax.random.key(0), image_shape=(8, 8, 3))
    options = {"mean": MEAN, "std": STD}
    alone = resnet_jax.make_train_step(Normed(), tx, **options)
    mapped = resnet_jax.make_train_step(Normed("data"), tx, axis_name="data", **options)
    split = resnet_jax.shard_batch(PIXELS, mesh)
    whole, by_device = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
    own_map = partial(jax.shard_map, mapped, mesh=mesh, in_specs=(whole, by_device), out_specs=whole)
    own_pmap = jax.pmap(mapped, axis_name="data", in_axes=(None, 0), out_axes=None)

    @jax.jit
    def program(state, batch):
        state, sums = alone(state, batch)
        return state, {"half": sums["loss"] / 2} | sums

    expected, sums = after_three_steps(jax.jit(alone), state, PIXELS)
    ways = {
        "jit over devices": after_three_steps(jax.jit(alone), state, split),
        "with a mesh": after_three_steps(
            jax.jit(resnet_jax.make_train_step(Normed("data"), tx, mesh=mesh, **options)), state, split
        ),
        "shard_map": after_three_steps(jax.jit(own_map()), state, split),
        "shard_map without its check": after_three_steps(jax.jit(own_map(check_vma=False)), state, split),
        "pmap": after_three_steps(own_pmap, state, {k: v.reshape(8, 2, *v.shape[1:]) for k, v in PIXELS.items()}),
        "in a program": after_three_steps(program, state, PIXELS),
    }
    for name, (found, its_sums) in ways.items():
        close = partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6, err_msg=name)
        jax.tree.map(close, found, expected)
        assert its_sums["count"] == 16
        assert float(its_sums["loss"]) == pytest.approx(float(sums["loss"]), rel=1e-4)


def test_a_population_of_states_trains_under_vmap():
    tx = optax.sgd(0.1)
    keys = jax.random.split(jax.random.key(0), 3)
    model = resnet_jax.create_model("cifar_resnet8", num_classes=3)
    new = partial(resnet_jax.create_state, model, tx, image_shape=(8, 8, 3))
    population = jax.vmap(new)(keys)
    step = resnet_jax.make_train_step(model, tx, mean=MEAN, std=STD)
    population, sums = after_three_steps(jax.jit(jax.vmap(step, in_axes=(0, None))), population, PIXELS)
    for i in range(3):
        alone, its_sums = after_three_steps(jax.jit(step), new(keys[i]), PIXELS)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=2e-3, atol=2e-5), population, alone)
        assert float(sums["loss"][i]) == pytest.approx(float(its_sums["loss"]), rel=1e-3)


@pytest.mark.parametrize(
    ("images", "options"),
    [
        (PIXELS["image"], {}),
        (PIXELS["image"], {"mean": MEAN, "std": STD}),
        ((PIXELS["image"] / 255).astype(np.float32), {"mean": MEAN, "std": STD}),
        ((PIXELS["image"] / 255).astype(np.float32), {}),
    ],
)
def test_images_are_normalised_as_told_and_not_otherwise(images, options):
    """The loss of a linear model on the mean pixel tells what it was given."""

    class Mean(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            return nn.Dense(3)(images.mean((1, 2)))

    pixels = PIXELS["image"] / 255
    expected = (pixels - MEAN) / STD if options else pixels
    state = resnet_jax.create_state(Mean(), optax.sgd(0.1), jax.random.key(0), image_shape=(8, 8, 3))
    logits = Mean().apply(state.variables, expected.astype(np.float32), train=False)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, PIXELS["label"])
    batch = PIXELS | {"image": images}
    _, sums = resnet_jax.make_train_step(Mean(), optax.sgd(0.1), **options)(state, batch)
    found, _ = resnet_jax.make_eval_step(Mean(), **options)(state.variables, batch)
    for name, value in (("train", sums), ("evaluation", found)):
        assert resnet_jax.means(value)["loss"] == pytest.approx(float(loss.mean()), rel=1e-5), name


def test_a_model_sows_losses_that_are_added_and_its_other_collections_go_on():
    class Sparse(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            seen = self.variable("seen", "steps", lambda: jnp.zeros((), jnp.int32))
            if train:
                seen.value += 1
            x = nn.Dense(4)(images.mean((1, 2)))
            self.sow("losses", "size", jnp.square(x).sum(-1))
            return nn.Dense(3)(x)

    state = resnet_jax.create_state(Sparse(), optax.sgd(0.1), jax.random.key(0), image_shape=(8, 8, 3))
    assert set(state.variables) == {"params", "batch_stats", "seen"}
    logits, sown = Sparse().apply(state.variables, PIXELS["image"] / np.float32(255), train=False, mutable=["losses"])
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, PIXELS["label"])
    after, sums = resnet_jax.make_train_step(Sparse(), optax.sgd(0.1))(state, PIXELS)
    assert float(sums["loss"]) == pytest.approx(float((plain + sown["losses"]["size"][0]).sum()), rel=1e-5)
    assert after.collections["seen"]["steps"] == 1
