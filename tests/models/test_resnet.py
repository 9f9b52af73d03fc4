from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import create_model
from resnet_jax.models.blocks import BOTTLENECK, PreactBlock, ResidualBlock, Shortcut
from resnet_jax.models.layers import DropPath
from resnet_jax.models.resnet import ResNet

IMAGES = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)


def tiny(**fields):
    row = {"stage_sizes": (2, 2), "block": "basic", "widths": (8, 16), "stem": "3x3", "stem_width": 8}
    return ResNet(**(row | {"stem_pool": "none", "num_classes": 5} | fields))


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet50t", "resnext50_32x4d", "seresnet50", "resnetaa34d", "resnetrs50", "resnetv2_50x1_bit",
     "cifar_resnet56", "cifar_plain20", "cifar_resnetv2_164", "cifar_wrn_28_10", "cifar_resnet18"],
)  # fmt: skip
def test_endpoint_shapes(name):
    model = create_model(name, num_classes=7)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    logits, stages = jax.eval_shape(lambda v, x: model.apply(v, x, endpoints=True), variables, images)
    expansion = 4 if model.block == "bottleneck" else 1
    size = 64 if model.stem == "3x3" else 32
    expected = {"stem": (2, size, size, model.stem_width)}
    size //= 1 if model.stem_pool == "none" else 2
    for stage, width in enumerate(model.widths):
        expected[f"stage{stage + 1}"] = (2, size >> stage, size >> stage, width * expansion)
    expected["features"] = (2, model.widths[-1] * expansion)
    assert {name: stage.shape for name, stage in stages.items()} == expected
    chex.assert_shape(logits, (2, 7))
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("shortcut", ["A", "B", "D"])
def test_zeroed_branches_leave_the_identity(block, shortcut):
    """With every branch at zero a stage of identity blocks returns its input exactly: the idea of the whole thing."""
    model = tiny(block=block, preact=True, shortcut=shortcut, stage_sizes=(4, 4))
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    kernels = {"basic": ("conv2",), "bottleneck": ("conv3",)}[block]
    for stage in ("stage1", "stage2"):
        for branch in variables["params"][stage].values():
            assert not any(np.any(branch[k]["kernel"]) for k in kernels)
    block_only = PreactBlock(8, kernels=(3, 3) if block == "basic" else BOTTLENECK)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 8)), jnp.float32)
    y, _ = block_only.init_with_output(jax.random.key(0), x, True)
    np.testing.assert_array_equal(y, x)
    post = ResidualBlock(8, kernels=(3, 3) if block == "basic" else BOTTLENECK)
    y, _ = post.init_with_output(jax.random.key(0), jnp.abs(x), True)
    np.testing.assert_array_equal(y, jnp.abs(x))


def test_zeroed_stages_of_identity_blocks_pass_the_stem_through():
    model = tiny(preact=True, stage_sizes=(5,), widths=(8,))
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    _, stages = jax.jit(partial(model.apply, endpoints=True))(variables, IMAGES)
    np.testing.assert_array_equal(stages["stage1"], stages["stem"])


def test_shortcut_a_subsamples_and_pads_channels_without_parameters():
    x = jnp.asarray(IMAGES)
    y, variables = Shortcut(7, 2, "A").init_with_output(jax.random.key(0), x)
    assert not variables
    np.testing.assert_array_equal(y[..., 2:5], x[:, ::2, ::2])
    assert not np.any(y[..., :2]) and not np.any(y[..., 5:])


def test_plain_blocks_have_no_shortcut_and_start_alive():
    model = tiny(shortcut="none")
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    assert "shortcut" not in variables["params"]["stage2"]["block1"]
    assert np.all(variables["params"]["stage2"]["block1"]["norm2"]["scale"] == 1)
    plain, residual = create_model("cifar_plain20"), create_model("cifar_resnet20")
    shapes = [jax.eval_shape(m.init, jax.random.key(0), IMAGES)["params"] for m in (plain, residual)]
    chex.assert_trees_all_equal_shapes(*shapes)


def test_jit_and_no_jit_agree():
    model = tiny()
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)

    def run(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    with jax.disable_jit():
        expected = run(variables, IMAGES)
    chex.assert_trees_all_close(jax.jit(run)(variables, IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_train_moves_running_statistics_and_evaluation_uses_them():
    model = tiny()
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    _, moved = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(variables, IMAGES)
    before, after = variables["batch_stats"]["stem"]["norm"], moved["batch_stats"]["stem"]["norm"]
    assert np.abs(after["mean"] - before["mean"]).max() > 1e-3
    apply = jax.jit(model.apply)
    first = apply(variables | moved, IMAGES)
    np.testing.assert_allclose(first[:1], apply(variables | moved, IMAGES[:1]), rtol=1e-4, atol=1e-5)


def test_a_norm_can_be_frozen_while_the_rest_trains():
    model = tiny(norm="frozen_batch")
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)

    def loss(params):
        logits, moved = model.apply(
            {"params": params, "batch_stats": variables["batch_stats"]}, IMAGES, train=True, mutable=["batch_stats"]
        )
        return jnp.square(logits).sum(), moved

    grads, moved = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    chex.assert_trees_all_equal(moved["batch_stats"], variables["batch_stats"])
    assert not np.any(grads["stem"]["norm"]["scale"]) and not np.any(grads["stem"]["norm"]["bias"])
    assert np.any(grads["stem"]["conv"]["kernel"]) and np.any(grads["head"]["kernel"])


def test_features_without_a_head():
    model = tiny(num_classes=None)
    features, variables = model.init_with_output(jax.random.key(0), IMAGES)
    chex.assert_shape(features, (2, 16))
    assert "head" not in variables["params"]


def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32():
    model = tiny(dtype=jnp.bfloat16)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    (logits, stages), moved = model.apply(variables, IMAGES, train=True, endpoints=True, mutable=["batch_stats"])
    assert stages["stage1"].dtype == jnp.bfloat16 and stages["features"].dtype == jnp.float32
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype("float32")}
    exact = jax.jit(tiny().apply)(variables, IMAGES)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, IMAGES), exact, atol=0.05 * np.abs(exact).max())


@pytest.mark.parametrize("block", [ResidualBlock, PreactBlock])
def test_kernels_that_no_block_has_are_refused(block):
    with pytest.raises(ValueError, match=r"kernels \(3, 3, 3\) are unknown; choose one of"):
        block(8, kernels=(3, 3, 3)).init(jax.random.key(0), IMAGES)


@pytest.mark.parametrize("field", [{"shortcut": "E"}, {"stem": "9x9"}, {"norm": "layer"}])
def test_unknown_values_are_refused_with_the_choices(field):
    with pytest.raises(ValueError, match="choose one of"):
        tiny(**field).init(jax.random.key(0), IMAGES)


def test_drop_path_leaves_out_whole_images_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 2, 3))
    y = DropPath(0.25).apply({}, x, True, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert (y.min((1, 2, 3)) == y.max((1, 2, 3))).all()
    assert abs(y.mean() - 1) < 0.03
    np.testing.assert_array_equal(DropPath(0.25).apply({}, x, False), x)


def test_dropout_and_drop_path_act_in_training_only():
    model = tiny(drop_rate=0.5, drop_path_rate=0.5, zero_init_last=False)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)

    @jax.jit
    def logits(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, IMAGES, train=True, mutable=["batch_stats"], rngs=rngs)[0]

    np.testing.assert_array_equal(logits(1), logits(1))
    assert np.abs(logits(1) - logits(2)).max() > 1e-3
    plain = tiny(zero_init_last=False)
    np.testing.assert_array_equal(model.apply(variables, IMAGES), plain.apply(variables, IMAGES))


def test_a_map_comes_out_without_global_pool():
    model = tiny(global_pool="none", num_classes=None)
    assert model.init_with_output(jax.random.key(0), IMAGES)[0].shape == (2, 16, 16, 16)
    with pytest.raises(ValueError, match="num_classes=None"):
        tiny(global_pool="none").init(jax.random.key(0), IMAGES)


def test_images_with_other_channels_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="in_channels=4"):
        tiny().init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)))


@pytest.mark.parametrize(
    "field",
    [{"act": "tanh"}, {"output_stride": 4}, {"preact": True, "anti_alias": "blur"}, {"attention": "cbam"},
     {"anti_alias": "median"}, {"stem_pool": "min"}, {"global_pool": "median"}],
)  # fmt: skip
def test_impossible_knobs_are_refused(field):
    with pytest.raises(ValueError, match=next(reversed(field))):
        tiny(**field).init(jax.random.key(0), IMAGES)
