import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import create_model, fold_batch_norm

IMAGES = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)


@pytest.mark.parametrize(
    "name",
    ["cifar_resnet20", "resnet50d", "resnetv2_50", "cifar_wrn_28_10", "resnext50_32x4d", "resnetrs50", "resnetblur18"],
)
def test_folded_networks_have_the_same_logits(name):
    small = {"stage_sizes": (1, 1), "widths": (16, 32), "num_classes": 7}
    model = create_model(name, **small)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    rng = np.random.default_rng(1)

    def trained(path, leaf):
        if path[-1].key in ("var", "scale"):
            return rng.uniform(0.5, 2.0, leaf.shape).astype(np.float32)
        return leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(trained, variables)
    folded, folded_variables = fold_batch_norm(model, variables)
    assert "batch_stats" not in folded_variables
    expected = jax.jit(model.apply)(variables, IMAGES)
    actual = jax.jit(folded.apply)(folded_variables, IMAGES)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
    norms = str(jax.tree.structure(folded_variables)).count("'scale'")
    assert norms == (3 if model.preact else 0)  # the first norm of each block, and the last of all


def test_norms_behind_self_attention_stay_as_factors():
    model = create_model("cifar_botnet20", stage_sizes=(1, 1), widths=(16, 32), num_classes=7)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    folded, folded_variables = fold_batch_norm(model, variables)
    assert str(jax.tree.structure(folded_variables)).count("'scale'") == 1
    expected = model.apply(variables, IMAGES)
    np.testing.assert_allclose(folded.apply(folded_variables, IMAGES), expected, atol=1e-5 * np.abs(expected).max())


def test_other_norms_are_refused():
    model = create_model("cifar_resnet20", norm="group")
    with pytest.raises(ValueError, match="16 channels do not divide into the 32 groups"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="only batch"):
        fold_batch_norm(model, {})


@pytest.mark.parametrize("model", [create_model("densenet121"), create_model("resnet18", standardized=True)])
def test_what_cannot_be_folded_is_refused(model):
    with pytest.raises(ValueError, match="only a ResNet"):
        fold_batch_norm(model, {})
