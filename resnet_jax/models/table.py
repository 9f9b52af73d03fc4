"""The named models: fields of their modules. ImageNet names and layouts are those of timm 1.0 and torchvision."""

from typing import Any

from resnet_jax.models.googlenet import STAGES

Fields = dict[str, Any]

R10, R18, R34, R26 = (1, 1, 1, 1), (2, 2, 2, 2), (3, 4, 6, 3), (2, 2, 2, 2)
R50, R101, R152, R200 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3), (3, 24, 36, 3)

BASIC: Fields = {"block": "basic"}
C: Fields = {"stem": "deep"}
D: Fields = {"stem": "deep", "shortcut": "D"}
S: Fields = {"stem": "deep", "stem_width": 128}
T: Fields = {"stem": "deep_tiered", "shortcut": "D"}
SE: Fields = {"attention": "se"}
ECA: Fields = {"attention": "eca"}
AA: Fields = {"anti_alias": "average"}
BLUR: Fields = {"anti_alias": "blur"}
RS: Fields = D | SE | {"attention_ratio": 0.25, "stem_pool": "conv"}


def _resnet(sizes: tuple[int, ...], *parts: Fields) -> Fields:
    row: Fields = {"stage_sizes": sizes}
    for part in parts:
        row |= part
    return row


def _grouped(cardinality: int, base_width: int) -> Fields:
    return {"cardinality": cardinality, "base_width": base_width}


X4, X8, X64 = _grouped(32, 4), _grouped(32, 8), _grouped(64, 4)

PLAIN: dict[str, Fields] = {
    "resnet10t": _resnet(R10, BASIC, T),
    "resnet14t": _resnet(R10, T),
    "resnet18": _resnet(R18, BASIC),
    "resnet18d": _resnet(R18, BASIC, D),
    "resnet26": _resnet(R26),
    "resnet26d": _resnet(R26, D),
    "resnet26t": _resnet(R26, T),
    "resnet34": _resnet(R34, BASIC),
    "resnet34d": _resnet(R34, BASIC, D),
    "resnet50": _resnet(R50),
    "resnet50_gn": _resnet(R50, {"norm": "group"}),
    "resnet50c": _resnet(R50, C),
    "resnet50d": _resnet(R50, D),
    "resnet50s": _resnet(R50, S),
    "resnet50t": _resnet(R50, T),
    "resnet101": _resnet(R101),
    "resnet101c": _resnet(R101, C),
    "resnet101d": _resnet(R101, D),
    "resnet101s": _resnet(R101, S),
    "resnet152": _resnet(R152),
    "resnet152c": _resnet(R152, C),
    "resnet152d": _resnet(R152, D),
    "resnet152s": _resnet(R152, S),
    "resnet200": _resnet(R200),
    "resnet200d": _resnet(R200, D),
    "wide_resnet50_2": _resnet(R50, {"base_width": 128}),
    "wide_resnet101_2": _resnet(R101, {"base_width": 128}),
    "resnext50_32x4d": _resnet(R50, X4),
    "resnext50d_32x4d": _resnet(R50, X4, D),
    "resnext101_32x4d": _resnet(R101, X4),
    "resnext101_32x8d": _resnet(R101, X8),
    "resnext101_32x16d": _resnet(R101, _grouped(32, 16)),
    "resnext101_32x32d": _resnet(R101, _grouped(32, 32)),
    "resnext101_64x4d": _resnet(R101, X64),
    "test_resnet": _resnet(
        R10, D, {"block": ("basic", "basic", "bottleneck", "basic"), "stem_width": 32, "widths": (32, 48, 48, 96)}
    ),
}

CHANNEL_ATTENTION: dict[str, Fields] = {
    "seresnet18": _resnet(R18, BASIC, SE),
    "seresnet34": _resnet(R34, BASIC, SE),
    "seresnet50": _resnet(R50, SE),
    "seresnet50t": _resnet(R50, SE, T),
    "seresnet101": _resnet(R101, SE),
    "seresnet152": _resnet(R152, SE),
    "seresnet152d": _resnet(R152, SE, D),
    "seresnet200d": _resnet(R200, SE, D),
    "seresnet269d": _resnet((3, 30, 48, 8), SE, D),
    "seresnext26d_32x4d": _resnet(R26, X4, SE, D),
    "seresnext26t_32x4d": _resnet(R26, X4, SE, T),
    "seresnext50_32x4d": _resnet(R50, X4, SE),
    "seresnext101_32x4d": _resnet(R101, X4, SE),
    "seresnext101_32x8d": _resnet(R101, X8, SE),
    "seresnext101_64x4d": _resnet(R101, X64, SE),
    "seresnext101d_32x8d": _resnet(R101, X8, SE, D),
    "seresnextaa101d_32x8d": _resnet(R101, X8, SE, AA, D),
    "seresnextaa201d_32x8d": _resnet((3, 24, 36, 4), X8, SE, AA, D, {"stem_width": 128}),
    "seresnetaa50d": _resnet(R50, SE, AA, D),
    "senet154": _resnet(R152, X64, SE, S, {"shortcut_kernel": 3, "reduce_first": 2}),
    "ecaresnet26t": _resnet(R26, ECA, T),
    "ecaresnet50d": _resnet(R50, ECA, D),
    "ecaresnet50t": _resnet(R50, ECA, T),
    "ecaresnet101d": _resnet(R101, ECA, D),
    "ecaresnet200d": _resnet(R200, ECA, D),
    "ecaresnet269d": _resnet((3, 30, 48, 8), ECA, D),
    "ecaresnetlight": _resnet((1, 1, 11, 3), ECA, {"shortcut": "D"}),
    "ecaresnext26t_32x4d": _resnet(R26, X4, ECA, T),
    "ecaresnext50t_32x4d": _resnet(R50, X4, ECA, T),
    "resnetrs50": _resnet(R50, RS),
    "resnetrs101": _resnet(R101, RS),
    "resnetrs152": _resnet(R152, RS),
    "resnetrs200": _resnet(R200, RS),
    "resnetrs270": _resnet((4, 29, 53, 4), RS),
    "resnetrs350": _resnet((4, 36, 72, 4), RS),
    "resnetrs420": _resnet((4, 44, 87, 4), RS),
}

ANTI_ALIASED: dict[str, Fields] = {
    "resnetaa34d": _resnet(R34, BASIC, AA, D),
    "resnetaa50": _resnet(R50, AA),
    "resnetaa50d": _resnet(R50, AA, D),
    "resnetaa101d": _resnet(R101, AA, D),
    "resnetblur18": _resnet(R18, BASIC, BLUR),
    "resnetblur50": _resnet(R50, BLUR),
    "resnetblur50d": _resnet(R50, BLUR, D),
    "resnetblur101d": _resnet(R101, BLUR, D),
}

V2: Fields = {"preact": True}


def _bit(sizes: tuple[int, ...], factor: int) -> Fields:
    """Returns a network of Big Transfer: group norm, standardised kernels, `factor` times as wide."""
    widths = tuple(factor * width for width in (64, 128, 256, 512))
    wide = {"widths": widths, "stem_width": 64 * factor, "stem_pool": "max_zero", "norm": "group", "standardized": True}
    return _resnet(sizes, V2, wide)


PREACTIVATED: dict[str, Fields] = {
    "resnetv2_18": _resnet(R18, V2, BASIC),
    "resnetv2_18d": _resnet(R18, V2, BASIC, D),
    "resnetv2_34": _resnet(R34, V2, BASIC),
    "resnetv2_34d": _resnet(R34, V2, BASIC, D),
    "resnetv2_50": _resnet(R50, V2),
    "resnetv2_50d": _resnet(R50, V2, D),
    "resnetv2_50d_gn": _resnet(R50, V2, D, {"norm": "group"}),
    "resnetv2_50t": _resnet(R50, V2, T),
    "resnetv2_101": _resnet(R101, V2),
    "resnetv2_101d": _resnet(R101, V2, D),
    "resnetv2_152": _resnet(R152, V2),
    "resnetv2_152d": _resnet(R152, V2, D),
    "resnetv2_50x1_bit": _bit(R50, 1),
    "resnetv2_50x3_bit": _bit(R50, 3),
    "resnetv2_101x1_bit": _bit(R101, 1),
    "resnetv2_101x3_bit": _bit(R101, 3),
    "resnetv2_152x2_bit": _bit(R152, 2),
    "resnetv2_152x4_bit": _bit(R152, 4),
}


def _cifar(blocks: int, **fields: Any) -> Fields:
    """Returns three stages of `blocks` blocks on a 3x3 stem of 16 channels (He et al. 2015, section 4.2)."""
    row = {"stage_sizes": (blocks,) * 3, "block": "basic", "widths": (16, 32, 64), "stem_width": 16}
    return row | {"stem": "3x3", "stem_pool": "none", "num_classes": 10} | fields


CIFAR: dict[str, Fields] = {
    **{f"cifar_resnet{n}": _cifar((n - 2) // 6, shortcut="A") for n in (8, 14, 20, 32, 44, 56, 110, 1202)},
    **{f"cifar_plain{n}": _cifar((n - 2) // 6, shortcut="none") for n in (8, 14, 20, 32, 44, 56, 110, 1202)},
    **{f"cifar_resnetv2_{n}": _cifar((n - 2) // 9, block="bottleneck", preact=True) for n in (164, 1001)},
    "cifar_wrn_28_10": _cifar(4, preact=True, widths=(160, 320, 640)),
    "cifar_botnet20": _cifar(3, block="bottleneck", self_attention=4),
    "cifar_resnet18": _cifar(0, stage_sizes=(2, 2, 2, 2), widths=(64, 128, 256, 512), stem_width=64),
}

SELF_ATTENTION: dict[str, Fields] = {"botnet50": _resnet(R50, {"self_attention": 4})}

RESNETS = PLAIN | SELF_ATTENTION | CHANNEL_ATTENTION | ANTI_ALIASED | PREACTIVATED | CIFAR

DENSENETS: dict[str, Fields] = {
    "densenet121": {"stage_sizes": (6, 12, 24, 16)},
    "densenet161": {"stage_sizes": (6, 12, 36, 24), "growth": 48},
    "densenet169": {"stage_sizes": (6, 12, 32, 32)},
    "densenet201": {"stage_sizes": (6, 12, 48, 32)},
    "densenet264d": {"stage_sizes": (6, 12, 64, 48), "growth": 48, "stem": "deep"},
    "densenetblur121d": {"stage_sizes": (6, 12, 24, 16), "stem": "deep", "anti_alias": "blur"},
}


def _cifar_densenet(depth: int, growth: int) -> Fields:
    """Returns DenseNet-BC of three equal stages for small images (Huang et al. 2016, Table 2)."""
    return {"stage_sizes": ((depth - 4) // 6,) * 3, "growth": growth, "stem": "3x3", "num_classes": 10}


DENSENETS |= {
    f"cifar_densenet_bc_{depth}_{growth}": _cifar_densenet(depth, growth)
    for depth, growth in ((100, 12), (250, 24), (190, 40))
}

QUARTER = tuple(tuple(tuple(max(4, n // 4) for n in module) for module in stage) for stage in STAGES)

GOOGLENETS: dict[str, Fields] = {
    "googlenet": {},
    "cifar_googlenet": {"widths": QUARTER, "stem": "3x3", "drop_rate": 0.0, "num_classes": 10},
}

VITS: dict[str, Fields] = {
    "vit_b_16": {},
    "vit_tiny": {"width": 192, "heads": 3, "mlp": 768},
    "cifar_vit": {"patch": 4, "width": 96, "depth": 6, "heads": 3, "mlp": 192, "image_size": 32, "num_classes": 10},
}

NAMED_HERE = ("botnet50", "vit_tiny")
"""Networks that neither timm nor torchvision has by these names, beside all of `cifar_*`."""
