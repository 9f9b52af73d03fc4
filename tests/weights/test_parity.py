"""Logits, stages, losses, gradients and running statistics beside the real torchvision and timm.

Nets are shrunk to a block or two a stage; `test_names.py` compares all names and shapes at full size.
"""

from functools import partial

import jax
import numpy as np
import optax
import pytest

from resnet_jax import create_model, to_torch
from resnet_jax.weights.convert import adapt_stem

from .torch_twins import close, images_for, nchw, nhwc, ours_of, timm, torch, torch_step, torchvision, twins

SMALL = ((2, 1, 2, 1), (16, 32, 48, 64))
WIDE = ((1, 2, 1, 1), (32, 64, 64, 96))


def resnet(sizes_and_widths=SMALL, **theirs):
    sizes, widths = sizes_and_widths
    return {"stage_sizes": sizes, "widths": widths}, {"layers": sizes, "channels": widths} | theirs


def resnetv2(sizes=(1, 2, 1, 1), widths=(32, 64, 96, 128), expansion=4):
    channels = tuple(expansion * width for width in widths)
    return {"stage_sizes": sizes, "widths": widths}, {"layers": sizes, "channels": channels}


def knobs(pair, ours, theirs):
    return pair[0] | ours, pair[1] | theirs


# name -> (ours, theirs): each kind of the family, and every knob at least once
TIMM = {
    "resnet18": resnet(),
    "resnet50": resnet(),
    "resnet50c": resnet(),
    "resnet50d": resnet(),
    "resnet50s": resnet(),
    "resnet26t": resnet(),
    "resnext50_32x4d": resnet(WIDE),
    "wide_resnet50_2": resnet(),
    "resnet50_gn": resnet(((1, 1, 1, 1), (32, 64, 64, 96))),
    "seresnet34": resnet(),
    "seresnext26d_32x4d": resnet(WIDE),
    "seresnextaa101d_32x8d": resnet(WIDE),
    "senet154": resnet(((1, 2, 1, 1), (64, 64, 64, 64))),
    "ecaresnet50t": resnet(),
    "ecaresnetlight": resnet(),
    "resnetrs50": resnet(),
    "resnetaa50": resnet(),
    "resnetblur18": resnet(),
    "resnetblur50d": resnet(),
    "test_resnet": ({}, {}),
    "resnetv2_18d": resnetv2(expansion=1),
    "resnetv2_50": resnetv2(),
    "resnetv2_50t": resnetv2(),
    "resnetv2_50d_gn": resnetv2(),
    "densenet121": ({"stage_sizes": (2, 3, 1, 2)}, {"block_config": (2, 3, 1, 2)}),
    "densenetblur121d": ({"stage_sizes": (2, 1, 1, 2)}, {"block_config": (2, 1, 1, 2)}),
}
KNOBS = {
    "output_stride 8": ("resnet50d", knobs(resnet(), {"output_stride": 8}, {"output_stride": 8}), {}),
    "output_stride 16": ("resnet18", knobs(resnet(), {"output_stride": 16}, {"output_stride": 16}), {}),
    "output_stride 8 senet": (
        "senet154",
        knobs(resnet(((1, 1, 1, 1), (64, 64, 64, 64))), {"output_stride": 8}, {"output_stride": 8}),
        {},
    ),
    "output_stride 8 blur": ("resnetblur50", knobs(resnet(), {"output_stride": 8}, {"output_stride": 8}), {}),
    "output_stride 8 v2": ("resnetv2_50d", knobs(resnetv2(), {"output_stride": 8}, {"output_stride": 8}), {}),
    "one channel": ("resnet50d", knobs(resnet(), {"in_channels": 1}, {"in_chans": 1}), {}),
    "13 channels": ("densenet121", knobs(TIMM["densenet121"], {"in_channels": 13}, {"in_chans": 13}), {}),
    "silu": ("resnet18d", knobs(resnet(), {"act": "silu"}, {"act_layer": "silu"}), {}),
    "max": ("resnet18", resnet(), {"global_pool": "max"}),
    "avgmax": ("resnet18", resnet(), {"global_pool": "avgmax"}),
    "catavgmax": ("resnetv2_50", resnetv2(), {"global_pool": "catavgmax"}),
    "group norm": (
        "resnet18d",
        knobs(resnet(((1, 1, 1, 1), (32, 64, 64, 96))), {"norm": "group"}, {"norm_layer": "groupnorm"}),
        {},
    ),
    "attention": (
        "resnet18",
        knobs(resnet(), {"attention": "eca"}, {"block_args": {"attn_layer": "eca"}}),
        {},
    ),
    "odd size": ("resnet50d", resnet(), {}),
    "odd size blur": ("resnetblur50d", resnet(), {}),
}


def compare_in_evaluation(module, model, variables, size=64):
    images = images_for(model.in_channels, size)
    apply = jax.jit(lambda v, x: model.apply(v, x, endpoints=True))
    logits, endpoints = apply(variables, images)
    with torch.no_grad():
        expected = module(nchw(images))
        stages = module.forward_intermediates(nchw(images), intermediates_only=True)
    for name, stage in zip(("stem", "stage1", "stage2", "stage3", "stage4"), stages, strict=True):
        close(endpoints[name], nhwc(stage), 1e-4, name)
    close(logits, expected, 1e-4, "logits")


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    ours, theirs = TIMM[name]
    module, model, variables = twins(name, ours, theirs, {"num_classes": 7})
    compare_in_evaluation(module, model, variables)


@pytest.mark.parametrize("knob", KNOBS)
def test_knobs(knob):
    name, (ours, theirs), shared = KNOBS[knob]
    module, model, variables = twins(name, ours, theirs, {"num_classes": 5} | shared)
    compare_in_evaluation(module, model, variables, 75 if "odd size" in knob else 64)


def test_big_transfer():
    """timm's constructor by name takes no other layout, so its class is called."""
    ours, theirs = resnetv2()
    conv = partial(timm.layers.StdConv2d, eps=1e-8)
    module = timm.models.resnetv2.ResNetV2(**theirs, stem_type="fixed", conv_layer=conv, num_classes=7)
    model, variables = ours_of(module, "resnetv2_50x1_bit", ours | {"num_classes": 7})
    compare_in_evaluation(module, model, variables)


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 64), ("resnext50_32x4d", 64), ("densenet121", 64), ("googlenet", 75)]
)
def test_torchvision_at_full_depth(name, size):
    options = {"init_weights": False, "aux_logits": True} if name == "googlenet" else {}
    module = getattr(torchvision.models, name)(**options)
    model, variables = ours_of(module, name, {})
    images = images_for(size=size)
    with torch.no_grad():
        expected = module(nchw(images))
    close(jax.jit(model.apply)(variables, images), expected, 1e-4, "logits")


@pytest.mark.parametrize("name", TIMM)
def test_a_training_step(name):
    """Loss, every gradient and the running statistics after one step.

    With a smooth activation: at the kink of a ReLU one rounding error turns a pixel's whole gradient on or off, in
    float32 beside float64 in torch too.
    """
    ours, theirs = knobs(TIMM[name], {"act": "silu"}, {"act_layer": "silu"})
    module, model, variables = twins(name, ours, theirs, {"num_classes": 7})
    images, labels = images_for(batch=8), np.arange(8) % 7

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss_of(params):
        given = variables | {"params": params}
        logits, moved = model.apply(given, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), moved

    (loss, moved), grads = loss_of(variables["params"])
    expected, theirs_grads, stats = torch_step(module, images, labels)
    close(loss, expected, 1e-4, "loss")
    named = to_torch(model, {"params": grads} | (moved if "batch_stats" in variables else {}))
    for key, gradient in (theirs_grads | stats).items():
        close(named[key], gradient, 1e-4, key)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_the_first_convolution_is_adapted_as_timm_does_it(channels):
    model = create_model("resnet50d", stage_sizes=(1, 1, 1, 1), in_channels=channels)
    kernel = torch.randn(32, 3, 3, 3)
    adapted = adapt_stem(model, {"conv1.0.weight": kernel})["conv1.0.weight"]
    expected = timm.models.adapt_input_conv(channels, kernel)
    np.testing.assert_allclose(adapted, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["resnet50", "resnetv2_50"])
def test_drop_path_rates_are_those_of_timm(name):
    module = timm.create_model(name, drop_path_rate=0.3)
    paths = [m.drop_prob for m in module.modules() if isinstance(m, timm.layers.DropPath)]
    ours = [rate for stage in create_model(name, drop_path_rate=0.3)._drop_paths() for rate in stage]
    np.testing.assert_allclose(ours, [0.0] * (len(ours) - len(paths)) + paths, rtol=1e-6)
