"""ViT and GoogLeNet's auxiliary heads beside torchvision's, and spatial attention beside plain NumPy."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax import create_model, load_pretrained, to_torch
from resnet_jax.config import AugmentConfig, ModelConfig, TrainConfig
from resnet_jax.models.attention import SpatialAttention
from resnet_jax.models.googlenet import AuxiliaryHead, Chain
from resnet_jax.models.layers import Conv, make_norm
from resnet_jax.models.registry import variable_shapes
from resnet_jax.ops.pooling import adaptive_average_pool
from resnet_jax.training.build import build_model, state_maker
from resnet_jax.training.programs import make_prepare, recipe_step
from resnet_jax.training.step import step_key
from resnet_jax.weights.convert import from_torch
from resnet_jax.weights.export import save_tensors
from resnet_jax.weights.sources import Weights

from ..small import digits
from .torch_twins import images_for, randomize, torch, torchvision

SMALL = {"image_size": 64, "depth": 3, "heads": 4, "width": 64, "mlp": 128, "num_classes": 7}


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    module = torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=7
    )
    with torch.no_grad():
        module.heads.head.weight.normal_(0, 0.1)
    return randomize(module.eval())


def test_a_transformer_gives_torchvisions_logits_and_goes_back(transformer, tmp_path):
    model = create_model("vit_b_16", **SMALL)
    variables = from_torch(model, transformer.state_dict())
    images = images_for(size=64)
    with torch.no_grad():
        expected = transformer(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), expected, atol=1e-4 * np.abs(expected).max())
    tensors = to_torch(model, variables)
    for name, tensor in transformer.state_dict().items():
        np.testing.assert_array_equal(tensors[name], tensor.numpy())
    fields = SMALL | {"num_classes": 7}
    save_tensors(tmp_path / "vit.safetensors", Weights(tensors, "vit_b_16", fields), "safetensors")
    _, again = load_pretrained(str(tmp_path / "vit.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_a_transformer_without_shortcuts_tells_images_apart_less():
    """At the start, over eight blocks: features of two images are less than half as far apart."""

    def difference(shortcut):
        model = create_model("vit_tiny", image_size=32, depth=8, width=48, heads=3, mlp=96, shortcut=shortcut)
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        _, stages = jax.jit(lambda v, x, m=model: m.apply(v, x, endpoints=True))(variables, images_for(size=32))
        features = stages["features"] / jnp.linalg.norm(stages["features"], axis=-1, keepdims=True)
        return float(jnp.linalg.norm(features[0] - features[1]))

    assert difference(True) > 2 * difference(False)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="set image_size"):
        jax.eval_shape(create_model("cifar_vit").init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


@pytest.mark.parametrize("size", [4, 5, 7, 14])
def test_means_of_parts_are_those_of_torch(size):
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    expected = torch.nn.AdaptiveAvgPool2d(4)(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(adaptive_average_pool(x, 4), expected.numpy().transpose(0, 2, 3, 1), atol=1e-6)


def test_an_auxiliary_head_is_torchvisions():
    torch.manual_seed(0)
    module = torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    randomize(module.eval())
    model = create_model("googlenet", num_classes=5, auxiliary=True)
    variables = from_torch(model, module.state_dict())
    x = np.random.default_rng(0).normal(size=(2, 14, 14, 528)).astype(np.float32)
    chain = partial(Chain, conv=partial(Conv), norm=make_norm(model, epsilon=1e-3), act=nn.relu)
    own = {kind: values["auxiliary2"] for kind, values in variables.items()}
    with torch.no_grad():
        expected = module.aux2(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    found = AuxiliaryHead(5, chain).apply(own, x, train=False)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert set(to_torch(model, variables)) == set(module.state_dict())


def test_auxiliary_losses_count_three_tenths():
    config = digits(
        model=ModelConfig("cifar_googlenet"), augment=AugmentConfig(crop="none"),
        train=TrainConfig(batch_size=4, ema_decay=None),
    )  # fmt: skip
    module = (8,) * 6
    model = build_model(config, 10).clone(auxiliary=True, widths=((module,), (module,) * 4, (module,)))
    state = state_maker(config, model, lambda step: 0.1)()
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8),
        "label": np.arange(4),
        "mirrored": np.zeros(4, bool),
    }
    _, sums = jax.jit(recipe_step(config, model, optax.sgd(0.1)))(
        state.replace(opt_state=optax.sgd(0.1).init(state.params)), batch
    )
    prepared = make_prepare(config, model)(batch, step_key(0, state.step))
    images, targets = prepared["image"], prepared["target"]
    key = jax.random.split(step_key(0, state.step), 4)[3]
    given = {"params": state.params, "batch_stats": state.batch_stats}
    options = {"train": True, "mutable": ["batch_stats", "auxiliary_logits"], "rngs": {"dropout": key}}
    logits, moved = jax.jit(lambda given, images: model.apply(given, images, **options))(given, images)
    more = jax.tree.leaves(moved["auxiliary_logits"])
    assert len(more) == 2
    losses = [optax.softmax_cross_entropy(x, targets).sum() for x in (logits, *more)]
    assert float(sums["loss"]) == pytest.approx(float(losses[0] + 0.3 * (losses[1] + losses[2])), rel=1e-5)


def test_attention_over_places_by_hand():
    """softmax((q k + q row + q column) / ...) v, place by place, with loops."""
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 5)).astype(np.float32)
    module = SpatialAttention(8, heads=2, window=4)
    variables = module.init(jax.random.key(0), x)
    params = jax.tree.map(np.asarray, variables["params"])
    q, k, v = np.split((x @ params["qkv"]["kernel"]).reshape(2, 3, 6, 4), 3, axis=2)
    expected = np.zeros((2, 3, 2, 4))
    for y, c, head in np.ndindex(2, 3, 2):
        logits = np.zeros((2, 3))
        for to_y, to_x in np.ndindex(2, 3):
            relative = params["relative_rows"][to_y - y + 3] + params["relative_columns"][to_x - c + 3]
            logits[to_y, to_x] = q[y, c, head] @ (k[to_y, to_x, head] / 2.0 + relative)
        weights = np.exp(logits) / np.exp(logits).sum()
        expected[y, c, head] = (weights[..., None] * v[:, :, head]).sum((0, 1))
    np.testing.assert_allclose(module.apply(variables, x)[0], expected.reshape(2, 3, 8), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="larger than the window 4"):
        module.init(jax.random.key(0), jnp.zeros((1, 5, 5, 5)))


@pytest.mark.parametrize("name", ["cifar_botnet20", "cifar_vit", "cifar_googlenet", "cifar_densenet_bc_100_12"])
def test_relatives_go_out_and_in_unchanged(name):
    model = create_model(name)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), variable_shapes(model))
    jax.tree.map(np.testing.assert_array_equal, from_torch(model, to_torch(model, variables)), variables)
