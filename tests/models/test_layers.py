import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models.layers import BatchNorm, GroupNorm
from resnet_jax.models.pooling import average_pool, max_pool
from resnet_jax.models.registry import create_model
from resnet_jax.ops import convolution, winograd
from resnet_jax.ops.convolution import conv2d, of_quarters, plain_operations, stored, stored_relu
from resnet_jax.training.sharding import compiler_options

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


CASES = [  # forward, along images, along kernel
    ((1, 1, 4, 1), 0),
    ((1, 2, 4, 1), 0),
    ((3, 1, 40, 1), 1 + 1 + 3),
    ((3, 2, 41, 1), 1 + 4 + 3),
    ((3, 1, 4, 2), 1 + 1 + 1),
    ((3, 2, 4, 2), 1 + 4 + 1),
    ((3, 1, 4, 4), 4 * (1 + 1 + 1)),
    ((1, 2, 4, 16), 8 * (1 + 1 + 1)),
]


@pytest.mark.parametrize(("layer", "convolutions"), CASES)
def test_derivatives_are_those_of_the_plain_convolution(layer, convolutions, monkeypatch):
    """The CPU's ways to compute them, against XLA's: gradients, forward mode, and second derivatives of both kinds."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
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

    program = jax.jit(jax.grad(lambda x, k: jnp.square(own(x, k)).sum(), (0, 1))).lower(x, kernel).as_text()
    assert program.count("stablehlo.convolution") == convolutions, "this case takes no way of its own"
    fast = "dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
    assert program.count(fast) == convolutions, "in a loop XLA would compute the others twenty times slower"

    same_derivatives(own, plain, x, kernel)


def test_few_channels_go_in_pairs_where_pixels_are_many(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x = jax.random.normal(jax.random.key(0), (3, 7, 10, 5))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 5, 4))

    def program():
        jax.clear_caches()
        return jax.jit(jax.grad(lambda x: jnp.square(conv2d(x, kernel)).sum())).lower(x).as_text()

    both_ways = ("tensor<3x4x5x8xf32>", "tensor<3x4x4x10xf32>")
    assert not any(shape in program() for shape in both_ways)
    monkeypatch.setattr(convolution, "PIXELS", 3 * 7 * 10)
    assert all(shape in program() for shape in both_ways)
    expected = direct_convolution(np.asarray(x), np.asarray(kernel), 1, 1)
    np.testing.assert_allclose(jax.jit(conv2d)(x, kernel), expected, atol=1e-5 * np.abs(expected).max())
    same_derivatives(conv2d, lambda x, k: convolution._convolve(x, k, 1, 1, 1), x, kernel)


@pytest.mark.parametrize(("batch", "wide", "out", "halves"), [(4, 12, 20, 2), (4, 20, 12, 2), (3, 20, 12, 1)])
def test_the_weight_gradient_of_a_1x1_has_few_rows_and_many_pixels_go_in_halves(batch, wide, out, halves, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x = jax.random.normal(jax.random.key(0), (batch, 17 if halves == 1 else 12, 17, wide))
    kernel = jax.random.normal(jax.random.key(1), (1, 1, wide, out))
    program = jax.jit(jax.grad(lambda k: jnp.square(conv2d(x, k)).sum())).lower(kernel).as_text()
    assert f"-> tensor<{halves}x12x20xf32>" in program and "stablehlo.convolution" not in program
    same_derivatives(conv2d, lambda x, k: jnp.einsum("bhwi,io->bhwo", x, k[0, 0]), x, kernel)


@pytest.mark.parametrize(("wide", "out"), [(12, 20), (20, 12)])
def test_what_the_weight_gradient_of_a_1x1_reads_is_computed_once(wide, out, monkeypatch):
    """Its halves have another shape than the rest, and XLA would compute cheap values anew for each shape."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x = jax.random.normal(jax.random.key(0), (4, 12, 17, wide))
    kernel = jax.random.normal(jax.random.key(1), (1, 1, wide, out))

    def loss(x, kernel):
        y = conv2d(jnp.ceil(x) + x, kernel)
        return (jnp.floor(y) * y).sum()  # the gradient is floor(y)

    program = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).compile(compiler_options()).as_text()
    assert (program.count(" ceil("), program.count(" floor(")) == (1, 1)


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
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for name, value in {"WIDTH": 16, "GRADIENT": least, "IMAGE": 1, "WORK": 1, "PART": 6000}.items():
        monkeypatch.setattr(winograd, name, value)
    x = jax.random.normal(jax.random.key(0), shape)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, shape[3], out))
    assert winograd.parts(x, kernel) == count
    program = jax.jit(jax.grad(lambda x, k: jnp.square(conv2d(x, k)).sum(), (0, 1))).lower(x, kernel).as_text()
    assert program.count("stablehlo.convolution") == (least > 16), "that of the weight gradient"

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    expected = direct_convolution(np.asarray(x), np.asarray(kernel), 1, 1)
    for function in (winograd.convolve, winograd.spread, winograd.along_kernel, conv2d):
        np.testing.assert_allclose(jax.jit(function)(x, kernel), expected, atol=2e-6 * np.abs(expected).max())
    same_derivatives(conv2d, plain, x, kernel)


def test_a_whole_network_by_the_cpus_own_ways(monkeypatch):
    """On one device, where wide convolutions go through Winograd's algorithm; most tests have eight."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    model = create_model("cifar_resnet18", stage_sizes=(1, 1, 1, 1), zero_init_last=False, act="silu")  # no kinks
    images = jax.random.normal(jax.random.key(0), (16, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)

    def logits_and_gradient():
        def loss(params):
            logits = model.apply(variables | {"params": params}, images)
            return jnp.square(logits).mean(), logits

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    own = logits_and_gradient()
    with plain_operations():
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
    assert winograd.parts(jnp.zeros(shape, dtype), jnp.zeros(kernel, dtype)) == 0


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
def test_winograd_is_taken_where_it_pays(shape, channels, gradient, monkeypatch):
    """For the weight gradient from more channels on."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x, kernel = jnp.zeros(shape), jnp.zeros((3, 3, shape[3], channels))
    assert winograd.parts(x, kernel) > 0 and "stablehlo.convolution" not in jax.jit(conv2d).lower(x, kernel).as_text()
    program = jax.jit(jax.grad(lambda k: jnp.square(conv2d(x, k)).sum())).lower(kernel).as_text()
    assert program.count("stablehlo.convolution") == (not gradient)


@pytest.mark.parametrize(("side", "strides", "dilation", "groups"), [(15, 2, 1, 2), (15, 2, 1, 8), (16, 2, 2, 4)])
def test_gradients_with_groups_at_odd_sizes_and_dilated(side, strides, dilation, groups, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x = jax.random.normal(jax.random.key(0), (4, side, side, 32))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 32 // groups, 16))

    def gradient(convolve):
        return jax.jit(jax.grad(lambda x, k: jnp.square(convolve(x, k)).mean(), (0, 1)))(x, kernel)

    own = gradient(lambda x, k: conv2d(x, k, strides, dilation, groups))
    with plain_operations():
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
def test_the_first_convolution_of_quarters_is_the_same(channels, side):
    x = jax.random.normal(jax.random.key(0), (2, side, side, channels))
    kernel = jax.random.normal(jax.random.key(1), (7, 7, channels, 5))

    def value_and_gradients(convolve):
        return jax.value_and_grad(lambda x, k: jnp.sin(convolve(x, k)).mean(), (0, 1))(x, kernel)

    with plain_operations():
        expected = value_and_gradients(lambda x, k: conv2d(x, k, 2))
    for a, b in zip(*(jax.tree.leaves(v) for v in (value_and_gradients(of_quarters), expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


def test_a_gpu_and_a_tpu_get_programs_of_their_own():
    """What a GPU computes is compared with a CPU on a GPU alone; here it is looked at."""

    def start(x, kernel):
        return max_pool(stored_relu(conv2d(x, kernel, 2))).sum()

    traced = jax.jit(jax.grad(start, 1)).trace(jnp.ones((2, 32, 32, 3)), jnp.ones((7, 7, 3, 8)))
    gpu, tpu = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "tpu"))
    quarters = "tensor<4x4x16x8xf32>"  # twelve channels, and four of zeros
    assert quarters in gpu and quarters not in tpu
    assert "optimization_barrier" in gpu and "select_and_scatter" not in gpu
    assert "optimization_barrier" not in tpu and "select_and_scatter" in tpu


def lowered():
    """The program of a gradient through two equal layers."""

    def network(x, kernel):
        for _ in range(2):
            x = stored(x + stored_relu(conv2d(x, kernel)))
        return x.sum()

    return jax.jit(jax.grad(network, (0, 1))).lower(X, jnp.ones((3, 3, 32, 32))).as_text()


def test_equal_layers_are_in_a_program_once():
    """The two convolutions and their four gradients are calls of three functions."""
    assert lowered().count("stablehlo.convolution") == 3


def test_plain_operations_after_the_cpus_own():
    assert "optimization_barrier" in lowered()
    with plain_operations():
        assert "optimization_barrier" not in lowered()
    assert "optimization_barrier" in lowered()


def test_batch_norm_agrees_with_flax():
    ours, theirs = BatchNorm(), nn.BatchNorm(momentum=0.9, epsilon=1e-5)
    variables = ours.init(jax.random.key(0), X)
    expected, their_stats = theirs.apply(variables, X, use_running_average=False, mutable=["batch_stats"])
    actual, our_stats = ours.apply(variables, X, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), our_stats, their_stats)
    variables = variables | our_stats
    expected = theirs.apply(variables, X, use_running_average=True)
    np.testing.assert_allclose(ours.apply(variables, X), expected, rtol=1e-5, atol=1e-5)


def test_unbiased_variance_is_that_of_pytorch():
    norm = BatchNorm(unbiased_variance=True)
    _, moved = norm.apply(norm.init(jax.random.key(0), X), X, train=True, mutable=["batch_stats"])
    expected = 0.9 + 0.1 * X.reshape(-1, 32).var(0, ddof=1)
    np.testing.assert_allclose(moved["batch_stats"]["var"], expected, rtol=1e-5)


def test_group_norm_agrees_with_flax():
    ours = GroupNorm(groups=8)
    variables = ours.init(jax.random.key(0), X)
    expected = nn.GroupNorm(num_groups=8, epsilon=1e-5).apply(variables, X)
    np.testing.assert_allclose(ours.apply(variables, X, True), expected, rtol=1e-4, atol=1e-5)


def test_max_pool_pads_with_minus_infinity_on_both_sides():
    x = -np.abs(X)
    y = np.asarray(max_pool(jnp.asarray(x)))
    assert y.shape == (4, 5, 5, 32)
    np.testing.assert_array_equal(y[:, 0, 0], x[:, :2, :2].max((1, 2)))
    np.testing.assert_array_equal(y[:, 1, 2], x[:, 1:4, 3:6].max((1, 2)))


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("zero_border", [False, True])
def test_max_pool_and_its_gradient_are_those_of_xla(size, zero_border):
    """Among equal values too, of which the first takes the gradient; NaN is not lost."""
    x = jnp.asarray(np.random.default_rng(0).integers(-2, 3, (3, size, size, 5)), jnp.float32)

    def plain(x):
        border = 0.0 if zero_border else -jnp.inf
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=border)
        return nn.max_pool(padded, (3, 3), strides=(2, 2))

    def ours(x):
        return max_pool(x, zero_border=zero_border)

    np.testing.assert_array_equal(ours(x), plain(x))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=plain(x).shape), jnp.float32)
    gradients = [jax.grad(lambda x, pool=pool: (pool(x) * weights).sum())(x) for pool in (ours, plain)]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-6)
    broken = x.at[1, 4, 4, 2].set(jnp.nan)
    np.testing.assert_array_equal(jnp.isnan(ours(broken)), jnp.isnan(plain(broken)))


def test_stored_relu_is_relu():
    x = jnp.asarray([-1.0, 0.0, 2.0])
    np.testing.assert_array_equal(stored_relu(x), [0, 0, 2])
    np.testing.assert_array_equal(jax.vmap(jax.grad(stored_relu))(x), [0, 0, 1])
    np.testing.assert_array_equal(jax.hessian(lambda x: (x * stored_relu(x)).sum())(x), np.diag([0, 0, 2]))


def test_average_pool_counts_only_the_pixels_that_are_there():
    y = np.asarray(average_pool(jnp.asarray(X), 2))
    assert y.shape == (4, 5, 5, 32)
    np.testing.assert_allclose(y[:, 0, 1], X[:, 0:2, 2:4].mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(y[:, 4, 4], X[:, 8, 8], rtol=1e-6)
