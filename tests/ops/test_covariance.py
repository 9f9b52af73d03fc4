"""The one product that an NVIDIA GPU makes of a widening 1x1 convolution and its norm, computed here on a CPU."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import PartitionSpec

from resnet_jax.models.layers import batch_moments, normalized
from resnet_jax.models.resnet import ResNet
from resnet_jax.ops.covariance import normalized_product
from resnet_jax.training.sharding import make_mesh

RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(6, 6))
X = np.maximum(RNG.normal(0.3, 1.0, size=(8, 5, 7, 6)) @ MIX, 0).astype(np.float32)  # as behind a ReLU
KERNEL = RNG.normal(size=(6, 24)).astype(np.float32)
SCALE, BIAS = RNG.normal(size=(2, 24)).astype(np.float32)
WEIGHTS = RNG.normal(size=(8, 5, 7, 24)).astype(np.float32)
EPSILON = 1e-5


def in_two(x, kernel, scale, bias, epsilon):
    """The convolution and then the norm, as everywhere else."""
    y = x @ kernel
    mean, var = batch_moments(y)
    return normalized(y, mean, var, scale, bias, epsilon, x.dtype), mean, var


def test_it_is_pytorchs_convolution_and_norm_with_their_gradients():
    torch = pytest.importorskip("torch")
    given = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (X, KERNEL, SCALE, BIAS)]
    x, kernel, scale, bias = given
    running = [torch.zeros(24, dtype=torch.float64), torch.ones(24, dtype=torch.float64)]
    y = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), kernel.T[:, :, None, None])
    z = torch.nn.functional.batch_norm(y, *running, scale, bias, training=True, momentum=1.0, eps=EPSILON)
    z = z.permute(0, 2, 3, 1)
    (z * torch.tensor(WEIGHTS)).sum().backward()

    def weighed(*given):
        found, mean, var = normalized_product(*given, EPSILON)
        return (found * WEIGHTS).sum(), (found, mean, var)

    ours, (found, mean, var) = jax.jit(jax.grad(weighed, (0, 1, 2, 3), has_aux=True))(X, KERNEL, SCALE, BIAS)
    count = X.size // 6
    for name, ours_one, theirs in [
        ("output", found, z),
        ("mean", mean, running[0]),
        ("variance", var, running[1] * (count - 1) / count),
        *zip(("x", "kernel", "scale", "bias"), ours, [v.grad for v in given], strict=True),
    ]:
        theirs = theirs.detach().numpy()
        error = np.linalg.norm(ours_one - theirs) / np.linalg.norm(theirs)
        assert error < 2e-6, (name, error)


def test_statistics_have_gradients_too():
    """And so have derivatives forward, and second ones."""
    point = (X, KERNEL, SCALE, BIAS)
    along = tuple(jnp.asarray(RNG.normal(size=v.shape), jnp.float32) for v in point)

    def of(function):
        def value(*given):
            z, mean, var = function(*given, EPSILON)
            return (z * WEIGHTS).sum() + (mean**2).sum() + jnp.log(var).sum()

        slope = jax.grad(value, (0, 1, 2, 3))
        return jax.jit(lambda: (jax.jvp(value, point, along), slope(*point), jax.jvp(slope, point, along)[1]))()

    for a, b in zip(jax.tree.leaves(of(normalized_product)), jax.tree.leaves(of(in_two)), strict=True):
        assert np.linalg.norm(a - b) <= 2e-5 * np.linalg.norm(b)


def test_rounding_the_kernel_moves_no_mean():
    """In bfloat16 the mean of the output is the bias to half a last digit; by the mean before rounding, 0.015 off."""
    x = jnp.asarray(3 + RNG.normal(size=(64, 16, 16, 6)) @ MIX, jnp.bfloat16)
    y = normalized_product(x, KERNEL, SCALE, BIAS, EPSILON)[0]
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32).mean((0, 1, 2)), BIAS, atol=2e-3)


def test_a_channel_that_never_changes():
    x = np.array(X)
    x[..., 1:] = 0
    x[..., 0] = 2
    loss = lambda *given: (normalized_product(*given, EPSILON)[0] * WEIGHTS).sum()  # noqa: E731
    assert np.isfinite(normalized_product(x, KERNEL, SCALE, BIAS, EPSILON)[0]).all()
    assert all(np.isfinite(g).all() for g in jax.grad(loss, (0, 1, 2, 3))(x, KERNEL, SCALE, BIAS))


def test_over_devices_sums_travel_and_no_images():
    mesh = make_mesh(8)
    split = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
    loss = lambda *given: (normalized_product(*given, EPSILON)[0] * WEIGHTS).sum()  # noqa: E731
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    spread = jax.device_put(X, split)
    text = step.lower(spread, KERNEL, SCALE, BIAS).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text
    here, there = step(X, KERNEL, SCALE, BIAS), step(spread, KERNEL, SCALE, BIAS)
    for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_over_a_mapped_axis_statistics_are_those_of_all_devices():
    def gradients(x, weights, axis_name=None):
        def loss(*given):
            y, mean, var = normalized_product(*given, EPSILON, axis_name)
            return (y * weights).sum(), (y, mean, var)

        slopes, found = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(x, KERNEL, SCALE, BIAS)
        return (*slopes, *found) if axis_name is None else (slopes[0], *lax.psum(slopes[1:], axis_name), *found)

    cut, whole = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(
        partial(gradients, axis_name="data"),
        mesh=make_mesh(8),
        in_specs=(cut, cut),
        out_specs=(cut, whole, whole, whole, cut, whole, whole),
        check_vma=False,
    )
    for a, b in zip(jax.jit(mapped)(X, WEIGHTS), jax.jit(gradients)(X, WEIGHTS), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def ways():
    """Gradients of a small network in bfloat16, as an NVIDIA GPU gets them and as a TPU does, and in float32."""
    fields = {"stage_sizes": (2, 2), "widths": (16, 32), "stem": "3x3", "stem_pool": "none", "num_classes": 8}
    model = ResNet(**fields, zero_init_last=False)
    images = jnp.zeros((16, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    stats = variables["batch_stats"]

    def gradients(model):
        def loss(params, images):
            logits, moved = model.apply({"params": params, "batch_stats": stats}, images, True, mutable=["batch_stats"])
            return jax.nn.log_softmax(logits)[jnp.arange(16), jnp.arange(16) % 8].mean(), moved

        return jax.jit(jax.grad(loss, has_aux=True))

    half, params = gradients(model.clone(dtype=jnp.bfloat16)), variables["params"]
    anywhere = [export.DisabledSafetyCheck.platform()]
    lowered = {name: export.export(half, platforms=[name], disabled_checks=anywhere) for name in ("cuda", "tpu")}
    return model, {name: way(params, images) for name, way in lowered.items()}, gradients(model)


def test_an_nvidia_gpu_gets_it_in_bfloat16(ways):
    """No convolution that widens four times is left there, nor its gradient."""
    widening = re.compile(r"stablehlo\.convolution.*tensor<1x1x(16x64|32x128)xbf16>")
    counts = {name: len(widening.findall(way.mlir_module())) for name, way in ways[1].items()}
    assert counts["cuda"] == 0 < counts["tpu"]


def test_a_network_of_it_learns_as_well_in_bfloat16(ways):
    """Its statistics and gradients are as near to those in float32 as with the convolutions and norms apart."""
    model, lowered, exact = ways
    fast = {"xla_backend_optimization_level": 1}  # not optimised at all, bfloat16 takes ten times as long
    half = {name: jax.jit(way.call, compiler_options=fast) for name, way in lowered.items()}
    ratios = []
    for seed in range(4):
        noise = jax.random.normal(jax.random.key(seed), (16, 4, 4, 3))
        images = jax.image.resize(noise, (16, 16, 16, 3), "cubic")
        params = jax.jit(model.init)(jax.random.key(seed), images)["params"]
        whole = jax.tree.leaves(jax.device_get(exact(params, images)))
        errors = {
            name: np.array(
                [
                    np.linalg.norm(a - b) / np.linalg.norm(b)
                    for a, b in zip(jax.tree.leaves(jax.device_get(way(params, images))), whole, strict=True)
                ]
            )
            for name, way in half.items()
        }
        ratios.append(np.log(errors["cuda"] / errors["tpu"]).mean())
    assert np.exp(np.mean(ratios)) < 1.1


FIELDS = {"stage_sizes": (1, 1), "widths": (32, 64), "num_classes": 5}


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "float32"},
        {"block": "basic"},
        {"norm": "frozen_batch"},
        {"norm": "group"},
        {"norm": "none"},
        {"ghost": 2},
    ],
)
def test_all_else_stays_as_it_was(fields):
    """An NVIDIA GPU gets as many convolutions as a TPU."""
    fields = FIELDS | {"dtype": "bfloat16"} | fields
    model = ResNet(**fields | {"dtype": jnp.dtype(fields["dtype"])})
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    traced = jax.jit(lambda v, x: model.apply(v, x, True, mutable=["batch_stats"])).trace(variables, images)
    lowered = [traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "tpu")]
    counts = [text.count("stablehlo.convolution(") for text in lowered]
    assert counts[0] == counts[1] > 0
