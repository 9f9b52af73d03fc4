"""The relatives computed in part a second time in the backward pass: the same numbers from less memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.lab.relatives import kept_bytes
from resnet_jax.models.densenet import DenseNet
from resnet_jax.models.googlenet import GoogLeNet
from resnet_jax.models.vit import ViT

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 16, 3)), jnp.float32)
SMALL = {
    "densenet": DenseNet((4, 3), growth=8, stem="3x3", num_classes=5, act="silu"),
    "googlenet": GoogLeNet((((8, 8, 8, 4, 4, 4),) * 2, ((8, 8, 8, 4, 4, 4),)), "3x3", num_classes=5, act="silu"),
    "vit": ViT(4, 16, 4, 2, 32, image_size=16, num_classes=5),
}


@pytest.mark.parametrize("name", SMALL)
def test_parts_that_are_computed_twice_keep_less_and_give_the_same(name):
    def gradient(model):
        def loss(params):
            given = variables | {"params": params}
            rngs = {"dropout": jax.random.key(1)}
            logits, moved = model.apply(given, IMAGES, train=True, mutable=["batch_stats"], rngs=rngs)
            return jnp.square(logits).mean(), moved

        # Without XLA's optimisation, as in other tests, these are off by 1 % on some processors, remat or not.
        options = {"xla_backend_optimization_level": 3} if name == "googlenet" else {}
        return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=options)(variables["params"])

    model = SMALL[name]
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    expected, kept = gradient(model), kept_bytes(model, variables, IMAGES)
    for remat in ("block", "stage"):
        twice = model.clone(remat=remat)
        chex.assert_trees_all_close(gradient(twice), expected, rtol=1e-4, atol=1e-6)
        assert kept_bytes(twice, variables, IMAGES) < 0.6 * kept, remat
    with pytest.raises(ValueError, match="remat 'all' is unknown"):
        model.clone(remat="all").init(jax.random.key(0), IMAGES)


def test_memory_of_a_densenet_grows_with_its_layers_and_not_with_their_square():
    def kept(layers, remat):
        model = DenseNet((layers,), growth=8, stem="3x3", num_classes=5, remat=remat)
        shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
        return kept_bytes(model, jax.tree.map(lambda x: jnp.zeros(x.shape), shapes), IMAGES)

    def bend(remat):
        return kept(9, remat) - 2 * kept(6, remat) + kept(3, remat)

    assert bend("block") == 0 and bend("none") > 0
