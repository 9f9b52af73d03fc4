"""The forward pass for use beside the module's own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax import InputError
from resnet_jax.predict import export_program


@pytest.mark.parametrize(("count", "constant"), [(1, 2**20), (1, 0), (64, 2**20), (130, 2**20), (256, 0)])
def test_forward_in_parts_has_the_logits_of_the_module(count, constant, monkeypatch):
    monkeypatch.setattr("resnet_jax.predict.predictor.CONSTANT", constant)
    model = rj.create_model("cifar_resnet20", stage_sizes=(1, 1, 1))
    images = jax.random.normal(jax.random.key(1), (count, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    logits = rj.make_forward(model, variables)(images)
    chex.assert_shape(logits, (count, 10))
    chex.assert_trees_all_close(logits, jax.jit(model.apply)(variables, images), atol=1e-5)


def test_a_norm_that_cannot_be_folded_stays():
    model = rj.create_model("cifar_resnet20", stage_sizes=(1, 1, 1), norm="group", widths=(32, 32, 32), stem_width=32)
    images = jnp.ones((2, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    chex.assert_trees_all_close(
        rj.make_forward(model, variables)(images), jax.jit(model.apply)(variables, images), atol=1e-5
    )


def test_a_network_that_asks_for_the_number_of_images_is_no_program_and_is_told_why(tmp_path):
    def served(pixels):
        return pixels.reshape(len(pixels), -1)

    with pytest.raises(InputError, match=r"takes that number as x.shape\[0\] or -1, not as len\(x\)"):
        export_program.write_stablehlo(served, (8, 8, 3), np.uint8, {}, tmp_path / "net.stablehlo")
