"""Backbones: maps of a network, beside timm's and beside what the network itself gives."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

import resnet_jax as rj
from resnet_jax.models import registry

from ..conftest import ROOT

SMALL = {"stage_sizes": (1, 1, 1), "widths": (8, 16, 32), "stem_width": 8, "zero_init_last": False}
IMAGES = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)


def test_maps_are_those_of_timm(tmp_path):
    from ..weights.torch_twins import close, images_for, nchw, nhwc, randomize, timm, torch

    shape = {"layers": (2, 1, 2, 1), "channels": (16, 32, 48, 64)}
    torch.manual_seed(0)
    module = timm.create_model("resnet50d", features_only=True, out_indices=(1, 3, 4), **shape)
    randomize(module.eval())
    tensors = {
        f"conv1.{name[len('conv1_') :]}" if name.startswith("conv1_") else name: tensor.numpy()
        for name, tensor in module.state_dict().items()
    }
    save_file(tensors, tmp_path / "weights.safetensors")
    ours = {"stage_sizes": shape["layers"], "widths": shape["channels"]}
    backbone, variables = rj.features(str(tmp_path / "weights.safetensors"), (1, 3, 4), name="resnet50d", **ours)
    images = images_for()
    with torch.no_grad():
        expected = module(nchw(images))
    maps = jax.jit(backbone.apply)(variables, images)
    assert backbone.names == ("stage1", "stage3", "stage4")
    assert list(backbone.channels) == module.feature_info.channels()
    assert list(backbone.strides) == module.feature_info.reduction()
    for name, ours, theirs in zip(backbone.names, maps, expected, strict=True):
        close(ours, nhwc(theirs), 1e-4, name)


@pytest.mark.parametrize(
    ("name", "stages", "fields"),
    [
        ("cifar_resnet8", (2, 0), SMALL),
        ("resnetv2_50", (1, 4), {"stage_sizes": (1, 1, 1, 1), "widths": (8, 8, 8, 8)}),
        ("densenet121", None, {"stage_sizes": (1, 2, 1, 1), "growth": 8}),
        ("cifar_googlenet", (3, 1), {"widths": (((4, 4, 8, 4, 8, 4),),) * 3}),
    ],
)
def test_maps_are_the_endpoints_of_the_network_under_the_same_variables(name, stages, fields):
    backbone, variables = rj.features(name, stages, key=jax.random.key(0), **fields)
    model = rj.create_model(name, num_classes=None, **fields)
    apply = jax.jit(lambda v, x: (backbone.apply(v, x), model.apply(v, x, endpoints=True)[1]))
    maps, outputs = apply(variables, IMAGES)
    numbers = (1, 2, 3, 4) if stages is None else stages
    assert backbone.names == tuple(f"stage{number}" if number else "stem" for number in numbers)
    for i, ours in enumerate(maps):
        np.testing.assert_array_equal(ours, outputs[backbone.names[i]])
        side = 32 // backbone.strides[i]
        assert ours.shape == (4, side, side, backbone.channels[i])


class Detector(nn.Module):
    """The mean of a backbone's maps, weighed."""

    backbone: nn.Module

    @nn.compact
    def __call__(self, images, train=False):
        return sum(nn.Dense(1)(x.mean((1, 2))) for x in self.backbone(images, train=train))


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_flow_and_statistics_stay_where_they_are_frozen(frozen):
    """As a part of another module, whose variables for it may be put there."""
    backbone, pretrained = rj.features("cifar_resnet8", (2, 3), key=jax.random.key(1), frozen=frozen, **SMALL)
    detector = Detector(backbone)
    variables = jax.jit(detector.init)(jax.random.key(0), IMAGES)
    assert jax.tree.structure(variables["params"]["backbone"]) == jax.tree.structure(pretrained["params"])
    variables = {kind: values | {"backbone": pretrained[kind]} for kind, values in variables.items()}

    def loss(params):
        given = variables | {"params": params}
        scores, changed = detector.apply(given, IMAGES, train=True, mutable=["batch_stats"])
        return jnp.square(scores - 1).mean(), changed

    gradients, changed = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), changed["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(moved)) is not frozen and any(jax.tree.leaves(moved)) is not frozen
    for path, gradient in jax.tree.leaves_with_path(gradients["backbone"]):
        still = frozen and path[-1].key in ("scale", "bias")
        assert bool(np.asarray(gradient).any()) is not still, path
    evaluated = jax.jit(backbone.apply)(pretrained, IMAGES)
    trained = jax.jit(lambda v, x: backbone.apply(v, x, train=True, mutable=["batch_stats"])[0])(pretrained, IMAGES)
    assert all(bool((a == b).all()) is frozen for a, b in zip(evaluated, trained, strict=True))


def test_a_pretrained_backbone_is_put_into_a_state_and_frozen_as_the_page_says():
    page = (ROOT / "docs" / "backbones.md").read_text()
    (shown,) = re.findall(r"(def with_backbone.*?)```", page, re.S)
    (mask,) = re.findall(r"mask=(lambda params: .*?)\)\n", page)
    (frozen,) = re.findall(r"frozen=(lambda path: .*?)\)\)\n", page)
    exec(shown, names := {})
    backbone, pretrained = rj.features("cifar_resnet8", (2, 3), key=jax.random.key(1), **SMALL)
    detector, optimizer = Detector(backbone), optax.adamw(0.1, weight_decay=0.1, mask=eval(mask))
    before = rj.create_state(detector, optimizer, jax.random.key(0), image_shape=(32, 32, 3))
    before = names["with_backbone"](before, pretrained)
    step = rj.make_train_step(
        detector, optimizer, loss=lambda out, batch: jnp.square(out[:, 0] - 1), frozen=eval(frozen)
    )
    after, _ = jax.jit(step)(before, {"image": IMAGES, "label": np.zeros(4)})
    for found, given in (("params", pretrained["params"]), ("batch_stats", pretrained["batch_stats"])):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, found)["backbone"], given)
    assert (after.params["Dense_0"]["kernel"] != before.params["Dense_0"]["kernel"]).any()


def test_what_cannot_be_given_is_named(monkeypatch):
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
    key = jax.random.key(0)
    for arguments, words in (
        (("cifar_resnet8", (2, 5)), "cannot give 5; it has 0, 1, 2, 3, where 0 is the stem"),
        (("cifar_resnet8", ()), "cannot give no stages"),
        (("vit_tiny",), "tokens"),
        (("cifar_resnet9",), "did you mean cifar_resnet8"),
    ):
        with pytest.raises(rj.InputError, match=words):
            rj.features(*arguments, key=key)
    with pytest.raises(rj.InputError, match=r"no weights are called 'cifar_resnet8'.* draws random parameters"):
        rj.features("cifar_resnet8")

    @rj.register_model("two_maps")
    class TwoMaps(nn.Module):
        num_classes: int = 2

        @nn.compact
        def __call__(self, images, train, endpoints=False):
            small = nn.Conv(4, (3, 3), 2)(images)
            logits = nn.Dense(self.num_classes)(small.mean((1, 2)))
            return (logits, {"stage1": images, "stage2": small}) if endpoints else logits

    backbone, variables = rj.features("two_maps", key=key)
    assert (backbone.channels, backbone.strides) == ((3, 4), (1, 2))
    assert backbone.apply(variables, IMAGES)[1].shape == (4, 16, 16, 4)
    with pytest.raises(rj.InputError, match="TwoMaps has no field norm"):
        rj.features("two_maps", key=key, frozen=True)
    rj.register_model("no_maps")(lambda num_classes=2: nn.Dense(num_classes))
    with pytest.raises(rj.InputError, match="Dense gives logits alone"):
        rj.features("no_maps", key=key)
