"""Convolution: its definition, the custom kernels of each platform, and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models.registry import create_model
from resnet_jax.ops import gpu, sharded_batch, use_custom_kernels, winograd
from resnet_jax.ops.convolution import conv2d, plain_conv2d
from resnet_jax.ops.materialize import materialize, materialized_relu
from resnet_jax.ops.pooling import max_pool
from resnet_jax.training.sharding import batch_sharding, make_mesh, replicated

X = np.random.default_rng(0).normal(1.0, 2.0, size=(4, 9, 9, 32)).astype(np.float32)


def direct_convolution(x, kernel, strides, dilation):
    """The definition, in float64: every output pixel is one sum over the taps."""
    size = kernel.shape[0]
    pad = dilation * (size - 1) // 2
    padded = np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = (-(-side // strides) for side in x.shape[1:3])
    y = np.zeros((x.shape[0], height, width, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            for a in range(size):
                for b in range(size):
                    pixel = padded[:, i * strides + a * dilation, j * strides + b * dilation]
                    y[:, i, j] += pixel @ kernel[a, b].astype(np.float64)
    return y


@pytest.mark.parametrize(("size", "strides", "dilation"), [(1, 1, 1), (3, 1, 1), (3, 2, 1), (7, 2, 1), (3, 1, 2)])
def test_convolution_is_padded_on_both_sides(size, strides, dilation):
    kernel = np.random.default_rng(1).normal(size=(size, size, 32, 5)).astype(np.float32)
    expected = direct_convolution(X, kernel, strides, dilation)
    actual = conv2d(jnp.asarray(X), jnp.asarray(kernel), strides, dilation)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)


LAYERS = [
    (1, 1, 4, 1),
    (1, 2, 4, 1),
    (3, 1, 40, 1),
    (3, 2, 41, 1),
    (3, 1, 4, 2),
    (3, 2, 4, 2),
    (3, 1, 4, 4),
    (1, 2, 4, 16),
]
"""Size of the kernel, strides, batch, groups: each takes another way on a CPU."""


@pytest.mark.parametrize("layer", LAYERS)
def test_derivatives_are_those_of_the_plain_convolution(layer):
    """The CPU's ways to compute them, against XLA's: gradients, forward mode, and second derivatives of both kinds."""
    size, strides, batch, groups = layer
    side = 16 if groups > 1 else 32
    x = jax.random.normal(jax.random.key(0), (batch, side, side, 32 if groups == 2 else 16))
    kernel = jax.random.normal(jax.random.key(1), (size, size, x.shape[-1] // groups, 32 if groups > 1 else 8))
    pad = (size - 1) // 2

    def own(x, kernel):
        return conv2d(x, kernel, strides, groups=groups)

    def plain(x, kernel):
        padding, order = ((pad, pad),) * 2, ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (strides,) * 2, padding, dimension_numbers=order, feature_group_count=groups
        )

    same_derivatives(own, plain, x, kernel)


@pytest.mark.parametrize(("batch", "wide", "out"), [(4, 12, 20), (4, 20, 12), (3, 20, 12)])
def test_derivatives_of_a_1x1_are_those_of_a_product(batch, wide, out):
    x = jax.random.normal(jax.random.key(0), (batch, 17 if batch == 3 else 12, 17, wide))
    kernel = jax.random.normal(jax.random.key(1), (1, 1, wide, out))
    same_derivatives(conv2d, lambda x, k: jnp.einsum("bhwi,io->bhwo", x, k[0, 0]), x, kernel)


def same_derivatives(own, plain, x, kernel):
    """Gradients, forward mode, and second derivatives of both kinds are equal."""

    def derivatives(convolve):
        def loss(x, kernel):
            return jnp.square(convolve(x, kernel)).mean()

        gradient = jax.grad(loss, (0, 1))
        tangent = jax.jvp(loss, (x, kernel), (x, kernel))[1]
        forward_over_reverse = jax.jvp(gradient, (x, kernel), (x, kernel))[1]
        reverse_over_reverse = jax.grad(lambda k: jnp.square(gradient(x, k)[1]).sum())(kernel)
        return gradient(x, kernel), tangent, forward_over_reverse, reverse_over_reverse

    actual = jax.jit(lambda: derivatives(own))()
    expected = jax.jit(lambda: derivatives(plain))()
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("shape", "out", "count", "least"),
    [((4, 8, 8, 16), 20, 1, 17), ((4, 8, 8, 20), 16, 1, 16), ((4, 7, 9, 24), 16, 2, 16)],
)
def test_winograd_is_the_same_function_with_the_same_derivatives(shape, out, count, least, monkeypatch):
    """Of smaller images than it pays for."""
    small = {"MIN_CHANNELS": 16, "MIN_CHANNELS_OF_GRADIENT": least, "MIN_IMAGE": 1, "MIN_WORK": 1, "MAX_PART": 6000}
    for name, value in small.items():
        monkeypatch.setattr(winograd, name, value)
    x = jax.random.normal(jax.random.key(0), shape)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, shape[3], out))
    assert winograd.count_parts(x, kernel) == count
    program = jax.jit(jax.grad(lambda x, k: jnp.square(conv2d(x, k)).sum(), (0, 1))).lower(x, kernel).as_text()
    assert program.count("stablehlo.convolution") == (least > 16), "that of the weight gradient"

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    expected = direct_convolution(np.asarray(x), np.asarray(kernel), 1, 1)
    for function in (winograd.conv2d, winograd.scattered_conv2d, winograd.unsplit_conv2d, conv2d):
        np.testing.assert_allclose(jax.jit(function)(x, kernel), expected, atol=2e-6 * np.abs(expected).max())
    same_derivatives(conv2d, plain, x, kernel)


def test_a_whole_network_by_the_custom_kernels_of_a_cpu():
    """Wide convolutions go through Winograd's algorithm."""
    model = create_model("cifar_resnet18", stage_sizes=(1, 1, 1, 1), zero_init_last=False, act="silu")  # no kinks
    images = jax.random.normal(jax.random.key(0), (16, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)

    def logits_and_gradient():
        def loss(params):
            logits = model.apply(variables | {"params": params}, images)
            return jnp.square(logits).mean(), logits

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    own = logits_and_gradient()
    with use_custom_kernels(False):
        expected = logits_and_gradient()
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("shape", "kernel", "dtype"),
    [
        ((2, 14, 14, 256), (1, 1, 256, 256), "float32"),
        ((2, 14, 14, 256), (3, 3, 256, 32), "float32"),
        ((1, 7, 7, 512), (3, 3, 512, 512), "float32"),
        ((0, 14, 14, 256), (3, 3, 256, 256), "float32"),
        ((128, 7, 7, 64), (3, 3, 64, 64), "float32"),
        ((16, 56, 56, 32), (3, 3, 32, 32), "float32"),
        ((8, 14, 14, 256), (3, 3, 256, 256), "bfloat16"),
    ],
)
def test_winograd_is_left_where_it_does_not_pay(shape, kernel, dtype):
    assert winograd.count_parts(jnp.zeros(shape, dtype), jnp.zeros(kernel, dtype)) == 0


@pytest.mark.parametrize(
    ("shape", "channels", "gradient"),
    [
        ((128, 16, 16, 64), 64, False),
        ((16, 56, 56, 64), 64, False),
        ((1, 56, 56, 64), 64, False),
        ((2, 28, 28, 128), 128, True),
        ((16, 7, 7, 512), 512, True),
    ],
)
def test_winograd_is_taken_where_it_pays(shape, channels, gradient):
    """For the weight gradient from more channels on."""
    x, kernel = jnp.zeros(shape), jnp.zeros((3, 3, shape[3], channels))
    assert winograd.count_parts(x, kernel) > 0
    assert "stablehlo.convolution" not in jax.jit(conv2d).lower(x, kernel).as_text()
    program = jax.jit(jax.grad(lambda k: jnp.square(conv2d(x, k)).sum())).lower(kernel).as_text()
    assert program.count("stablehlo.convolution") == (not gradient)


@pytest.mark.parametrize(("side", "strides", "dilation", "groups"), [(15, 2, 1, 2), (15, 2, 1, 8), (16, 2, 2, 4)])
def test_gradients_with_groups_at_odd_sizes_and_dilated(side, strides, dilation, groups):
    x = jax.random.normal(jax.random.key(0), (4, side, side, 32))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 32 // groups, 16))

    def gradient(convolve):
        return jax.jit(jax.grad(lambda x, k: jnp.square(convolve(x, k)).mean(), (0, 1)))(x, kernel)

    own = gradient(lambda x, k: conv2d(x, k, strides, dilation, groups))
    with use_custom_kernels(False):
        expected = gradient(lambda x, k: conv2d(x, k, strides, dilation, groups))
    for a, b in zip(own, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_one_program_serves_all_platforms():
    kernel = jnp.ones((1, 1, 32, 8))
    exported = jax.export.export(jax.jit(lambda x: conv2d(x, kernel)), platforms=["cpu", "cuda", "tpu"])(X)
    text = exported.mlir_module()
    assert "stablehlo.dot_general" in text and "stablehlo.convolution" in text
    np.testing.assert_allclose(exported.call(X), X.sum(-1, keepdims=True).repeat(8, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "side"), [(1, 32), (3, 30), (4, 8)])
def test_the_space_to_depth_convolution_is_the_same(channels, side):
    x = jax.random.normal(jax.random.key(0), (2, side, side, channels))
    kernel = jax.random.normal(jax.random.key(1), (7, 7, channels, 5))

    def value_and_gradients(convolve):
        return jax.value_and_grad(lambda x, k: jnp.sin(convolve(x, k)).mean(), (0, 1))(x, kernel)

    with use_custom_kernels(False):
        expected = value_and_gradients(lambda x, k: conv2d(x, k, 2))
    actual = value_and_gradients(gpu.space_to_depth_conv2d)
    for a, b in zip(*(jax.tree.leaves(v) for v in (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


def test_a_gpu_and_a_tpu_get_programs_of_their_own():
    """What a GPU computes is compared with a CPU on a GPU alone; here it is looked at."""

    def start(x, kernel):
        return max_pool(materialized_relu(conv2d(x, kernel, 2))).sum()

    traced = jax.jit(jax.grad(start, 1)).trace(jnp.ones((2, 32, 32, 3)), jnp.ones((7, 7, 3, 8)))
    gpu_program, tpu_program = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "tpu"))
    stacked = "tensor<4x4x16x8xf32>"  # twelve channels, and four of zeros
    assert stacked in gpu_program and stacked not in tpu_program
    assert "optimization_barrier" in gpu_program and "select_and_scatter" not in gpu_program
    assert "optimization_barrier" not in tpu_program and "select_and_scatter" in tpu_program


def lowered():
    """The program of a gradient through two equal layers."""

    def network(x, kernel):
        for _ in range(2):
            x = materialize(x + materialized_relu(conv2d(x, kernel)))
        return x.sum()

    return jax.jit(jax.grad(network, (0, 1))).lower(X, jnp.ones((3, 3, 32, 32))).as_text()


def test_equal_layers_are_in_a_program_once():
    """The two convolutions and their four gradients are calls of three functions."""
    assert lowered().count("stablehlo.convolution") == 3


def test_kernels_can_be_turned_off_after_they_were_used():
    assert "optimization_barrier" in lowered()
    with use_custom_kernels(False):
        assert "optimization_barrier" not in lowered()
    assert "optimization_barrier" in lowered()


def test_materialized_relu_is_relu():
    x = jnp.asarray([-1.0, 0.0, 2.0])
    np.testing.assert_array_equal(materialized_relu(x), [0, 0, 2])
    np.testing.assert_array_equal(jax.vmap(jax.grad(materialized_relu))(x), [0, 0, 1])
    np.testing.assert_array_equal(jax.hessian(lambda x: (x * materialized_relu(x)).sum())(x), np.diag([0, 0, 2]))


@pytest.mark.parametrize(("strides", "dilation", "groups"), [(1, 1, 1), (2, 1, 4), (1, 2, 2)])
def test_the_plain_convolution_is_pytorchs(strides, dilation, groups):
    torch = pytest.importorskip("torch")
    kernel = np.random.default_rng(1).normal(size=(3, 3, 32 // groups, 8)).astype(np.float32)
    x, weight = torch.tensor(X.transpose(0, 3, 1, 2)), torch.tensor(kernel.transpose(3, 2, 0, 1))
    expected = torch.nn.functional.conv2d(x, weight, None, strides, dilation, dilation, groups)
    actual = plain_conv2d(X, kernel, strides, dilation, groups)
    np.testing.assert_allclose(actual, expected.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-3)


def test_no_images_travel_where_a_batch_is_said_to_be_sharded():
    """Elsewhere the images of all devices are cut into parts for Winograd's algorithm, which is right, but slow."""
    mesh = make_mesh(8)
    x = jax.device_put(jax.random.normal(jax.random.key(0), (64, 32, 32, 64)), batch_sharding(mesh))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 64, 64))
    program = jax.jit(sharded_batch(mesh.size > 1)(conv2d)).lower(x, kernel).compile().as_text()
    assert not any(word in program for word in ("all-gather", "all-to-all", "collective-permute"))
    assert "convolution" in program


def test_no_sum_over_devices_is_left_in_a_conditional_where_a_batch_is_said_to_be_sharded():
    """Nothing orders it among the others there: devices could wait for each other in different sums."""
    mesh = make_mesh(8)
    x = jax.device_put(jax.random.normal(jax.random.key(0), (16, 8, 8, 16)), batch_sharding(mesh))
    kernel = jax.device_put(jax.random.normal(jax.random.key(1), (3, 3, 16, 16)), replicated(mesh))

    def loss(kernel, x):
        return jnp.square(max_pool(materialized_relu(conv2d(materialize(x), kernel)))).sum()

    gradient = jax.jit(sharded_batch()(jax.grad(loss)), out_shardings=replicated(mesh))
    program = gradient.lower(kernel, x).compile().as_text()
    assert "all-reduce" in program
    assert "conditional(" not in program
    np.testing.assert_allclose(gradient(kernel, x), jax.grad(loss)(kernel, np.asarray(x)), rtol=1e-4, atol=1e-3)


def test_the_setting_for_sharded_batches_ends_with_its_block():
    x, kernel = jnp.zeros((2, 28, 28, 128)), jnp.zeros((3, 3, 128, 128))

    def by_winograd():
        return "stablehlo.convolution" not in jax.jit(lambda x, k: conv2d(x, k)).lower(x, kernel).as_text()

    assert by_winograd()
    with sharded_batch():
        assert not by_winograd()
    with sharded_batch(False):
        assert by_winograd()
    assert by_winograd()
