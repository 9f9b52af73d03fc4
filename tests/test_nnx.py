"""Our modules in a program of Flax NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import resnet_jax as rj


def test_a_training_step_through_the_bridge_is_the_linen_step():
    module = rj.create_model("cifar_resnet20", stage_sizes=(1, 1), widths=(8, 16), stem_width=8, num_classes=3)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 16, 3)), jnp.float32)
    labels = jnp.arange(8) % 3
    model = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(images)
    params, stats = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss_of(model):
            logits = model(images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss

    def linen_loss(params):
        variables = {"params": params, "batch_stats": stats}
        logits, moved = module.apply(variables, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), moved["batch_stats"]

    (expected, moved), grads = jax.jit(jax.value_and_grad(linen_loss, has_aux=True))(params)
    np.testing.assert_allclose(step(model, optimizer), expected, rtol=1e-5)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(lambda p, g, a: np.testing.assert_allclose(a, p - 0.1 * g, atol=1e-5), params, grads, after)
    after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after, moved)
